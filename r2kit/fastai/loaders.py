"""The batches of a recipe in fastai's hands: its loaders over those of our DataModule.

The images are read, augmented and put into batches by `r2kit.data`, in its own processes: the same batches as with
Lightning, whose order and augmentation are functions of the seed and the number of the pass. fastai gets what it works
with: tuples, tensors of its own types, and the way back to pictures and class names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import MethodType
from typing import Any, NoReturn

import fastai.vision.core  # gives fastai's tensors their way of being shown
import numpy as np
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import Category, CategoryMap, MultiCategory, TensorMultiCategory
from fastai.torch_core import TensorCategory, TensorImage, TensorMask, to_device
from fastcore.foundation import L
from fasttransform import DisplayedTransform
from torch import Tensor

from r2kit.data.datamodule import DataModule
from r2kit.data.given import ReadGiven
from r2kit.data.loader import Loader
from r2kit.data.preprocess import Preprocess
from r2kit.errors import DataError, RunError, did_you_mean
from r2kit.inference import load_images

assert fastai.vision.core  # used by being imported

Sample = tuple[Any, ...]

_TYPES: dict[str, type[Tensor]] = {
    "classification": TensorCategory,
    "multilabel": TensorMultiCategory,
    "segmentation": TensorMask,
}
"""fastai's type of the target of each kind of task; what shows, decodes and interprets a batch is chosen by it."""

KINDS = tuple(_TYPES)
"""Kinds of task that fastai learners are made for."""


class Visible(DisplayedTransform):
    """Leaves batches as they are, and makes them visible on the way back.

    Args:
        preprocess: Normalisation of the images.
    """

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        self.preprocess = preprocess

    def decodes(self, image: TensorImage) -> TensorImage:
        """Return pictures (B, 3, H, W) in [0, 1] of normalised images (B, C, H, W)."""
        return TensorImage(self.preprocess.denormalize(image.as_subclass(Tensor)))


class _Images:
    """What both kinds of data sets share: the classes, and how a sample becomes readable."""

    n_inp = 1

    def __init__(self, data: DataModule, kind: str, items: Sequence[Any]) -> None:
        self.data, self.kind = data, kind
        self.items = L(items)
        self.vocab = CategoryMap(list(data.classes), sort=False)
        self.c = len(self.vocab)

    def __len__(self) -> int:
        return len(self.items)

    def decode(self, sample: Sample, full: bool = True) -> Sample:
        """Return a sample with names in place of the numbers of classes; `full` is there for fastai's calls."""
        return tuple(self._readable(value) for value in sample)

    def _readable(self, value: Any) -> Any:
        if isinstance(value, TensorMultiCategory):  # a TensorCategory, too
            return MultiCategory([name for name, held in zip(self.vocab, value.tolist(), strict=True) if held > 0.5])
        if isinstance(value, TensorCategory):
            return Category(self.vocab[int(value)])
        return value

    def new_empty(self) -> NoReturn:
        """Refuse what fastai's `Learner.export` asks for: a pickle with nothing of a recipe in it.

        Raises:
            RunError: Always.
        """
        raise RunError(
            "learn.export: a learner of a recipe or a run is kept as a run folder; use save_run(learn, 'runs/NAME')"
        )


class Rows(_Images):
    """Rows of the data of a recipe; an item is the id of its row.

    Args:
        data: Set up.
        kind: Of the task.
        rows: Rows of the manifest.
        train: Whether these are the training images, which a shuffling loader augments.
    """

    def __init__(self, data: DataModule, kind: str, rows: np.ndarray, *, train: bool = False) -> None:
        super().__init__(data, kind, data.source.manifest["id"].iloc[rows].tolist())
        self.rows, self.train = rows, train

    def __getitem__(self, position: int) -> Sample:
        """Return one image (C, H, W), normalised and not augmented, and its target."""
        ((image, target),) = self.batches(self.loader([position]))
        return image[0], target[0]

    def loader(self, positions: Sequence[int] | None) -> Loader:
        """Return our loader: of some positions in their order, or of the shuffled and augmented training images."""
        if positions is None:
            return self.data.train_dataloader()
        return self.data.loader(self.rows[list(positions)], train=False)

    def batches(self, loader: Loader) -> Iterator[Sample]:
        """Yield (image, target) in fastai's types."""
        key = "mask" if self.kind == "segmentation" else "label"
        for batch in loader:
            target = batch[key].as_subclass(_TYPES[self.kind])
            if self.kind == "segmentation":
                target.codes = list(self.vocab)  # what TensorMask.show asks for
            yield batch["image"].as_subclass(TensorImage), target


