"""The Lightning DataModule: from the data part of a recipe to batches on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import lightning
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from r2kit.data.boxes.samples import BoxSamples
from r2kit.data.boxes.source import BoxedImages
from r2kit.data.dense import MaskSamples
from r2kit.data.leaks import find_leaks, near_copies_between_parts, without_leaks
from r2kit.data.loader import Batch, EpochSampler, Loader, Samples, fill_batch, make_loader
from r2kit.data.mix import cutmix_masks, draw_kind, mix_batch
from r2kit.data.preprocess import Preprocess
from r2kit.data.resize import resize_batch, scaled_size
from r2kit.data.sampling import expected_draws, images_of_class
from r2kit.data.sources import DenseSource, Source, loader_workers, open_source
from r2kit.data.splits import PARTS, Split, make_split
from r2kit.data.statistics import band_statistics, check_fit
from r2kit.data.stratify import membership
from r2kit.data.tiles import tile_windows
from r2kit.errors import DataError, did_you_mean
from r2kit.recipe import AugmentSpec, DataSpec, Target

_TAG_MIX = 5


class DataModule(lightning.LightningDataModule):
    """Opens the data, splits it, measures it, and serves batches.

    The trainer must be built with ``use_distributed_sampler=False``: the samplers here share the images out over the
    processes themselves. Between `setup` and the first loader, `preprocess` may be
    replaced, for example by ``preprocess.with_stats(...)`` of pretrained weights.

    Args:
        spec: The `data` part of a recipe.
        augment: The `augment` part of a recipe.
        seed: The recipe's seed.
        batch_size: Images of a batch in one process.
        preprocess: That of a run, for using its model on data; None makes one from the data.
        split_file: A split to use instead of making one, as `Split.save` wrote it.
        all_test: Put every image into the test part: for evaluating on other data than the run was trained on.
        target: What every image must carry for the task, see `Recipe.target`.
        opened: The source of `spec`, where this process has it open; None opens it.
    """

    source: Source
    split: Split
    preprocess: Preprocess

    def __init__(
        self,
        spec: DataSpec,
        augment: AugmentSpec,
        *,
        seed: int,
        batch_size: int,
        preprocess: Preprocess | None = None,
        split_file: Path | None = None,
        all_test: bool = False,
        target: Target = "class",
        opened: Source | None = None,
    ) -> None:
        super().__init__()
        if split_file is not None and all_test:
            raise ValueError("split_file and all_test exclude each other")
        self.spec = spec
        self.augment = augment
        self.seed = seed
        self.batch_size = batch_size
        self.size_share: Callable[[int], float] | None = None  # of the image size, by epoch: for images that grow
        self.time_share = 0.0  # of a time limit, as far as it is used up
        self._given_preprocess = preprocess
        self._split_file = split_file
        self._all_test = all_test
        self._opened = opened
        self.target = target
        self._ready = False
        self._begun = (0, 0)
        self._statistics: pd.DataFrame | None = None

    def setup(self, stage: str | None = None) -> None:
        """Open the source, split it and settle the preprocessing; later calls do nothing.

        Raises:
            DataError: If the data cannot be used, or does not fit the given preprocessing.
            MissingExtraError: If the source needs packages that are not installed.
        """
        if self._ready:
            return
        # Listed transforms count in pixels of the file: windows, blurs and holes of an image that was decoded smaller
        # would be of another scale, and differ between JPEG and PNG.
        whole = bool(self.augment.transforms)
        self.source = open_source(self.spec, self.target, whole=whole) if self._opened is None else self._opened
        if self._given_preprocess is not None:
            self._check_bands(self._given_preprocess)
        self.labels = self._labels()
        self.split = self._make_split()
        if self._given_preprocess is not None:
            self.preprocess = self._given_preprocess
        else:
            statistics = self.band_statistics()
            self.preprocess = Preprocess(
                bands=self.source.bands,
                mean=tuple(float(value) / self.source.scale for value in statistics["mean"]),
                std=tuple(float(value) / self.source.scale for value in statistics["std"]),
                scale=self.source.scale,
                size=self.spec.size,
                resize=self.spec.resize,
                interpolation="bilinear",
                classes=self.source.classes,
                nodata=self.source.nodata,
            )
            if self.augment.transforms:  # wrong ones stop here, not in a loader process
                from r2kit.data.transforms import Augment

                Augment.of(self.augment, self.preprocess, self.target)
        self._ready = True

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the labels that the batches carry."""
        return self._given_preprocess.classes if self._given_preprocess is not None else self.source.classes

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(path, reason) of each image that was left out."""
        return self.source.skipped

    def counts(self) -> pd.DataFrame:
        """Images per class (rows, in the order of the classes) and part (columns train, val, test).

        One row for all images where these have no class; an image with several labels counts for each of them.
        """
        names = self.strata
        table = {part: images_of_class(self.labels[self.split.rows(part)], len(names)) for part in PARTS}
        return pd.DataFrame(table, index=pd.Index(names, name="class"))

    @property
    def strata(self) -> tuple[str, ...]:
        """Names that the labels are positions in: the classes, or one name where an image has no single class."""
        return self.classes if self.source.strata == self.source.classes else self.source.strata

    @property
    def remapped(self) -> np.ndarray | None:
        """(K,) the run's position of each class of the source; None where they are the same."""
        return None if self.source.classes == self.classes else self.positions

    def pixel_shares(self) -> pd.DataFrame:
        """Share of the labelled pixels of each class (rows) in each part (columns); for masks."""
        pixels = cast(DenseSource, self.source).pixels
        shares = {}
        for part in PARTS:
            count = np.zeros(len(self.classes))
            count[self.positions] = pixels[self.split.rows(part)].sum(axis=0)
            shares[part] = count / max(count.sum(), 1.0)
        return pd.DataFrame(shares, index=pd.Index(self.classes, name="class"))

    @property
    def original_size(self) -> tuple[int, int]:
        """(H, W) of the training images as they are read, in pixels; the most frequent where they differ."""
        rows = self.split.train if len(self.split.train) else np.concatenate([self.split.val, self.split.test])
        if self.source.contents is None:
            height, width = self.source.read(int(rows[0])).shape[:2]
            return height, width
        sizes = self.source.contents.iloc[rows][["height", "width"]].value_counts(sort=True)
        return tuple(int(side) for side in sizes.index[0])  # type: ignore[return-value]

    def object_counts(self) -> pd.DataFrame:
        """Objects of each class (rows) in each part (columns); for boxes."""
        source = cast(BoxedImages, self.source)
        table = {}
        for part in PARTS:
            table[part] = np.zeros(len(self.classes), dtype=np.int64)
            table[part][self.positions] = source.counts(self.split.rows(part))
        return pd.DataFrame(table, index=pd.Index(self.classes, name="class"))

    def band_statistics(self) -> pd.DataFrame:
        """Mean, std, min and max of each band over the training images, in raw units; measured once.

        ``attrs["images"]`` of the result says how many images were read. Where nothing is held for training, all
        images stand in.
        """
        if self._statistics is None:
            rows = self.split.train if len(self.split.train) else np.concatenate([self.split.val, self.split.test])
            self._statistics = band_statistics(self.source, rows)
        return self._statistics

    def start_at(self, epoch: int, batches: int) -> None:
        """Let the training loaders that are made from now on leave out the first batches of one epoch.

        Args:
            epoch: The epoch in which an interrupted run goes on.
            batches: How many batches it had of it.
        """
        self._begun = (epoch, batches)

    def train_dataloader(self) -> Loader:
        """Shuffled, augmented training batches.

        Raises:
            DataError: If the normalisation does not fit the training images.
        """
        if problem := check_fit(self.preprocess, self.band_statistics()):
            raise DataError(problem)
        return self.loader(self.split.train, train=True)

    def val_dataloader(self) -> Loader:
        """Validation batches in the order of the manifest."""
        return self.loader(self.split.val, train=False)

    def test_dataloader(self) -> Loader:
        """Test batches in the order of the manifest."""
        return self.loader(self.split.test, train=False)

    def loader(self, rows: np.ndarray, train: bool) -> Loader:
        """Build a loader of any rows.

        Under torch.distributed each process gets its share (see `EpochSampler`).

        Args:
            rows: Rows of the manifest.
            train: Whether to shuffle and augment.
        """
        samples = self._samples(train, rows)
        if isinstance(samples, BoxSamples):
            rows = samples.keys(rows)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        sampler = EpochSampler(
            rows,
            train=train,
            seed=self.seed,
            batch_size=self.batch_size,
            rank=torch.distributed.get_rank() if distributed else 0,
            world=torch.distributed.get_world_size() if distributed else 1,
            expected=self.expected_draws(rows) if train and self.spec.sampler != "shuffle" else None,
        )
        if train:
            sampler.start_at(self._begun[0], self._begun[1] * self.batch_size)
        workers = 0 if self.spec.workers == "auto" and self.source.in_memory else loader_workers(self.spec.workers)
        return make_loader(
            samples,
            sampler,
            batch_size=self.batch_size if train else self._batch_of_whole_images(),
            workers=workers,
            start_method=self.source.start_method,
        )

    def inputs_of_epoch(self) -> tuple[int, int]:
        """Return how many inputs the network takes in an epoch's training and in its validation.

        They are the images, but for ``data.resize=tile``: a detector trains on every tile, and whole images are
        evaluated tile by tile; a network of maps trains on one window of each image.
        """
        samples = self._samples(True, self.split.train)
        trained = len(samples.units) if isinstance(samples, BoxSamples) else len(self.split.train)
        if self.preprocess.resize != "tile" or self.source.contents is None:
            return trained, len(self.split.val)
        shapes = self.source.contents[["height", "width"]].to_numpy()[self.split.val]
        overlap = self.spec.boxes.overlap if isinstance(samples, BoxSamples) else 0.25  # as `dense.sliding` has it
        return trained, sum(len(tile_windows(shape, self.preprocess.size, overlap)) for shape in shapes)

    def expected_draws(self, rows: np.ndarray) -> np.ndarray:
        """Return how often each of some training rows is drawn in an epoch, as `data.sampler` says; they sum to N."""
        return expected_draws(self.labels[rows], self.spec.sampler)

    def draws_by_class(self) -> list[int]:
        """Return how many training images of each class an epoch draws, on average, rounded."""
        rows = self.split.train
        drawn = images_of_class(self.labels[rows], len(self.classes), self.expected_draws(rows))
        return [round(value) for value in drawn]

    def _samples(self, train: bool, rows: np.ndarray) -> Samples:
        """The images, with what they carry."""
        augment = self.augment if train and self.augment.varies else None
        if isinstance(self.source, BoxedImages):
            return BoxSamples(
                self.source,
                self.labels,
                self.preprocess,
                self.augment if train else None,
                self.spec.boxes,
                self.seed,
                rows=rows,
                positions=None if self.source.classes == self.classes else self.positions,
            )
        if self.target == "mask":
            return MaskSamples(
                cast(DenseSource, self.source),
                self.labels,
                self.preprocess,
                augment,
                self.seed,
                train=train,
                positions=self.remapped,
            )
        return Samples(self.source, self.labels, self.preprocess, augment, self.seed)

    def _batch_of_whole_images(self) -> int:
        """Images of a batch for evaluation: fewer where whole images are larger than the network's input."""
        if self.preprocess.resize != "tile" or self.source.contents is None:
            return self.batch_size
        largest = int((self.source.contents["height"] * self.source.contents["width"]).max())
        return max(1, self.batch_size * self.preprocess.size[0] * self.preprocess.size[1] // max(largest, 1))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch; what is no tensor, such as where the pieces of an image lie, stays as it is."""

        def moved(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=True)
            return [moved(item) for item in value] if isinstance(value, list) else value

        return {key: moved(value) for key, value in batch.items()}

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Shrink and mix the batch on its device while training, fill it up in a validation; called by the trainer."""
        trainer = self.trainer
        if trainer is not None and trainer.validating:
            return fill_batch(batch, trainer.val_dataloaders.batch_size)
        if trainer is None or not trainer.training:
            return batch
        epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else None
        # Lightning counts the batch after this hook: batch_idx is still that of the batch before, -1 at the first.
        return self.vary(batch, trainer.current_epoch, epochs, trainer.fit_loop.batch_idx + 1, trainer.global_rank)

    def vary(self, batch: Batch, epoch: int, epochs: int | None, batch_index: int, rank: int = 0) -> Batch:
        """Shrink and mix a training batch as the recipe asks for the epoch.

        Args:
            batch: A batch of the training loader; not changed.
            epoch: Pass over the training images, from 0.
            epochs: All passes, the last of which may go without mixing; None where that is not known.
            batch_index: Position of the batch in the epoch, from 0.
            rank: Process.
        """
        if self.size_share is not None:
            batch = resize_batch(batch, scaled_size(self.preprocess.size, self.size_share(epoch)))
        if not self._mixes(epoch, epochs):
            return batch
        return self.mix(batch, epoch, batch_index, rank)

    def _mixes(self, epoch: int, epochs: int | None) -> bool:
        """Whether batches are mixed in an epoch of so many; in the last share of a time limit they are not either."""
        off = self.augment.mix_off_epochs
        if off == 0 or epochs is None:
            return True
        return epoch < epochs - off and self.time_share < 1.0 - off / epochs

    def mix(self, batch: Batch, epoch: int, batch_index: int, rank: int = 0) -> Batch:
        """Apply MixUp or CutMix as the recipe asks: a pure function of seed, epoch, batch index and rank.

        Args:
            batch: A batch of the training loader; not changed.
            epoch: Pass over the training images, from 0.
            batch_index: Position of the batch in the epoch, from 0.
            rank: Process.

        Returns:
            The same batch, or one with blended `image` and float (B, K) `label`.
        """
        key = (self.seed, _TAG_MIX, epoch, batch_index, rank)
        kind = draw_kind(self.augment, key)
        if kind is None:
            return batch
        alpha = self.augment.mixup_alpha if kind == "mixup" else self.augment.cutmix_alpha
        if "mask" in batch:  # the recipe allows CutMix alone
            image, mask = cutmix_masks(batch["image"], batch["mask"], alpha, key)
            return {**batch, "image": image, "mask": mask}
        image, label = mix_batch(batch["image"], batch["label"], kind, alpha, len(self.classes), key)
        return {**batch, "image": image, "label": label}

    def _check_bands(self, preprocess: Preprocess) -> None:
        """Refuse data whose bands, pixel scale or nodata are not those that the run was trained on."""
        if self.source.bands != preprocess.bands:
            raise DataError(
                f"{self.source.name}: bands {', '.join(self.source.bands)}, but the run was trained on "
                f"{', '.join(preprocess.bands)}"
            )
        if self.source.scale != preprocess.scale:
            raise DataError(
                f"{self.source.name}: pixels are divided by {self.source.scale:g}, but by {preprocess.scale:g} in the "
                "run; the files are of another pixel type"
            )
        nodata = self.source.nodata
        if nodata is not None and not np.isnan(nodata) and nodata != preprocess.nodata:
            known = "knows of no such value" if preprocess.nodata is None else f"has {preprocess.nodata:g} for it"
            raise DataError(
                f"{self.source.name}: {nodata:g} stands for no measurement, and the run {known}; such pixels would be "
                "taken for measured ones, so write the files with the run's value"
            )

    def _labels(self) -> np.ndarray:
        """Labels of the manifest, as positions in the run's classes where a run is given."""
        several = self.source.target == "classes"
        labels = self.source.manifest["label"].to_numpy(dtype=np.int64)
        if several:
            labels = membership(self.source.manifest, len(self.source.classes)).astype(np.float32)
        self.positions = np.arange(len(self.source.classes))
        if self._given_preprocess is None or self._given_preprocess.classes == self.source.classes:
            return labels
        known = list(self._given_preprocess.classes)
        for name in self.source.classes:
            if name not in known:
                raise DataError(
                    f"class '{name}' is unknown to the run, which knows {', '.join(known)}{did_you_mean(name, known)}"
                )
        self.positions = np.array([known.index(name) for name in self.source.classes], dtype=np.int64)
        if several:
            known_labels = np.zeros((len(labels), len(known)), dtype=np.float32)
            known_labels[:, self.positions] = labels
            return known_labels
        return self.positions[labels] if self.source.strata == self.source.classes else labels

    def _make_split(self) -> Split:
        """The split of the given file, everything in the test part, or a new one."""
        manifest = self.source.manifest
        if self._split_file is not None:
            return Split.load(self._split_file, manifest)
        if self._all_test:
            return Split.all_test(manifest)
        split = make_split(manifest, self.source.strata, self.spec, self.seed, self.source.contents)
        leaks = find_leaks(self.source, split)
        if leaks and self.spec.on_leak == "keep":
            notes = tuple(f"{leak.text}: the result is too good (data.on_leak=keep)" for leak in leaks)
            split = dataclasses.replace(split, warnings=(*split.warnings, *notes))
        if leaks and self.spec.on_leak == "error":
            raise DataError(f"{leaks[0].text}: the result would not be true; {leaks[0].mend}")
        if leaks and self.spec.on_leak == "drop":
            split = without_leaks(split, leaks, manifest, self.source.strata)
        near = near_copies_between_parts(self.source, split)
        return split if near is None else dataclasses.replace(split, warnings=(*split.warnings, near))
