"""Images made of several: mosaic and copy-paste, for boxes and the outlines of objects.

Both take raw pixels at their own scale, and draw from the generator that is given: the result is a pure function of the
images and the generator's state.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from r2kit.data.placement import Window, box_area, cut_boxes
from r2kit.data.targets import BoxTarget

Sample = tuple[NDArray, BoxTarget]
"""Raw pixels (H, W, C), and the objects on them."""

_TRIES = 8  # places that are tried for one pasted object
_MOST = 10  # objects that are pasted into one image


def mosaic(samples: Sequence[Sample], fill: NDArray, min_visible: float, rng: np.random.Generator) -> Sample:
    """Put windows of four images together into one of the first one's size.

    The four meet at a point in the middle third of either side; each contributes a window at its own scale, from a
    place drawn at random. Where an image is smaller than its window the rest is filled.

    Args:
        samples: Four.
        fill: (C,) raw values of what is filled.
        min_visible: A box of which less than this share lies in its window is left out.
        rng: Where everything is drawn from.

    Source: Bochkovskiy et al. 2020, arXiv:2004.10934, sec. 3.4; without its change of scale, because the size of an
        object seen from above is what tells it from others.
    """
    first = samples[0][0]
    height, width = first.shape[:2]
    y, x = int(height * rng.uniform(1 / 3, 2 / 3)), int(width * rng.uniform(1 / 3, 2 / 3))
    quarters: list[Window] = [
        (0, 0, y, x),
        (0, x, y, width - x),
        (y, 0, height - y, x),
        (y, x, height - y, width - x),
    ]
    canvas = np.empty_like(first)
    canvas[:] = fill.astype(first.dtype)
    parts: list[BoxTarget] = []
    for (image, target), (top, left, high, wide) in zip(samples, quarters, strict=True):
        h, w = min(high, image.shape[0]), min(wide, image.shape[1])
        from_top, from_left = (int(rng.integers(0, n + 1)) for n in (image.shape[0] - h, image.shape[1] - w))
        window = (from_top, from_left, h, w)
        canvas[top : top + h, left : left + w] = image[from_top : from_top + h, from_left : from_left + w]
        parts.append(_placed(target, window, (top, left), (height, width), min_visible))
    return canvas, BoxTarget.join(parts)


def copy_paste(sample: Sample, donor: Sample, rng: np.random.Generator) -> Sample:
    """Paste objects of another image, each at a place where it hides none.

    With outlines only the object's own pixels are pasted, else its whole box. Up to ten of the donor's objects, each
    with probability one half; one that finds no free place in a few tries, or is a crowd, stays away.

    Args:
        sample: The image that objects are pasted into; not changed.
        donor: Where they come from; of the same bands and type.
        rng: Where everything is drawn from.

    Source: Ghiasi et al. 2021, arXiv:2012.07177, without its change of scale and without hiding.
    """
    image, target = sample
    height, width = image.shape[:2]
    pasted, added = image.copy(), [target]
    taken = target.boxes
    chosen = np.flatnonzero((rng.random(len(donor[1].boxes)) < 0.5) & ~donor[1].crowd)
    for index in rng.permutation(chosen)[:_MOST]:
        x0, y0, x1, y1 = _outer(donor[1].boxes[index], donor[0].shape)
        if x1 - x0 > width or y1 - y0 > height:
            continue
        for _ in range(_TRIES):
            left, top = int(rng.integers(0, width - (x1 - x0) + 1)), int(rng.integers(0, height - (y1 - y0) + 1))
            place = np.array([left, top, left + x1 - x0, top + y1 - y0], dtype=np.float32)
            if _free(place, taken):
                break
        else:
            continue
        taken = np.concatenate([taken, place[None]])
        shown = (slice(top, top + y1 - y0), slice(left, left + x1 - x0))
        patch = donor[0][y0:y1, x0:x1]
        masks = None
        if donor[1].masks is None or target.masks is None:
            pasted[shown] = patch
        else:
            outline = donor[1].masks[index, y0:y1, x0:x1]
            pasted[shown] = np.where(outline[..., None], patch, pasted[shown])
            masks = np.zeros((1, height, width), dtype=bool)
            masks[0][shown] = outline
        shift = np.array([left - x0, top - y0] * 2, dtype=np.float32)
        added.append(
            BoxTarget(
                donor[1].boxes[index : index + 1] + shift,
                donor[1].labels[index : index + 1],
                np.zeros(1, dtype=bool),
                masks,
            )
        )
    return pasted, BoxTarget.join(added)


def _placed(
    target: BoxTarget, window: Window, corner: tuple[int, int], shape: tuple[int, int], min_visible: float
) -> BoxTarget:
    """The objects of a window, moved to a corner (top, left) of an image of another shape."""
    boxes, kept = cut_boxes(target.boxes, window, min_visible)
    top, left, height, width = window
    masks = None
    if target.masks is not None:
        masks = np.zeros((len(kept), *shape), dtype=bool)
        part = target.masks[kept, top : top + height, left : left + width]
        masks[:, corner[0] : corner[0] + height, corner[1] : corner[1] + width] = part
    shift = np.array([corner[1], corner[0]] * 2, dtype=np.float32)
    return BoxTarget(boxes + shift, target.labels[kept], target.crowd[kept], masks)


def _outer(box: NDArray[np.float32], shape: Sequence[int]) -> tuple[int, int, int, int]:
    """The whole pixels that a box touches."""
    x0, y0 = (int(value) for value in np.floor(box[:2]))
    x1, y1 = (int(value) for value in np.ceil(box[2:]))
    return max(x0, 0), max(y0, 0), min(x1, shape[1]), min(y1, shape[0])


def _free(place: NDArray[np.float32], taken: NDArray[np.float32]) -> bool:
    """Whether a place touches none of the boxes (N, 4)."""
    both = np.concatenate([np.maximum(place[:2], taken[:, :2]), np.minimum(place[2:], taken[:, 2:])], axis=1)
    return not box_area(both.astype(np.float32)).any()
