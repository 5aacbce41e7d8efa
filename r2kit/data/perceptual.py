"""Perceptual hashes of images with any number of bands, and the search for near copies among them.

The hash is the signs of the 63 lowest non-constant coefficients of the image's cosine transform (Zauner 2010,
"Implementation and benchmarking of perceptual image hash functions", sec. 3.2, with the sign in place of the median).
With signs, mirroring an image only flips bits and transposing it only moves them, so that copies in any of the eight
orientations are found from one transform: overhead imagery is full of turned copies.
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy.fft import dctn

from r2kit.data.preprocess import missing_pixels

SIDE = 8
MAX_BITS = 8
"""Hashes further apart than this are not compared: copies by resizing and JPEG differ in fewer (see the tests)."""
MIN_COSINE = 0.985
"""Similarity of the coefficients themselves from which two images count as near copies."""
_CHUNKS = MAX_BITS + 1  # bits in more chunks than may differ: near hashes agree in one chunk at least
_WIDTH = (SIDE * SIDE - 1) // _CHUNKS  # bits of a chunk; the first bit of a hash, of the constant, is always 0
_AT_ONCE, _COSINES = 1 << 22, 1 << 16  # hashes, and coefficients, compared at once, for the sake of memory


def coefficients(raw: np.ndarray, nodata: float | None = None) -> np.ndarray | None:
    """Return the low frequencies of an image, each band brought to one range and all bands averaged.

    Args:
        raw: (H, W, C) raw pixels.
        nodata: Raw value that means "no measurement".

    Returns:
        (8, 8) float32 of length one with a zero in the corner, or None for an image without texture, which resembles
        every other such image.
    """
    missing = missing_pixels(raw, nodata)
    pixels = raw.astype(np.float32)
    if missing is not None and missing.any():
        pixels[missing] = np.nan
    finite = np.isfinite(pixels)
    if not finite.any():
        return None
    plane = np.zeros((32, 32), dtype=np.float64)
    for band in range(raw.shape[2]):
        values, good = pixels[..., band], finite[..., band]
        if not good.any():
            continue
        filled = np.where(good, values, values[good].mean(dtype=np.float64)).astype(np.float32)
        small = np.asarray(Image.fromarray(filled).resize((32, 32), Image.Resampling.BOX), dtype=np.float64)
        spread = small.std()
        if spread > 1e-6 * max(1.0, abs(small.mean())):
            plane += (small - small.mean()) / spread
    low = dctn(plane, norm="ortho")[:SIDE, :SIDE].astype(np.float32)
    low[0, 0] = 0.0
    length = float(np.linalg.norm(low))
    return None if length < 1e-3 else low / length


def orientations(low: np.ndarray) -> np.ndarray:
    """Return (8, 8, 8) coefficients of the eight orientations of an image from its (8, 8) `coefficients`."""
    sign = np.where(np.arange(SIDE) % 2 == 1, -1.0, 1.0).astype(low.dtype)
    both = [low, low.T]
    return np.stack([one * rows * columns for one in both for rows in (1.0, sign[:, None]) for columns in (1.0, sign)])


def near_copies(lows: np.ndarray) -> np.ndarray:
    """Find pairs of images that are copies of each other up to resizing, compression, light and orientation.

    Args:
        lows: (N, 8, 8) coefficients.

    Returns:
        (P, 2) positions, the lower first, ascending.
    """
    if len(lows) < 2:
        return np.empty((0, 2), dtype=np.int64)
    base = _bits(lows)  # (N,)
    turned = np.stack([orientations(low) for low in lows])  # (N, 8, 8, 8)
    queries = _bits(turned.reshape(-1, SIDE, SIDE))  # (8 N,)
    owner = np.repeat(np.arange(len(lows)), 8)
    found: list[np.ndarray] = []
    for chunk in range(_CHUNKS):
        mask = np.uint64((1 << _WIDTH) - 1) << np.uint64(1 + chunk * _WIDTH)
        order = np.argsort(base & mask, kind="stable")
        keys, starts = np.unique((base & mask)[order], return_index=True)
        ends = np.append(starts[1:], len(base))
        asked = np.argsort(queries & mask, kind="stable")
        places = np.searchsorted((queries & mask)[asked], keys, side="left")
        after = np.searchsorted((queries & mask)[asked], keys, side="right")
        for start, end, first, last in np.stack([starts, ends, places, after], axis=1).tolist():
            theirs = asked[first:last]
            step = max(1, _AT_ONCE // max(len(theirs), 1))
            for mine in (order[i : min(i + step, end)] for i in range(start, end, step)):
                near = np.argwhere(np.bitwise_count(base[mine][:, None] ^ queries[theirs][None]) <= MAX_BITS)
                pairs = np.stack([mine[near[:, 0]], owner[theirs[near[:, 1]]], theirs[near[:, 1]] % 8], axis=1)
                pairs = pairs[pairs[:, 0] < pairs[:, 1]]
                for some in (pairs[i : i + _COSINES] for i in range(0, len(pairs), _COSINES)):
                    cosine = np.einsum("nij,nij->n", lows[some[:, 0]], turned[some[:, 1], some[:, 2]])
                    found.append(some[cosine >= MIN_COSINE, :2])
    return np.unique(np.concatenate([np.empty((0, 2), dtype=np.int64), *found]), axis=0)


def _bits(lows: np.ndarray) -> np.ndarray:
    """(N,) uint64: the signs of (N, 8, 8) coefficients."""
    weights = np.left_shift(np.uint64(1), np.arange(SIDE * SIDE, dtype=np.uint64))
    return ((lows.reshape(len(lows), -1) > 0) * weights).sum(axis=1, dtype=np.uint64)
