"""Reading image files: every picture format and raster tile that people bring, and a clear refusal of the rest.

The content decides how a file is read, not its name. Whatever a decoder makes of broken bytes ends in a `DataError`
that names the file; sizes are checked before any pixel is decoded.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import rasterio
import rasterio.warp
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
from rasterio.dtypes import dtype_rev, typename_fwd
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning

from r2kit.data.stacks import BandFile, parts_of, stack_files, virtual_raster
from r2kit.errors import DataError, did_you_mean, naming

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff")
MAX_IMAGE_BYTES = 2**30
"""Largest decoded size of one image."""
_MOST_BANDS = 4096  # several times what imaging spectrometers have

RGB = ("red", "green", "blue")
_PICTURES: dict[str, Any] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
}
_RASTER_DRIVERS = {"TIFF": "GTiff", "PNG16": "PNG"}
_TRANSPOSE = {  # EXIF orientation (CIPA DC-008, tag 0x0112) to the operation that shows the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_open_lock = threading.Lock()  # warnings.catch_warnings is not thread-safe


@dataclass(frozen=True)
class ImageInfo:
    """What the header of an image file says, as `read_image` will return it."""

    bands: tuple[str, ...]
    """Band names."""
    dtype: str
    """Name of the NumPy type of the pixels."""
    scale: float
    """255 for uint8, 65535 for 16-bit pictures, 1 for rasters of other types."""
    nodata: float | None
    """Raw value that means "no measurement", if the file declares one."""
    lon: float
    """Longitude of the centre in degrees, NaN without georeference."""
    lat: float
    """Latitude of the centre in degrees, NaN without georeference."""
    crs: str | None = None
    """Coordinate system of `bounds`, as EPSG:CODE or WKT; None without georeference."""
    bounds: tuple[float, float, float, float] | None = None
    """Left, bottom, right, top in units of `crs`; None without georeference."""


def read_image(
    path: str | Path,
    *,
    bands: Sequence[str] | None = None,
    network: tuple[int, int] | None = None,
    max_bytes: int | None = None,
) -> np.ndarray:
    """Read an image file, or the files of a stack (see `r2kit.data.stacks`) as one.

    JPEG, PNG and WebP become red, green, blue whatever they hold (greyscale, palette, CMYK, transparency), turned
    upright by their EXIF orientation; PNG with 16 bits keeps them. TIFF keeps all its bands and its type; a palette
    becomes colours and a transparency band is left out.

    Args:
        path: The file.
        bands: Names of the bands to return, in this order; None for all.
        network: (H, W) to which the image will be resized. A JPEG may then come at half, a quarter or an eighth of its
            size, as long as both its sides stay at least twice the longer of these; None for all pixels.
        max_bytes: Largest decoded size, `MAX_IMAGE_BYTES` by default.

    Returns:
        (H, W, C), uint8, uint16 or the raster's own type.

    Raises:
        DataError: If the file is missing, empty, broken, of another format, too large, or lacks a band.
    """
    return _decode(Path(path), bands=bands, network=network, place=False, max_bytes=max_bytes)[1]


def choose_bands(wanted: Sequence[str | int], bands: tuple[str, ...], where: str) -> tuple[str, ...]:
    """Return the names of the wanted bands.

    Args:
        wanted: Names, or positions from 1.
        bands: Names of all bands there are.
        where: What to name in a message.

    Raises:
        DataError: If there is no such band, or one is wanted twice.
    """
    chosen = []
    for band in wanted:
        if isinstance(band, int):
            if not 1 <= band <= len(bands):
                raise DataError(f"{where}: no band {band}; there are {len(bands)}, counted from 1: {', '.join(bands)}")
            chosen.append(bands[band - 1])
        elif band in bands:
            chosen.append(band)
        else:
            raise DataError(f"{where}: no band '{band}'; there are {', '.join(bands)}{did_you_mean(band, bands)}")
    for position, band in enumerate(chosen):
        if band in chosen[:position]:
            raise DataError(
                f"{where}: band '{band}' is wanted twice, as {wanted[chosen.index(band)]} and {wanted[position]}"
            )
    return tuple(chosen)


def examine_image(
    path: str | Path,
    *,
    bands: Sequence[str] | None = None,
    network: tuple[int, int] | None = None,
    place: bool = True,
    max_bytes: int | None = None,
) -> tuple[ImageInfo, np.ndarray]:
    """Return what an image file says about itself, all its bands named, and its pixels as `read_image` gives them.

    Args:
        path: The file.
        bands: As of `read_image`.
        network: As of `read_image`.
        place: Also say where it lies, which may need another coordinate system.
        max_bytes: As of `read_image`.

    Raises:
        DataError: As `read_image`.
    """
    return _decode(Path(path), bands=bands, network=network, place=place, max_bytes=max_bytes)


def find_images(paths: Iterable[str | Path], band_files: Sequence[str] | None = None) -> list[Path]:
    """List the image files among the given files and, at any depth, in the given folders; hidden ones are left out.

    Args:
        paths: Files, stacks of files, and folders; with `band_files` also tiles by the beginning of their files' names.
        band_files: Bands that come as a file each: the files of a folder are then put together, see `stacks`.

    Returns:
        Files, each once, in the order of `paths`, those of a folder sorted.

    Raises:
        DataError: If a path is missing, a given file is not of a known format, or a folder holds no image.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in _walk(path) if p.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise DataError(f"{path}: no image in this folder; known suffixes are {', '.join(IMAGE_SUFFIXES)}")
            found.update(dict.fromkeys(inside if band_files is None else _stacked(path, inside, band_files)))
        elif parts_of(path) is not None:
            found[path] = None
        elif not path.exists():
            if band_files is not None and path.parent.is_dir():
                beginning = sorted(p for p in path.parent.iterdir() if p.name.startswith(path.name))
                if len(stacks := stack_files(beginning, band_files)) == 1:
                    found[stacks[0]] = None
                    continue
            near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise DataError(f"{path}: no such file or folder{did_you_mean(path.name, near)}")
        elif path.suffix.lower() not in IMAGE_SUFFIXES:
            raise DataError(f"{path}: not an image; known suffixes are {', '.join(IMAGE_SUFFIXES)}")
        else:
            found[path] = None
    return list(found)


