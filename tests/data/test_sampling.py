import numpy as np
import pytest

from r2kit.data.loader import EpochSampler
from r2kit.data.sampling import draw_epoch, expected_draws
from r2kit.recipe_file import load_recipe

LABELS = np.repeat([0, 1, 2, 3], [160, 40, 9, 1])


@pytest.mark.parametrize(
    ("kind", "share"),
    [
        ("shuffle", [160, 40, 9, 1]),
        ("square_root", np.sqrt([160, 40, 9, 1])),
        ("balanced", [1, 1, 1, 1]),
    ],
)
def test_classes_are_drawn_in_the_shares_that_were_asked_for(kind: str, share: list[float]) -> None:
    expected = expected_draws(LABELS, kind)
    assert expected.sum() == pytest.approx(210)
    wanted = 210 * np.asarray(share) / np.sum(share)
    np.testing.assert_allclose(np.bincount(LABELS, expected), wanted)
    for seed in range(5):
        drawn = draw_epoch(expected, np.random.default_rng(seed))
        assert len(drawn) == 210
        assert np.abs(np.bincount(LABELS[drawn], minlength=4) - wanted).max() <= 1
        times = np.bincount(drawn, minlength=210)
        assert ((times == np.floor(expected + 1e-9)) | (times == np.floor(expected + 1e-9) + 1)).all()


def test_every_image_comes_as_often_as_expected_over_many_epochs() -> None:
    expected = expected_draws(LABELS, "balanced")
    times = np.mean([np.bincount(draw_epoch(expected, np.random.default_rng(e)), minlength=210) for e in range(800)], 0)
    np.testing.assert_allclose(times, expected, atol=0.09)  # 5 standard deviations of a coin thrown 800 times


def test_classes_of_equal_size_give_each_image_once() -> None:
    labels = np.tile([0, 1, 2], 7)
    assert sorted(draw_epoch(expected_draws(labels, "balanced"), np.random.default_rng(0))) == list(range(21))


def test_an_image_with_several_labels_is_drawn_as_its_rarest_one_asks() -> None:
    labels = np.zeros((100, 3), dtype=np.float32)
    labels[:60, 0] = 1
    labels[50:70, 1] = 1  # ten images have both
    labels[69, 2] = 1
    expected = expected_draws(labels, "balanced")
    ratio = expected / expected[0]
    np.testing.assert_allclose(ratio[[0, 55, 65, 69]], [1, 3, 3, 60], rtol=1e-6)
    np.testing.assert_allclose(ratio[70:], 1.0)  # no label at all
    assert expected.sum() == pytest.approx(100)


def test_the_order_is_a_function_of_seed_and_epoch_and_is_shared_out() -> None:
    rows = np.arange(1000, 1210)
    expected = expected_draws(LABELS, "balanced")

    def order(epoch: int, rank: int = 0, world: int = 1) -> list[tuple[int, ...]]:
        sampler = EpochSampler(rows, train=True, seed=3, batch_size=4, rank=rank, world=world, expected=expected)
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert len(keys) == len(sampler)
        return keys

    assert order(2) == order(2)
    assert order(2) != order(3)
    whole = order(0)
    assert len(set(whole)) == len(whole)  # an image that comes again has a number, and is augmented anew
    assert {key[0] for key in whole} == {0}
    assert sorted(key[2] for key in whole if key[1] == 1209 and len(key) == 3) == list(range(1, 52))
    shares = [order(0, rank, 3) for rank in range(3)]
    assert [len(share) for share in shares] == [70, 70, 70]
    assert [key for keys in zip(*shares, strict=True) for key in keys] == whole


def test_recipes_in_which_one_thing_undoes_another_are_refused() -> None:
    for override, message in (
        (["task.loss=focal", "augment.mixup=0.5"], "task.loss: focal is for images of one class"),
        (["task.class_weights=effective_number", "data.sampler=balanced"], "task.class_weights: data.sampler=balanced"),
        (["task.focal_gamma=3.0"], "task.focal_gamma: 3 has no effect with loss=cross_entropy; set loss=focal too"),
        (["task.class_weights_beta=0.9"], "class_weights_beta: 0.9 has no effect with class_weights=none"),
    ):
        with pytest.raises(Exception, match=message):
            load_recipe({}, override)
    assert load_recipe({}, ["task.loss=focal", "task.focal_gamma=3.0"]).task.focal_gamma == 3.0
