import pytest
from timm.layers import DropPath

from r2kit.backbones._skeleton import StagePlan, drop_path_at, plan_stages
from r2kit.errors import ModelError


def test_stages_keep_their_strides_at_32() -> None:
    assert plan_stages((1, 2, 2, 2), 32) == [StagePlan(s, 1, 1, r) for s, r in ((1, 4), (2, 8), (2, 16), (2, 32))]


@pytest.mark.parametrize(
    ("strides", "output_stride", "expected"),
    [
        ((1, 2, 2, 2), 16, [(1, 1, 1, 4), (2, 1, 1, 8), (2, 1, 1, 16), (1, 2, 1, 16)]),
        ((1, 2, 2, 2), 8, [(1, 1, 1, 4), (2, 1, 1, 8), (1, 2, 1, 8), (1, 4, 2, 8)]),
        ((2, 2, 1, 2), 8, [(2, 1, 1, 8), (1, 2, 1, 8), (1, 2, 2, 8), (1, 4, 2, 8)]),
    ],
)
def test_strides_beyond_the_output_stride_become_dilations(
    strides: tuple[int, ...], output_stride: int, expected: list[tuple[int, ...]]
) -> None:
    assert plan_stages(strides, output_stride) == [StagePlan(*plan) for plan in expected]


def test_other_output_strides_are_refused() -> None:
    with pytest.raises(ModelError, match="output_stride must be 8, 16 or 32, got 64"):
        plan_stages((1, 2, 2, 2), 64)


def test_drop_path_rises_from_nothing_to_its_rate() -> None:
    assert drop_path_at(0, 5, 0.4) is None
    assert drop_path_at(3, 5, 0.0) is None
    middle, last = drop_path_at(2, 5, 0.4), drop_path_at(4, 5, 0.4)
    assert isinstance(middle, DropPath)
    assert isinstance(last, DropPath)
    assert (middle.drop_prob, last.drop_prob) == pytest.approx((0.2, 0.4))
    assert drop_path_at(0, 1, 0.4) is None
