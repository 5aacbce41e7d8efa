"""Samples, their order and their batches: every draw a pure function of (seed, epoch, row), in any process.

Kept apart from the Lightning DataModule so that a loader process that starts afresh need not import Lightning.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from r2kit.data.preprocess import Preprocess
from r2kit.data.sampling import draw_epoch
from r2kit.data.sources import Source
from r2kit.errors import DataError
from r2kit.recipe import AugmentSpec

if TYPE_CHECKING:
    from r2kit.data.transforms import Augment

Batch = dict[str, Tensor]
_TAG_ORDER, _TAG_AUGMENT = 3, 4  # keep the random numbers of the uses of one seed apart


class EpochSampler(Sampler[tuple[int, ...]]):
    """Yields (epoch, row): shuffled and shared out for training, in order for evaluation.

    Training: every process gets the same number of rows, all different; up to ``world`` rows of an epoch, others each
    time, are left out where they do not divide. A last batch of a single image, which BatchNorm refuses, is left out
    too. With `expected`, rows come again: the n-th time as (epoch, row, n). Evaluation: every process gets the same
    number of rows too, because DistributedDataParallel talks to the others in every forward pass and would wait for one
    that has none left; where the rows do not divide, the first ones come a second time, and whoever computes metrics
    counts a row once, by its `index`.

    Args:
        rows: Rows of the manifest.
        train: Whether to shuffle and share out evenly.
        seed: The recipe's seed.
        batch_size: Images of a batch in one process.
        rank: This process.
        world: Number of processes.
        expected: How often each of `rows` is drawn in an epoch of training, see `sampling`; None: once.

    Raises:
        DataError: If there are too few rows for training.
    """

    def __init__(
        self,
        rows: np.ndarray,
        *,
        train: bool,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        expected: np.ndarray | None = None,
    ) -> None:
        self.rows = np.asarray(rows, dtype=np.int64)
        self.expected = expected
        self.train = train
        self.seed = seed
        self.rank = rank
        self.world = world
        self.epoch = 0
        self._begun = (0, 0)  # an epoch, and how many of its rows this process has had already
        if train:
            self._length = len(self.rows) // world
            if self._length % batch_size == 1:
                self._length -= 1
            if self._length < 2:
                raise DataError(
                    f"{len(self.rows)} training image(s) are too few for {world} process(es); 2 each at least"
                )
        else:
            self._length = -(-len(self.rows) // world)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass; Lightning calls this by itself."""
        self.epoch = epoch

    def start_at(self, epoch: int, rows: int) -> None:
        """Leave out the first rows of one epoch: those that a run had before it was interrupted.

        Args:
            epoch: The epoch; others are not changed.
            rows: How many rows of this process to leave out.
        """
        self.epoch = epoch
        self._begun = (epoch, rows)

    def __len__(self) -> int:
        """Rows of a whole epoch."""
        return self._length

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        had = self._begun[1] if self.epoch == self._begun[0] else 0
        return iter(self.order(self.epoch)[had:])

    def order(self, epoch: int) -> list[tuple[int, ...]]:
        """Return what this process reads in an epoch: a pure function of the arguments and the epoch."""
        if not self.train:
            rows = np.resize(self.rows, self._length * self.world)  # repeats from the start
            return [(epoch, int(row)) for row in rows[self.rank :: self.world]]
        rng = np.random.default_rng([self.seed, _TAG_ORDER, epoch])
        if self.expected is None:
            drawn = rng.permutation(self.rows)
            return [(epoch, int(row)) for row in drawn[self.rank :: self.world][: self._length]]
        drawn = self.rows[draw_epoch(self.expected, rng)]
        again = pd.Series(drawn).groupby(drawn).cumcount().to_numpy()  # each copy is augmented in its own way
        pairs = zip(drawn.tolist(), again.tolist(), strict=True)
        keys: list[tuple[int, ...]] = [(epoch, row, copy) if copy else (epoch, row) for row, copy in pairs]
        return keys[self.rank :: self.world][: self._length]


