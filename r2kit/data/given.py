"""Image files given to a trained network, read as the images were that it learned from, or refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from r2kit.data.preprocess import Preprocess
from r2kit.data.reader import examine_image
from r2kit.errors import DataError


@dataclass(frozen=True)
class ReadGiven:
    """Reads a file with the bands of a run; picklable for loader processes.

    Args:
        preprocess: The run's.
        whole: Whether every pixel is wanted, as for answers that lie in the pixels of the image; else a JPEG much
            larger than the network's input is decoded smaller.
        max_bytes: Largest decoded size; None for the reader's own limit.
    """

    preprocess: Preprocess
    whole: bool
    max_bytes: int | None = None

    def __call__(self, path: Path) -> NDArray[Any]:
        """Return raw pixels (H, W, C).

        What the file declares as "no measurement" is NaN where the run does not know that value.

        Raises:
            DataError: If the file cannot be read, lacks a band, or is of another pixel type than the run's images.
        """
        preprocess = self.preprocess
        network = None if self.whole else preprocess.size
        info, raw = examine_image(path, bands=preprocess.bands, network=network, place=False, max_bytes=self.max_bytes)
        if raw.shape[-1] != len(preprocess.bands):
            raise DataError(
                f"{path}: has {raw.shape[-1]} bands, the run was trained with {', '.join(preprocess.bands)}"
            )
        if info.scale != preprocess.scale:
            raise DataError(
                f"{path}: pixels of type {info.dtype} are divided by {info.scale:g}, and in the run by "
                f"{preprocess.scale:g}; the file is of another pixel type than the run's images"
            )
        if info.nodata is None or info.nodata == preprocess.nodata:
            return raw
        missing = raw == info.nodata
        return np.where(missing, np.float32(np.nan), raw) if missing.any() else raw