def _stacked(folder: Path, files: list[Path], bands: Sequence[str]) -> list[Path]:
    """The files of a folder as stacks."""
    stacks = stack_files(files, bands)
    if not stacks:
        raise DataError(
            f"{folder}: none of {len(files)} files is of a band of data.band_files ({', '.join(bands)}), e.g. "
            f"{files[0].name}; expected TILE/{bands[0]}.tif or TILE_{bands[0]}.tif"
        )
    return stacks


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder that are not hidden, links to folders not followed."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if not path.is_symlink():
                yield from _walk(path)
        else:
            yield path


def _decode(
    path: Path,
    bands: Sequence[str | int] | None = None,
    network: tuple[int, int] | None = None,
    place: bool = True,
    max_bytes: int | None = None,
) -> tuple[ImageInfo, np.ndarray]:
    """Read header and pixels; turn everything that goes wrong into a `DataError` naming the file."""
    with naming(path, "cannot be decoded"):
        kind = _sniff(path)
        if kind in _RASTER_DRIVERS:
            return _decode_raster(path, _RASTER_DRIVERS[kind], bands, place, max_bytes or MAX_IMAGE_BYTES)
        info, pixels = _decode_picture(path, kind, network, max_bytes or MAX_IMAGE_BYTES)
        places = _places(bands, info, path)
        if places is not None:
            pixels = np.ascontiguousarray(pixels[..., places])
        return info, pixels


