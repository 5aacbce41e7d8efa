"""Where tiles lie and how they blend, against a slow sum over the whole scene."""

from itertools import pairwise

import numpy as np
import pytest

from r2kit.maps.tiling import Blend, Grid, hann, starts


@pytest.mark.parametrize(
    ("length", "tile", "overlap"), [(99, 32, 8), (32, 32, 8), (20, 32, 0), (65, 32, 24), (97, 16, 0)]
)
def test_tiles_cover_a_side_and_end_with_it(length, tile, overlap):
    found = starts(length, tile, overlap)
    covered = np.zeros(max(length, tile), int)
    for start in found:
        covered[start : start + tile] += 1
    assert covered[:length].min() >= 1
    assert found == sorted(set(found))
    assert found[-1] + tile == max(length, tile)
    assert all(b - a <= tile - overlap for a, b in pairwise(found))


def test_weights_are_highest_in_the_middle_and_never_zero():
    weights = hann((8, 6))
    assert weights.min() > 0
    assert weights.argmax() in (3 * 6 + 2, 3 * 6 + 3, 4 * 6 + 2, 4 * 6 + 3)
    np.testing.assert_allclose(weights, weights[::-1, ::-1])


@pytest.mark.parametrize("budget", [1, 10**9])
def test_blending_in_parts_is_the_weighted_mean(budget):
    rng = np.random.default_rng(0)
    grid = Grid((50, 70), (16, 16), 6)
    weights = hann((16, 16))
    values = {(t, x): rng.random((3, 16, 16), dtype=np.float32) for t in grid.tops for x in grid.lefts}
    sums, total = np.zeros((3, 50, 70)), np.zeros((50, 70))
    for (t, x), v in values.items():
        sums[:, t : t + 16, x : x + 16] += v * weights
        total[t : t + 16, x : x + 16] += weights
    bands = grid.bands(3, budget)
    assert bands[0][0] == 0
    assert bands[-1][1] == 70
    assert (len(bands) > 1) == (budget == 1)
    got = np.zeros((3, 50, 70))
    for columns in bands:
        blend = Blend(3, 16, columns)
        for row, top in enumerate(grid.tops):
            for x in grid.lefts:
                if x < columns[1] and x + 16 > columns[0]:
                    blend.add(values[top, x], weights, x)
            bottom = grid.tops[row + 1] if row + 1 < len(grid.tops) else 50
            got[:, top:bottom, columns[0] : columns[1]] = blend.take(bottom - top)
    np.testing.assert_allclose(got, sums / total, rtol=1e-5)


def test_a_pixel_without_a_tile_is_nan():
    assert np.isnan(Blend(2, 4, (0, 4)).take(2)).all()
