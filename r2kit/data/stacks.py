"""One image in several files, a band in each: how such an image is named by a path, and how it is found.

The path of a stack says all of it, as a shell would: ``tiles/t01_{B02,B03,B08}.tif`` are three files, named after their
bands; ``{B02=B02_10m,B05=B05_20m}`` names a file otherwise. A path is what manifests, runs and commands carry, so that
whatever reads an image by its path reads a stack.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from r2kit.errors import DataError

_STACK = re.compile(r"(?P<head>[^{}]*)\{(?P<parts>[^{}]*)\}(?P<tail>[^{}]*)")
_RESOLUTION = r"(?:[_-]\d+m)?"  # Sentinel-2 names end in it, e.g. T33UUP_20200101_B05_20m.tif
_SEPARATORS = "_-. "
_BAND = re.compile(
    rf"(?P<tile>(?:.*[{re.escape(_SEPARATORS)}/])?)(?P<band>B\d{{1,2}}A?|band_?\d+){_RESOLUTION}\.tiff?", re.I
)


def parts_of(path: str | Path) -> dict[str, Path] | None:
    """Return the file of each band of a stack, in order; None for the path of an ordinary file.

    Raises:
        DataError: If a band stands twice.
    """
    found = _STACK.fullmatch(str(path))
    if found is None or os.path.exists(path):
        return None
    parts: dict[str, Path] = {}
    for item in found["parts"].split(","):
        band, _, name = item.partition("=")
        if not band or band in parts:
            raise DataError(f"{path}: {f'band {band} stands twice' if band else 'a band has no name'} between the {{}}")
        parts[band] = Path(f"{found['head']}{name or band}{found['tail']}")
    return parts


def files_of(path: str | Path) -> list[Path]:
    """Return the files that an image consists of: those of its bands, or itself."""
    parts = parts_of(path)
    return [Path(path)] if parts is None else list(parts.values())


def stack_path(files: Mapping[str, str]) -> str:
    """Return the path of the stack of some files.

    Args:
        files: The path of each band's file, with ``/``.

    Raises:
        DataError: If a name holds one of the characters that stacks are written with.
    """
    heads = {file[: file.rfind(band)] for band, file in files.items() if band in file.rpartition("/")[2]}
    alike = len(heads) == 1 and all(file.startswith(tuple(heads)) for file in files.values())
    head = heads.pop() if alike else _common_folder(list(files.values()))
    suffixes = {os.path.splitext(file)[1] for file in files.values()}
    tail = suffixes.pop() if len(suffixes) == 1 else ""
    middle = {band: file[len(head) : len(file) - len(tail)] for band, file in files.items()}
    for band, file in files.items():
        if set(file) & set("{}") or set(middle[band]) & set(",="):
            raise DataError(f"{file}: a file of one band may not have any of {{ }} , = in its name; rename it")
    return f"{head}{{{','.join(b if b == m else f'{b}={m}' for b, m in middle.items())}}}{tail}"


def _common_folder(files: Sequence[str]) -> str:
    """The folder that all files lie in, with a slash; nothing if there is none."""
    folders = [file.split("/")[:-1] for file in files]
    same = 0
    while all(len(names) > same and names[same] == folders[0][same] for names in folders):
        same += 1
    return "".join(f"{name}/" for name in folders[0][:same])


def name_of(path: Path) -> Path:
    """Return the path of an image without what tells its kind: no suffix, and no bands of a stack."""
    found = _STACK.fullmatch(path.as_posix())
    if found is None or os.path.exists(path):
        return path.with_suffix("")
    head = found["head"].rstrip(_SEPARATORS + "/")
    return Path(head) if head else Path("stack")


def stack_files(files: Iterable[Path], bands: Sequence[str]) -> list[Path]:
    """Put the files of each tile together; files of other bands are left out.

    A tile is a folder whose files are named after the bands (``t01/B02.tif``), or files with a common beginning
    (``t01_B02.tif``); a resolution may follow (``t01_B02_10m.tif``).

    Args:
        files: Of any number of tiles.
        bands: Names of the bands.

    Returns:
        The paths of the stacks, sorted. One of a tile that lacks a file names that file where it would be.

    Raises:
        DataError: If two files are of the same band of a tile.
    """
    tiles: dict[str, dict[str, str]] = {}
    pattern = re.compile(
        rf"(?P<tile>.*[{re.escape(_SEPARATORS)}])?(?P<band>{'|'.join(map(re.escape, bands))}){_RESOLUTION}"
    )
    for file in files:
        found = pattern.fullmatch(file.stem)
        if found is None:
            continue
        of_tile = tiles.setdefault(f"{file.parent.as_posix()}/{found['tile'] or ''}", {})
        if found["band"] in of_tile:
            raise DataError(f"{file}: is of band {found['band']}, and {of_tile[found['band']]} too; keep one of them")
        of_tile[found["band"]] = file.as_posix()
    stacks = []
    for head, of_tile in sorted(tiles.items()):
        suffix = os.path.splitext(next(iter(of_tile.values())))[1]
        stacks.append(Path(stack_path({band: of_tile.get(band, f"{head}{band}{suffix}") for band in bands})))
    return stacks


def bands_in(files: Sequence[str]) -> tuple[list[str], int]:
    """Return the bands that files are of by their names (B1, B02, B8A, band3), and the number of tiles.

    No bands where a file has another name.
    """
    found = [_BAND.fullmatch(file) for file in files]
    named = [match for match in found if match is not None]
    if len(named) < len(files):
        return [], 0
    return sorted({match["band"] for match in named}), len({match["tile"] for match in named})


@dataclass(frozen=True)
class BandFile:
    """What the header of a file of one band says."""

    band: str
    """Name of the band."""
    file: Path
    position: int
    """Of the band in the file, from 1."""
    size: tuple[int, int]
    """(H, W) in pixels."""
    block: tuple[int, int]
    """(H, W) of what is decoded at once."""
    dtype: str
    """GDAL's name of the pixel type."""
    nodata: float | None
    crs: str | None
    """As WKT, None without georeference."""
    transform: tuple[float, ...] | None
    """GDAL's six numbers, None without georeference."""

    @property
    def bounds(self) -> tuple[float, ...]:
        """Two opposite corners of the ground, in units of `crs`."""
        x, a, b, y, d, e = self.transform or (0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
        height, width = self.size
        return x, y, x + a * width + b * height, y + d * width + e * height


def virtual_raster(path: Path, files: Sequence[BandFile]) -> str:
    """Describe the stack of some files as GDAL's virtual raster, on the grid of the finest; the others bilinearly.

    Args:
        path: Of the stack, for messages.
        files: Its bands.

    Raises:
        DataError: If the files are not of one pixel type, nodata and ground.
    """
    finest = max(files, key=lambda item: item.size[0] * item.size[1])
    coarse = min(files, key=lambda item: item.size[0] * item.size[1])
    slack = max(abs(value) for value in (coarse.transform or (0.0,) * 6)[1::4]) / 2  # half a pixel of the coarsest
    for item in files:
        if item.dtype != finest.dtype or repr(item.nodata) != repr(finest.nodata):
            raise DataError(
                f"{path}: {item.band} is of {item.dtype} with nodata {item.nodata}, {finest.band} of {finest.dtype} "
                f"with nodata {finest.nodata}; all bands must be alike"
            )
        if item.crs is None and finest.crs is None:
            same = item.size[0] * finest.size[1] == item.size[1] * finest.size[0]
        else:
            near = all(abs(a - b) <= slack for a, b in zip(item.bounds, finest.bounds, strict=True))
            same = item.crs == finest.crs and near
        if not same:
            raise DataError(
                f"{path}: {item.band} ({item.size[0]} x {item.size[1]} pixels) and {finest.band} ({finest.size[0]} x "
                f"{finest.size[1]}) do not show the same ground; cut or warp one of them, e.g. with gdalwarp"
            )
    height, width = finest.size
    lines = [f'<VRTDataset rasterXSize="{width}" rasterYSize="{height}">']
    if finest.crs is not None and finest.transform is not None:
        lines.append(f"<SRS>{escape(finest.crs)}</SRS>")
        lines.append(f"<GeoTransform>{','.join(repr(float(value)) for value in finest.transform)}</GeoTransform>")
    for number, item in enumerate(files, 1):
        nothing = "" if item.nodata is None else repr(float(item.nodata))
        lines.append(f'<VRTRasterBand dataType="{item.dtype}" band="{number}">')
        lines.append(f"<Description>{escape(item.band)}</Description>")
        if nothing:
            lines.append(f"<NoDataValue>{nothing}</NoDataValue>")
        # Not shared: a handle that two threads use at once is none that GDAL promises.
        lines.append('<ComplexSource resampling="bilinear">')
        lines.append(
            f'<SourceFilename relativeToVRT="0" shared="0">{escape(str(item.file.absolute()))}</SourceFilename>'
        )
        lines.append(f"<SourceBand>{item.position}</SourceBand>")
        lines.append(
            f'<SourceProperties RasterXSize="{item.size[1]}" RasterYSize="{item.size[0]}" DataType="{item.dtype}" '
            f'BlockXSize="{item.block[1]}" BlockYSize="{item.block[0]}"/>'
        )
        lines.append(f'<SrcRect xOff="0" yOff="0" xSize="{item.size[1]}" ySize="{item.size[0]}"/>')
        lines.append(f'<DstRect xOff="0" yOff="0" xSize="{width}" ySize="{height}"/>')
        lines.append((f"<NODATA>{nothing}</NODATA>" if nothing else "") + "</ComplexSource></VRTRasterBand>")
    return "\n".join([*lines, "</VRTDataset>"])