def _places(bands: Sequence[str | int] | None, info: ImageInfo, path: Path) -> list[int] | None:
    """Positions of the wanted bands, None where they are all in their order."""
    if bands is None or tuple(bands) == info.bands:
        return None
    return [info.bands.index(band) for band in choose_bands(bands, info.bands, str(path))]


def _sniff(path: Path) -> str:
    """Tell the format from the first bytes."""
    if (parts := parts_of(path)) is not None:
        for band, part in parts.items():
            if not part.is_file():
                raise DataError(f"{path}: band {band} is missing: {part} is no file")
            if _sniff(part) != "TIFF":
                raise DataError(f"{path}: {part.name} is no TIFF; bands that come as a file each are TIFF files")
        return "TIFF"
    with path.open("rb") as file:
        head = file.read(32)
    if not head:
        raise DataError(f"{path}: is empty (0 bytes)")
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG16" if len(head) > 24 and head[24] == 16 else "PNG"  # byte 24: bit depth in the IHDR chunk
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WebP"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    raise DataError(f"{path}: is not a JPEG, PNG, WebP or TIFF image, whatever its name says")


def _check_size(path: Path, height: int, width: int, bytes_per_pixel: int, most: int) -> None:
    """Refuse what would not fit into memory, before decoding it."""
    size = height * width * bytes_per_pixel
    if size > most:
        raise DataError(
            f"{path}: {height} x {width} pixels take {size / 2**30:.1f} GB decoded, more than the limit of "
            f"{most / 2**30:.2g} GB an image; cut it into tiles"
        )
    if size <= 0:
        raise DataError(f"{path}: has no pixels ({height} x {width})")


