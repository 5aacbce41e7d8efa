"""Polygons of a finished map, in longitude and latitude: GeoJSON, or GeoPackage (extra ``gis``)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import rasterio
import rasterio.features
import rasterio.warp

from r2kit.data.reader import open_raster
from r2kit.errors import DataError, require
from r2kit.maps.writer import class_names

_DEGREES = "EPSG:4326"  # RFC 7946 knows no other for GeoJSON
_MAP = "r2kit_map"  # name of the fingerprint in both formats
_CHUNK = 5000  # polygons held at once for a GeoPackage


def write_polygons(map_file: Path, out: Path, fingerprint: str) -> Path:
    """Write one polygon for each connected area of one class.

    Args:
        map_file: A finished map with a coordinate system.
        out: File ending in .geojson or .gpkg. Its polygons have the properties `class` and `value`.
        fingerprint: What the map was made with; written into the file, see `polygons_of`.

    Raises:
        DataError: If the file cannot be written, or there is nothing to write into a GeoPackage.
    """
    draft = out.with_name(f".{out.stem}.part{out.suffix}")
    try:
        if out.suffix == ".geojson":
            _write_geojson(map_file, draft, fingerprint)
        else:
            _write_geopackage(map_file, draft, fingerprint)
        os.replace(draft, out)
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror or error}") from None
    return out


def polygons_of(file: Path) -> str | None:
    """Return the fingerprint of the map that the polygons of a file are of, None for another's file.

    The time of a file says nothing: copies, archives and version control set it anew.
    """
    if file.suffix == ".geojson":
        with file.open("rb") as opened:
            found = re.match(
                rf'{{"type": "FeatureCollection", "{_MAP}": "([0-9a-f]+)"', opened.read(300).decode("latin-1")
            )
        return None if found is None else found[1]
    import pyogrio

    try:
        return (pyogrio.read_info(file).get("layer_metadata") or {}).get(_MAP)
    except Exception:  # no GeoPackage at all, or a damaged one: GDAL's readers raise several unrelated classes
        return None


def polygons(map_file: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield (polygon in degrees, pixel value) of each connected area of one class, as GeoJSON geometries.

    An area that crosses the antimeridian is cut there, as RFC 7946 asks, and gives a polygon for each part.
    """
    with open_raster(map_file) as dataset:
        # A band, not an array: GDAL reads it line by line.
        for geometry, value in rasterio.features.shapes(rasterio.band(dataset, 1), transform=dataset.transform):
            if int(value) != dataset.nodata:
                placed = rasterio.warp.transform_geom(dataset.crs, _DEGREES, geometry, precision=7)
                parts = placed["coordinates"] if placed["type"] == "MultiPolygon" else [placed["coordinates"]]
                for part in parts:
                    for inside in _within_the_world(part):
                        yield {"type": "Polygon", "coordinates": inside}, int(value)


def _within_the_world(rings: Any) -> list[Any]:
    """Cut the rings of a polygon in degrees at the antimeridian: grids of longitude may run from 0 to 360."""
    longitudes = [x for x, _ in rings[0]]
    if max(longitudes) <= 180.0 and min(longitudes) >= -180.0:
        return [rings]
    require("shapely", "shapely", "gis", "polygons of a map that crosses the antimeridian")
    from shapely import affinity, box
    from shapely.geometry import Polygon, mapping

    found: list[Any] = []
    for turn in (-360.0, 0.0, 360.0):
        cut = affinity.translate(Polygon(rings[0], rings[1:]), xoff=turn).intersection(box(-180, -90, 180, 90))
        found += [mapping(part)["coordinates"] for part in getattr(cut, "geoms", [cut]) if part.area > 0]
    return found


def _write_geojson(map_file: Path, draft: Path, fingerprint: str) -> None:
    """Write a FeatureCollection, one feature a line, without holding them all."""
    names = class_names(map_file)
    with draft.open("w", encoding="utf-8") as file:
        # RFC 7946 allows members of one's own (6.1).
        file.write(f'{{"type": "FeatureCollection", "{_MAP}": "{fingerprint}", "features": [')
        separator = "\n"
        for geometry, value in polygons(map_file):
            feature = {"type": "Feature", "properties": {"class": names[value], "value": value}, "geometry": geometry}
            file.write(separator + json.dumps(feature))
            separator = ",\n"
        file.write("\n]}\n")


def _write_geopackage(map_file: Path, draft: Path, fingerprint: str) -> None:
    """Write a layer named ``map``, chunk by chunk."""
    import numpy as np
    import shapely
    from pyogrio.raw import write
    from shapely.geometry import shape

    names = class_names(map_file)
    draft.unlink(missing_ok=True)
    found, first = polygons(map_file), True
    while chunk := list(islice(found, _CHUNK)):
        write(
            draft,
            geometry=np.array([shapely.to_wkb(shape(geometry)) for geometry, _ in chunk], dtype=object),
            field_data=[np.array([names[v] for _, v in chunk], dtype=object), np.array([v for _, v in chunk])],
            fields=np.array(["class", "value"]),
            layer="map",
            driver="GPKG",
            geometry_type="Polygon",
            crs=_DEGREES,
            append=not first,
            layer_metadata={_MAP: fingerprint} if first else None,
        )
        first = False
    if first:
        raise DataError(f"{map_file}: holds no class anywhere, so there is no polygon to write")
