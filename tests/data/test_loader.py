from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from r2kit.data.bluemarble import BlueMarble
from r2kit.data.folder import ImageFolder
from r2kit.data.loader import Collate, EpochSampler, Samples, fill_batch, make_loader
from r2kit.data.preprocess import Preprocess
from r2kit.errors import DataError
from r2kit.recipe import AugmentSpec

AUGMENT = AugmentSpec()
ROWS = np.arange(100, 123)


def sampler(train: bool = True, batch_size: int = 4, rank: int = 0, world: int = 1, rows=ROWS) -> EpochSampler:
    return EpochSampler(rows, train=train, seed=5, batch_size=batch_size, rank=rank, world=world)


def drawn(one: EpochSampler, epoch: int = 0) -> list[int]:
    one.set_epoch(epoch)
    pairs = list(one)
    assert [e for e, _ in pairs] == [epoch] * len(one)
    return [row for _, row in pairs]


def test_training_order_is_a_function_of_seed_and_epoch() -> None:
    one, two = sampler(), sampler()
    assert drawn(one, 3) == drawn(two, 3)
    assert drawn(one, 0) != drawn(one, 1)
    assert drawn(one, 0) == drawn(one, 0)
    assert sorted(drawn(one)) == list(ROWS)
    assert drawn(one) != list(ROWS)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_training_shares_are_equal_and_disjoint(world: int) -> None:
    shares = [drawn(sampler(rank=rank, world=world)) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    together = list(chain(*shares))
    assert len(set(together)) == len(together)
    assert len(together) > len(ROWS) - 2 * world


def test_the_steps_of_two_processes_are_those_of_one_with_twice_the_batch() -> None:
    whole = drawn(sampler(batch_size=8))
    halves = [drawn(sampler(batch_size=4, rank=rank, world=2)) for rank in range(2)]
    for step in range(2):
        assert set(whole[8 * step : 8 * step + 8]) == {r for half in halves for r in half[4 * step : 4 * step + 4]}


@pytest.mark.parametrize("world", [1, 2, 3, 30])
def test_evaluation_visits_every_row_and_keeps_the_processes_in_step(world: int) -> None:
    shares = [drawn(sampler(train=False, rank=rank, world=world)) for rank in range(world)]
    assert {len(share) for share in shares} == {-(-len(ROWS) // world)}
    assert len(sampler(train=False, rank=world - 1, world=world)) == len(shares[0])
    together = list(chain(*shares))
    assert set(together) == set(ROWS)
    assert len(together) - len(ROWS) < world  # repeated so that no process runs out before the others
    if world == 1:
        assert together == list(ROWS)


def test_no_training_batch_of_a_single_image() -> None:
    lengths = {size: len(sampler(rows=np.arange(size))) for size in (8, 9, 10)}  # batches of 4
    assert lengths == {8: 8, 9: 8, 10: 10}
    left_out = [set(range(9)) - set(drawn(sampler(rows=np.arange(9)), epoch)) for epoch in range(8)]
    assert len(set(map(frozenset, left_out))) > 1


@pytest.mark.parametrize(("count", "world"), [(0, 1), (1, 1), (3, 2)])
def test_too_few_images_to_train(count: int, world: int) -> None:
    with pytest.raises(DataError, match=rf"{count} training image\(s\) are too few for {world} process"):
        sampler(rows=np.arange(count), world=world)


def preprocess(classes: tuple[str, ...] = ("a", "b"), size: int = 16) -> Preprocess:
    half = (0.5, 0.5, 0.5)
    return Preprocess(("red", "green", "blue"), half, half, 255.0, (size, size), "squash", "bilinear", classes)


def batches(
    source, workers: int, start_method: str | None, epochs: int = 2, train: bool = True, augment=AUGMENT
) -> list[dict]:
    labels = source.manifest["label"].to_numpy()
    samples = Samples(source, labels, preprocess(source.classes), augment if train else None, seed=5)
    order = EpochSampler(np.arange(0, 24), train=train, seed=5, batch_size=5)
    loader = make_loader(samples, order, batch_size=5, workers=workers, start_method=start_method)
    result = []
    for epoch in range(epochs):
        order.set_epoch(epoch)
        result += list(loader)
    return result


def test_a_batch_is_what_it_should_be(tiles: BlueMarble) -> None:
    got = batches(tiles, 0, None, epochs=1, train=False)
    assert [len(batch["label"]) for batch in got] == [5, 5, 5, 5, 4]
    batch = got[1]
    assert batch["image"].dtype == torch.float32
    assert batch["image"].shape == (5, 3, 16, 16)
    assert batch["label"].dtype == batch["index"].dtype == torch.int64
    assert batch["index"].tolist() == [5, 6, 7, 8, 9]
    assert batch["label"].tolist() == tiles.manifest["label"][5:10].tolist()
    torch.testing.assert_close(batch["image"][0], preprocess(tiles.classes).apply(tiles.read(5)), rtol=0, atol=0)


@pytest.mark.parametrize(("workers", "start_method"), [(1, "fork"), (2, "fork"), (1, "spawn"), (2, "forkserver")])
def test_any_number_of_processes_gives_the_same_batches(tiles: BlueMarble, workers: int, start_method: str) -> None:
    noise = AugmentSpec(transforms=({"name": "GaussNoise"}, {"name": "CoarseDropout"}, {"name": "Affine", "p": 0.9}))
    expected = batches(tiles, 0, None, augment=noise)
    got = batches(tiles, workers, start_method, augment=noise)
    images = torch.cat([batch["image"] for batch in expected])
    assert len({image.numpy().tobytes() for image in images}) == len(images)  # each draw is another one
    assert len(got) == len(expected) == 10
    for one, other in zip(got, expected, strict=True):
        for key in ("image", "label", "index"):
            assert torch.equal(one[key], other[key])


def test_an_image_is_varied_anew_in_each_epoch_and_never_in_evaluation(tiles: BlueMarble) -> None:
    def by_row(got: list[dict]) -> dict[int, torch.Tensor]:
        return {int(i): image for batch in got for i, image in zip(batch["index"], batch["image"], strict=True)}

    everything = batches(tiles, 0, None)
    first, second = by_row(everything[:5]), by_row(everything[5:])
    textured = [row for row in first if tiles.read(row).std() > 10]
    changed = sum(not torch.equal(first[row], second[row]) for row in textured)
    assert changed > 0.9 * len(textured) > 3
    still = batches(tiles, 0, None, train=False)
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(still[:5], still[5:], strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_breaks_later_is_one_clear_line(make_folder: Callable[..., Path], workers: int) -> None:
    root = make_folder({"a": 12, "b": 12})
    source = ImageFolder(root)
    (root / "b" / "003.png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        batches(source, workers, "fork", train=False)
    assert str(caught.value) == f"{root}/b/003.png: is empty (0 bytes)"


def test_a_file_with_other_bands_later_is_named(make_folder: Callable[..., Path]) -> None:
    source = ImageFolder(make_folder({"a": 12, "b": 12}))
    source.read = lambda row: np.zeros((4, 4, 4), dtype=np.uint8)  # type: ignore[method-assign]
    with pytest.raises(DataError, match=r"a/000\.png: image with 4 bands, expected 3"):
        batches(source, 0, None, train=False)


def test_a_batch_is_filled_up_with_its_own_images():
    batch = {"image": torch.arange(3.0)[:, None], "index": torch.tensor([7, 8, 9]), "boxes": ["a", "b", "c"]}
    full = fill_batch(batch, 5)
    assert full["index"].tolist() == [7, 8, 9, 7, 8]
    assert full["image"][:, 0].tolist() == [0.0, 1.0, 2.0, 0.0, 1.0]
    assert full["boxes"] == ["a", "b", "c", "a", "b"]
    assert fill_batch(batch, 3) is batch


def test_an_interrupted_epoch_leaves_out_what_it_had():
    sampler = EpochSampler(np.arange(20), train=True, seed=1, batch_size=4)
    sampler.set_epoch(2)
    whole = list(sampler)
    other = EpochSampler(np.arange(20), train=True, seed=1, batch_size=4)
    other.start_at(2, 8)
    assert list(other) == whole[8:]
    assert len(other) == 20  # Lightning counts from the start of the epoch
    other.set_epoch(2)
    assert list(other) == whole[8:]
    other.set_epoch(3)
    assert len(list(other)) == 20


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_batch_is_the_normalised_stack_bit_for_bit(dtype: torch.dtype) -> None:
    preprocess = Preprocess(("a", "b"), (0.3, 0.6), (0.21, 0.17), 255.0, (4, 5), "squash", "bilinear", ("x", "y"))
    images = torch.randint(0, 256, (6, 2, 4, 5), generator=torch.Generator().manual_seed(0)).to(dtype)
    given = images.clone()
    samples = [{"image": image, "label": np.int64(0), "index": row} for row, image in enumerate(images)]
    batch = Collate(preprocess)(samples)
    assert torch.equal(batch["image"], preprocess.normalize(images))
    assert batch["image"].is_contiguous()
    assert torch.equal(images, given)  # a source may hold them