class Files(_Images):
    """Image files beside the data of a recipe, without targets.

    Args:
        data: Set up; its preprocessing is used.
        kind: Of the task.
        files: The files.
    """

    train = False

    def loader(self, positions: Sequence[int] | None) -> list[Path]:
        """Return the files at some positions."""
        assert positions is not None
        return [Path(self.items[position]) for position in positions]

    def batches(self, loader: list[Path]) -> Iterator[Sample]:
        """Yield (image,).

        Raises:
            DataError: If a file cannot be read.
        """
        preprocess = self.data.preprocess
        whole = self.kind == "segmentation" or bool(self.data.augment.transforms)
        read, size = ReadGiven(preprocess, whole=whole), self.data.batch_size
        for loaded in load_images(read, loader, lambda raw: (preprocess.apply(raw),), batch_size=size):
            if loaded.failed:
                raise DataError(loaded.failed[0][1])
            yield (loaded.tensors[0].as_subclass(TensorImage),)


class RecipeLoader(TfmdDL):
    """fastai's loader over ours.

    Training images, shuffled, are those of pass number `epoch`: the order and the augmentation that Lightning has in
    that epoch. Everything else comes in the order that fastai asks for, and not augmented.
    """

    epoch = 0
    _made: tuple[Any, Any] | None = None

    @property
    def trains(self) -> bool:
        """Whether this is the loader that is trained with: the training images, in an order of their own."""
        return self.dataset.train and self.shuffle and isinstance(self.get_idxs, MethodType)

    def __len__(self) -> int:
        if not self.trains:
            return int(super().__len__())
        return len(self._loader(None))

    def __iter__(self) -> Iterator[Sample]:
        self.before_iter()
        positions = None
        if not self.trains:
            self.randomize()
            positions = tuple(islice(self.get_idxs(), self.n))  # fastai's `unique` asks for the first image for ever
        loader = self._loader(positions)
        if positions is None:
            loader.sampler.set_epoch(self.epoch)
        for batch in self.dataset.batches(loader):
            yield self.after_batch(batch if self.device is None else to_device(batch, self.device))
        self.after_iter()

    def one_batch(self) -> Sample:
        """Return the first batch."""
        return next(iter(self))

    def _one_pass(self) -> None:
        """Learn the types of a batch from a real one; fastai would put one together itself."""
        batch = self.one_batch()
        self._n_inp = 1
        self._types = {tuple: [type(value) for value in batch]}

    def _loader(self, positions: tuple[int, ...] | None) -> Any:
        """Return our loader, kept as long as the positions are the same, and with it its processes."""
        if self._made is None or self._made[0] != positions:
            self._made = (positions, self.dataset.loader(positions))
        return self._made[1]


class RecipeLoaders(DataLoaders):
    """Training and validation images of a recipe."""

    def test_dl(
        self,
        test_items: Sequence[Any],
        rm_type_tfms: int | None = None,
        with_labels: bool = False,
        num_workers: int = 0,
        process: bool = True,
    ) -> RecipeLoader:
        """Return a loader of ids of the recipe's own images, which have targets, or of other image files.

        Args:
            test_items: Ids as in the manifest, of any split, or paths.
            rm_type_tfms, num_workers, process: What fastai's callers give; there is nothing for them to change.
            with_labels: Whether every item must have a target.

        Raises:
            DataError: If an item is neither an id nor a file, or has no target and must have one.
        """
        data, kind = self.valid_ds.data, self.valid_ds.kind
        row_of = {name: row for row, name in enumerate(data.source.manifest["id"])}
        items = [str(item) for item in test_items]
        if all(item in row_of for item in items):
            return self.valid.new(Rows(data, kind, np.array([row_of[item] for item in items])))
        for item in items:
            if not Path(item).is_file():
                raise DataError(f"{item}: neither a file nor an id of this data{did_you_mean(item, list(row_of))}")
        if with_labels:
            raise DataError(f"{items[0]}: is no id of this data, so it has no label; leave with_labels out")
        return self.valid.new(Files(data, kind, items))


def make_loaders(data: DataModule, kind: str, device: Any, path: Path) -> RecipeLoaders:
    """Return fastai's loaders of the training and validation images.

    Args:
        data: Set up.
        kind: Of the task, one of `KINDS`.
        device: Where batches go.
        path: Where fastai keeps its files.
    """
    visible = Visible(data.preprocess)
    train, valid = (
        RecipeLoader(
            Rows(data, kind, rows, train=train),
            bs=data.batch_size,
            shuffle=train,
            num_workers=0,  # ours are those of the recipe
            after_batch=[visible],
        )
        for rows, train in ((data.split.train, True), (data.split.val, False))
    )
    return RecipeLoaders(train, valid, path=path, device=device)