class Samples(Dataset[dict[str, Any]]):
    """Reads, augments and resizes single images.

    Args:
        source: Where the images are.
        labels: The label of each row of the manifest: (N,) int64, or (N, K) float32 for several labels per image.
        preprocess: Size and normalisation.
        augment: What varies training images, or None for evaluation.
        seed: The recipe's seed.
    """

    target = "class"
    """What follows the image through augmentation."""

    def __init__(
        self, source: Source, labels: np.ndarray, preprocess: Preprocess, augment: AugmentSpec | None, seed: int
    ) -> None:
        self.source = source
        self.labels = labels
        self.preprocess = preprocess
        self.augment = augment
        self.seed = seed
        self._augment: Augment | None = None  # made on first use: a loader process that starts afresh makes its own

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, ...]) -> dict[str, Any]:
        """Return raw-unit `image` (C, h, w), `label` and `index` of a key of the sampler."""
        epoch, row, *copy = key
        raw = self.source.read(row)
        if self.augment is not None:
            raw = self.augmentation(raw, (self.seed, _TAG_AUGMENT, epoch, row, *copy))
        try:
            image = self.preprocess.fit(raw)
        except DataError as error:
            raise DataError(f"{self.source.manifest['path'].iloc[row]}: {error}") from error
        return {"image": image, "label": self.labels[row], "index": row}

    @property
    def augmentation(self) -> Augment:
        """What the recipe's augmentation does to images like these."""
        if self._augment is None:
            from r2kit.data.transforms import Augment  # albumentations takes seconds to import

            self._augment = Augment.of(self.augment or AugmentSpec(preset="none"), self.preprocess, self.target)
        return self._augment

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """Stack what `__getitem__` gave, see `Collate`."""
        return Collate(self.preprocess)(samples)


class Collate:
    """Normalises samples and stacks them.

    Args:
        preprocess: Normalisation.
    """

    def __init__(self, preprocess: Preprocess) -> None:
        self.preprocess = preprocess

    def __call__(self, samples: list[dict[str, Any]]) -> Batch:
        """Return `image` float32 (B, C, H, W) normalised, `label` (B,) int64 or (B, K) float32, `index` int64 (B,)."""
        return {
            # One by one while they are in the processor's cache; a worker process stacks into memory that both share.
            "image": default_collate([self.preprocess.normalize(sample["image"][None])[0] for sample in samples]),
            "label": torch.from_numpy(np.stack([sample["label"] for sample in samples])),
            "index": torch.tensor([sample["index"] for sample in samples], dtype=torch.int64),
        }


def fill_batch(batch: dict[str, Any], size: int) -> dict[str, Any]:
    """Return a batch of a validation with its images repeated up to a size.

    A network's kernels depend on the shape of the batch, and with them the last bits of the result. Where all batches
    have one shape, what comes out for an image depends neither on how many others are left for the last batch nor on
    the number of processes. Whoever computes metrics counts a row once, by its `index`.

    Args:
        batch: Tensors (B, ...) and lists of B.
        size: Images of a full batch.
    """
    given = len(batch["index"])
    if given >= size:
        return batch
    again = [position % given for position in range(size)]
    return {
        key: value[again] if isinstance(value, Tensor) else [value[position] for position in again]
        for key, value in batch.items()
    }


class Loader(DataLoader[dict[str, Any]]):
    """A DataLoader whose `DataError` stays one line when it happened in a loader process."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except DataError as error:  # torch puts the traceback of the process into the message
                line = str(error).strip().splitlines()[-1]
                raise DataError(line.removeprefix(f"{DataError.__module__}.DataError: ")) from None
            yield batch


def make_loader(
    samples: Samples, sampler: EpochSampler, *, batch_size: int, workers: int, start_method: str | None
) -> Loader:
    """Build the loader of one part.

    Args:
        samples: The images.
        sampler: Their order.
        batch_size: Images of a batch.
        workers: Loader processes; 0 loads in this one.
        start_method: How they start; None for the platform's default.
    """
    context = multiprocessing.get_context(start_method) if workers else None
    if start_method == "forkserver":  # the server imports torch once, and its children have it
        multiprocessing.set_forkserver_preload(["__main__", __name__, "r2kit.data.transforms"])
    return Loader(
        samples,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=samples.collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker if workers else None,
        multiprocessing_context=context,
    )


def _start_worker(worker: int) -> None:
    """One thread per loader process: the processes already use all cores.

    A signal to stop is for the process that trains, and reaches this one too when it is sent to the group, as Ctrl-C
    is. SIGTERM is left alone: with it the process that trains ends this one.
    """
    torch.set_num_threads(1)
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(0)