def _decode_picture(path: Path, kind: str, network: tuple[int, int] | None, most: int) -> tuple[ImageInfo, np.ndarray]:
    """Read JPEG, PNG or WebP as RGB."""
    info = ImageInfo(RGB, "uint8", 255.0, None, float("nan"), float("nan"))
    with path.open("rb") as file:
        # The plugin's class instead of Image.open: that one warns about or refuses large pictures by a global limit.
        picture: Image.Image = _PICTURES[kind](file)
        _check_size(path, picture.height, picture.width, 4, most)
        if network is not None and kind == "JPEG":
            # The decoder leaves out the finest of a block's 8 x 8 waves: half the size costs about half the time.
            factor = min(picture.size) // (2 * max(network))
            if factor >= 2:
                picture.draft(None, (picture.width // factor, picture.height // factor))
        picture.load()
        orientation = _orientation(picture)
        if picture.mode in ("P", "PA"):
            picture = picture.convert("RGBA")  # a palette may have transparent entries; straight to RGB warns
        if picture.mode.startswith("I") or picture.mode == "F":
            raise DataError(f"{path}: pixels of mode {picture.mode} in a {kind} picture are not supported")
        if picture.mode != "RGB":
            picture = picture.convert("RGB")
        if orientation in _TRANSPOSE:
            picture = picture.transpose(_TRANSPOSE[orientation])
        return info, np.array(picture)


def _orientation(picture: Image.Image) -> int:
    """EXIF orientation, 1 (upright) when there is none or the EXIF block is damaged."""
    if "exif" not in picture.info:
        return 1
    try:
        return int(picture.getexif().get(0x0112, 1))
    except Exception:  # damaged metadata of any sort is no reason to refuse the pixels
        return 1


@contextmanager
def open_raster(path: Path, driver: str | None = None) -> Iterator[Any]:
    """Open a raster with rasterio, without its warning about files that have no georeference.

    Args:
        path: The file.
        driver: GDAL driver to insist on; None lets GDAL choose.

    Yields:
        The open rasterio dataset.
    """
    with _raster_environment():
        dataset = keep_raster_open(path, driver)
        try:
            yield dataset
        finally:
            dataset.close()


def keep_raster_open(
    path: Path, driver: str | None = None, mode: Literal["r", "r+", "w"] = "r", profile: dict[str, Any] | None = None
) -> Any:
    """Open a raster without that warning; the caller closes it. It belongs to the thread that opened it.

    Args:
        path: The file.
        driver: GDAL driver to insist on; None lets GDAL choose.
        mode: Read, change, or make anew.
        profile: What a new file holds, as rasterio takes it.
    """
    if mode == "r" and driver is None:
        _refuse_disguised(path)
    if mode == "r" and (parts := parts_of(path)) is not None:
        _sniff(path)
        xml = virtual_raster(path, [_header(band, file) for band, file in parts.items()])
        with _raster_environment(), _open_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            return rasterio.open(xml, driver="VRT")
    given = {**({"driver": driver} if driver else {}), **(profile or {})}
    with _raster_environment(), _open_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        return rasterio.open(path, mode, **given)


def _header(band: str, file: Path) -> BandFile:
    """What a file of a stack says of its band."""
    with open_raster(file, "GTiff") as dataset:
        info, kept, palette = describe_raster(dataset, file, place=False)
        if len(kept) != 1 or palette is not None:
            raise DataError(f"{file}: holds {len(info.bands)} bands{' as a palette' if palette else ''}; one is needed")
        placed = dataset.crs is not None and not dataset.transform.is_identity
        return BandFile(
            band,
            file,
            kept[0] + 1,
            dataset.shape,
            dataset.block_shapes[kept[0]],
            typename_fwd[dtype_rev[info.dtype]],
            info.nodata,
            dataset.crs.to_wkt() if placed else None,
            dataset.transform.to_gdal() if placed else None,
        )


def _refuse_disguised(path: Path) -> None:
    """Refuse a file of text that makes GDAL open other files or addresses, unless it says so by its name (.vrt)."""
    if path.suffix.lower() == ".vrt" or not path.is_file():
        return
    with path.open("rb") as file:
        head = file.read(256).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head[:1] in (b"<", b"{", b"["):
        raise DataError(f"{path}: is text that points to other files, not a raster; a virtual raster is named .vrt")


def _raster_environment() -> Any:
    """Without the listing, opening a file does not cost time in proportion to the number of its neighbours."""
    return rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="TRUE")


def describe_raster(
    dataset: Any, path: Path, *, place: bool = True
) -> tuple[ImageInfo, list[int], dict[int, Any] | None]:
    """Describe an open raster as `read_image` would give its pixels, whatever its size.

    Args:
        dataset: From `open_raster`.
        path: Its file, for messages.
        place: Also say where it lies, which may need another coordinate system.

    Returns:
        The description; the positions from 0 of the bands that count (transparency does not); the palette that turns
        the one band into colours, or None.

    Raises:
        DataError: If its bands are not of one real number type.
    """
    if dataset.count > _MOST_BANDS:  # each is asked for its type, name and meaning, which takes minutes
        raise DataError(
            f"{path}: has {dataset.count} bands, more than {_MOST_BANDS}; its header is damaged, or rows stand as bands"
        )
    types = set(dataset.dtypes)
    dtype = np.dtype(dataset.dtypes[0]) if len(types) == 1 else None
    if dtype is None or dtype.kind not in "iuf":
        raise DataError(f"{path}: pixels of type {' and '.join(sorted(types))}; one real number type is needed")
    for height, width in dataset.block_shapes:  # GDAL decodes whole blocks, however little is asked for
        if height * width * dtype.itemsize > MAX_IMAGE_BYTES:
            raise DataError(
                f"{path}: is stored in blocks of {height} x {width} pixels, more than {MAX_IMAGE_BYTES / 2**30:.0f} GB "
                "at once; write it anew in tiles, e.g. gdal_translate -co TILED=YES"
            )
    meaning = list(dataset.colorinterp)
    kept = [i for i, role in enumerate(meaning) if role is not ColorInterp.alpha]
    palette = dataset.colormap(1) if meaning[0] is ColorInterp.palette and dtype == np.uint8 else None
    is_picture = dataset.driver == "PNG"
    names = RGB if palette or is_picture else _band_names(dataset, kept)
    scale = 255.0 if dtype == np.uint8 else (65535.0 if is_picture else 1.0)
    nodata = None if palette else dataset.nodata
    where = (*_centre(dataset), *_footprint(dataset)) if place else (float("nan"), float("nan"), None, None)
    return ImageInfo(names, dtype.name, scale, nodata, *where), kept, palette


def _decode_raster(
    path: Path, driver: str, bands: Sequence[str | int] | None, place: bool, most: int
) -> tuple[ImageInfo, np.ndarray]:
    """Read a TIFF or a 16-bit PNG, of its bands only the wanted ones; `place`: also say where it lies."""
    with open_raster(path, None if parts_of(path) else driver) as dataset:
        info, kept, palette = describe_raster(dataset, path, place=place)
        is_picture = driver == "PNG"
        dtype = np.dtype(info.dtype)
        _check_size(path, dataset.height, dataset.width, dataset.count * dtype.itemsize, most)
        places = _places(bands, info, path)
        of_one_band = palette or (is_picture and len(kept) == 1)  # its one band becomes red, green and blue
        if places is not None and not of_one_band:
            kept, places = [kept[place] for place in places], None
        # GDAL writes band after band into the places where the pixels of (H, W, C) have them, without another copy.
        pixels = np.empty((dataset.height, dataset.width, len(kept)), dtype)
        dataset.read([i + 1 for i in kept], out=pixels.transpose(2, 0, 1))
    if palette:
        table = np.zeros((256, 3), dtype=np.uint8)
        for value, colour in palette.items():
            table[value] = colour[:3]
        pixels = table[pixels[..., 0]]
    elif is_picture and pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    return info, pixels if places is None else np.ascontiguousarray(pixels[..., places])


def _band_names(dataset: Any, kept: list[int]) -> tuple[str, ...]:
    """Names of the bands: their descriptions, red, green and blue by their role, else band1, band2, ..."""
    said = dataset.descriptions  # asked of every band at each call: once, or 65,535 bands take minutes
    descriptions = [said[i] for i in kept]
    if all(descriptions) and len(set(descriptions)) == len(descriptions):
        return tuple(str(name) for name in descriptions)
    meaning = dataset.colorinterp
    roles = [meaning[i] for i in kept]
    if roles == [ColorInterp.red, ColorInterp.green, ColorInterp.blue]:
        return RGB
    return tuple(f"band{i + 1}" for i in kept)


def _footprint(dataset: Any) -> tuple[str | None, tuple[float, float, float, float] | None]:
    """Coordinate system and bounds (left, bottom, right, top) of a georeferenced raster, None without."""
    if dataset.crs is None or dataset.transform.is_identity:
        return None, None
    # Not dataset.bounds, which is upside down for rasters stored south-up.
    grid, width, height = dataset.transform, dataset.width, dataset.height
    xs = [grid.a * x + grid.b * y + grid.c for x in (0, width) for y in (0, height)]
    ys = [grid.d * x + grid.e * y + grid.f for x in (0, width) for y in (0, height)]
    return dataset.crs.to_string(), (min(xs), min(ys), max(xs), max(ys))


def _centre(dataset: Any) -> tuple[float, float]:
    """(longitude, latitude) of the middle of a georeferenced raster, NaN without."""
    if dataset.crs is None or dataset.transform.is_identity:
        return float("nan"), float("nan")
    grid, column, row = dataset.transform, dataset.width / 2, dataset.height / 2
    x, y = grid.a * column + grid.b * row + grid.c, grid.d * column + grid.e * row + grid.f
    if dataset.crs.to_epsg() == 4326:
        return float(x), float(y)
    lon, lat = rasterio.warp.transform(dataset.crs, "EPSG:4326", [x], [y])
    if not (np.isfinite(lon[0]) and np.isfinite(lat[0])):
        return float("nan"), float("nan")
    return float(lon[0]), float(lat[0])
