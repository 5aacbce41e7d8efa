import numpy as np
import pytest
import torch
import torch.nn.functional as F

from r2kit.data.mix import cutmix_masks, draw_kind, mix_batch
from r2kit.recipe import AugmentSpec


def batch(size: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 2, 8, 8, generator=generator), torch.arange(size) % 3


def test_mixup_blends_each_image_with_its_neighbour_and_the_labels_alike() -> None:
    image, label = batch()
    mixed, target = mix_batch(image, label, "mixup", 1.0, 3, (0, 1))
    hot = F.one_hot(label, 3).float()
    lam = float(((target - hot.roll(1, 0)) * (hot - hot.roll(1, 0))).sum() / ((hot - hot.roll(1, 0)) ** 2).sum())
    assert 0 < lam < 1
    torch.testing.assert_close(mixed, lam * image + (1 - lam) * image.roll(1, 0))
    torch.testing.assert_close(target, lam * hot + (1 - lam) * hot.roll(1, 0))


def test_cutmix_pastes_one_rectangle_and_counts_its_area() -> None:
    image, label = batch()
    for key in range(20):
        mixed, target = mix_batch(image, label, "cutmix", 1.0, 3, (0, key))
        pasted = (mixed != image).any(1)[0]
        rows, columns = pasted.any(1).nonzero().ravel(), pasted.any(0).nonzero().ravel()
        if len(rows) == 0:
            continue
        box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        assert pasted[box].all()
        torch.testing.assert_close(mixed[:, :, *box], image.roll(1, 0)[:, :, *box])
        hot = F.one_hot(label, 3).float()
        share = float(pasted.float().mean())
        torch.testing.assert_close(target, (1 - share) * hot + share * hot.roll(1, 0))


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
@pytest.mark.parametrize("size", [1, 2, 5, 7])
def test_any_batch_size_and_rows_sum_to_one(kind, size: int) -> None:
    image, label = batch(size)
    mixed, target = mix_batch(image, label, kind, 0.4, 3, (size,))
    assert mixed.shape == image.shape
    assert target.shape == (size, 3)
    torch.testing.assert_close(target.sum(1), torch.ones(size))


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_several_labels_per_image(kind) -> None:
    image, _ = batch(4)
    label = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 1], [1, 0, 0]], dtype=torch.float32)
    _, target = mix_batch(image, label, kind, 1.0, 3, (3,))
    assert target.shape == (4, 3)
    assert ((target >= 0) & (target <= 1)).all()
    torch.testing.assert_close(target.sum(), label.sum(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_a_function_of_the_key_that_leaves_no_trace(kind) -> None:
    image, label = batch()
    copy = image.clone()
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    first = mix_batch(image, label, kind, 1.0, 3, (1, 2, 3))
    torch.testing.assert_close(torch.rand(3), expected)
    torch.manual_seed(999)
    again = mix_batch(image, label, kind, 1.0, 3, (1, 2, 3))
    other = mix_batch(image, label, kind, 1.0, 3, (1, 2, 4))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(image, copy)


def test_kinds_come_in_the_shares_asked_for() -> None:
    spec = AugmentSpec(mixup=0.3, cutmix=0.5)
    kinds = [draw_kind(spec, (0, i)) for i in range(4000)]
    for kind, share in (("mixup", 0.3), ("cutmix", 0.5), (None, 0.2)):
        assert np.mean([k == kind for k in kinds]) == pytest.approx(share, abs=0.025)
    assert {draw_kind(AugmentSpec(), (0, i)) for i in range(100)} == {None}
    assert {draw_kind(AugmentSpec(mixup=1.0), (0, i)) for i in range(100)} == {"mixup"}


def test_cutmix_of_masks_moves_pixels_and_their_classes_together():
    mask = torch.arange(4)[:, None, None].expand(4, 20, 30).contiguous()
    image = mask[:, None].float().expand(4, 2, 20, 30).contiguous()
    areas = []
    for key in range(30):
        mixed_image, mixed_mask = cutmix_masks(image, mask, 1.0, (7, key))
        assert torch.equal(mixed_image[:, 0].long(), mixed_mask)
        assert torch.equal(mixed_image[:, 0], mixed_image[:, 1])
        changed = mixed_mask != mask
        assert (mixed_mask[changed] == mask.roll(1, 0)[changed]).all()
        areas.append(changed[0].float().mean().item())
        rows, columns = changed[0].any(1).sum(), changed[0].any(0).sum()
        assert changed[0].sum() == rows * columns  # a rectangle
    assert torch.equal(mask[0], torch.zeros(20, 30, dtype=torch.int64))
    assert min(areas) < 0.1 < 0.5 < max(areas)
    again = cutmix_masks(image, mask, 1.0, (7, 3))[1]
    assert torch.equal(again, cutmix_masks(image, mask, 1.0, (7, 3))[1])
