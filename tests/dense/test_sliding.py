"""Images read in tiles."""

from itertools import pairwise

import pytest
import torch

from r2kit.dense.sliding import blend_window, sliding_logits, tile_starts


@pytest.mark.parametrize("length", [5, 8, 9, 15, 16, 17, 100])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_tiles_cover_a_side_and_overlap_enough(length, overlap):
    starts = tile_starts(length, 8, overlap)
    assert starts[0] == 0
    assert starts == sorted(set(starts))
    covered = {i for start in starts for i in range(start, start + 8)}
    assert covered >= set(range(length))
    if length > 8:
        assert starts[-1] == length - 8
        assert max(b - a for a, b in pairwise(starts)) <= 8 * (1 - overlap)


@pytest.mark.parametrize("shape", [(8, 8), (5, 20), (21, 13), (3, 3)])
def test_a_network_that_looks_at_single_pixels_sees_no_tiles(shape):
    torch.manual_seed(0)
    image = torch.randn(2, 3, *shape)
    network = torch.nn.Conv2d(3, 4, 1).eval()
    sizes = []

    def watched(tile):
        sizes.append(tuple(tile.shape[2:]))
        return network(tile)

    with torch.no_grad():
        found = sliding_logits(watched, image, (8, 8), 0.3, batch_size=3)
        assert torch.allclose(found, network(image), atol=1e-5)
    assert set(sizes) == {(8, 8)}


def test_seams_are_blended_and_the_number_of_tiles_at_once_does_not_matter():
    torch.manual_seed(0)
    image = torch.zeros(1, 1, 8, 24)
    network = lambda tile: torch.linspace(0, 1, 8).expand(len(tile), 1, 8, 8)  # noqa: E731  every tile from 0 to 1
    one, many = (sliding_logits(network, image, (8, 8), 0.5, batch_size=n)[0, 0, 4] for n in (1, 16))
    assert torch.allclose(one, many)
    hard = sliding_logits(network, image, (8, 8), 0.0)[0, 0, 4]
    assert one.diff().abs().max() < 0.6 * hard.diff().abs().max()
    assert blend_window((4, 6)).shape == (4, 6)
    assert (blend_window((4, 6)) > 0).all()
