"""Detections as files that other programs read: CSV, COCO JSON, and GeoJSON where an image knows its place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import rasterio.features
import rasterio.warp
from numpy.typing import NDArray

from r2kit.data.reader import open_raster
from r2kit.objects.coco import unpack_mask
from r2kit.result.detection import CORNERS, rows_of
from r2kit.run import write_atomic

_COLUMNS = ["path", "class", "score", *CORNERS]


def write_csv(table: pd.DataFrame, file: Path) -> None:
    """Write the detections of a table of objects, one row each: path, class, score and corners in pixels.

    Args:
        table: See `r2kit.result.detection`; its rows of kind ``found``.
        file: The CSV file.
    """
    write_atomic(file, with_paths(table)[_COLUMNS].to_csv(index=False, float_format="%.7g"))


def write_coco(table: pd.DataFrame, classes: Sequence[str], file: Path) -> None:
    """Write images and detections as COCO JSON with scores; `r2kit.data.boxes.read_coco` reads it back.

    Args:
        table: See `r2kit.result.detection`.
        classes: Class names; the category of the first has id 1.
        file: The JSON file. Paths of images are written as they are in the table.
    """
    images = table[table["kind"] == "image"].reset_index(drop=True)
    number = {identity: position + 1 for position, identity in enumerate(images["id"])}
    category = {name: position + 1 for position, name in enumerate(classes)}
    annotations: list[dict[str, Any]] = []
    for row in rows_of(table[table["kind"] == "found"]):
        x0, y0, x1, y1 = (float(row[corner]) for corner in CORNERS)
        entry: dict[str, Any] = {
            "id": len(annotations) + 1,
            "image_id": number[row["id"]],
            "category_id": category[row["class"]],
            "bbox": [round(value, 3) for value in (x0, y0, x1 - x0, y1 - y0)],
            "area": round((x1 - x0) * (y1 - y0), 3),
            "iscrowd": 0,
            "score": round(float(row["score"]), 6),
        }
        if isinstance(row["mask"], str):
            size = images.iloc[number[row["id"]] - 1][["height", "width"]].astype(int).tolist()
            entry["segmentation"] = {"size": size, "counts": row["mask"]}
            entry["area"] = int(unpack_mask(entry["segmentation"]).sum())
        annotations.append(entry)
    data = {
        "images": [
            {
                "id": number[row["id"]],
                "file_name": str(row["path"]),
                "width": int(row["width"]),
                "height": int(row["height"]),
            }
            for row in rows_of(images)
        ],
        "categories": [{"id": category[name], "name": name} for name in classes],
        "annotations": annotations,
    }
    write_atomic(file, json.dumps(data) + "\n")


def write_geojson(table: pd.DataFrame, file: Path) -> int:
    """Write the detections in georeferenced images as polygons in longitude and latitude.

    A polygon is the outline of the object where there is one, else its box.

    Args:
        table: See `r2kit.result.detection`; the paths must be readable.
        file: The GeoJSON file; not written where no image is georeferenced.

    Returns:
        How many images are georeferenced.
    """
    images = table[table["kind"] == "image"]
    objects = dict(list(table[table["kind"] == "found"].groupby("id", sort=False)))
    features: list[dict[str, Any]] = []
    located = 0
    for image in rows_of(images):
        place = _place(Path(image["path"]))
        if place is None:
            continue
        located += 1
        crs, grid = place
        for row in rows_of(objects.get(image["id"], table.iloc[:0])):
            rings = _rings(row, (int(image["height"]), int(image["width"])))
            features.append(
                {
                    "type": "Feature",
                    "properties": {
                        "class": row["class"],
                        "score": round(float(row["score"]), 6),
                        "path": image["path"],
                    },
                    "geometry": _geometry([[_to_degrees(ring, crs, grid) for ring in part] for part in rings]),
                }
            )
    if located:
        write_atomic(file, json.dumps({"type": "FeatureCollection", "features": features}) + "\n")
    return located


def with_paths(table: pd.DataFrame) -> pd.DataFrame:
    """Return path, class, score, corners and mask of the detections of a table of objects."""
    path_of = table[table["kind"] == "image"].set_index("id")["path"]
    found = table[table["kind"] == "found"]
    return found.assign(path=found["id"].map(path_of))[[*_COLUMNS, "mask"]].reset_index(drop=True)


def _place(path: Path) -> tuple[Any, Any] | None:
    """Coordinate system and grid of a georeferenced raster, None for any other image."""
    if path.suffix.lower() not in (".tif", ".tiff"):
        return None
    with open_raster(path) as dataset:
        if dataset.crs is None or dataset.transform.is_identity:
            return None
        return dataset.crs, dataset.transform


def _rings(row: dict[str, Any], size: tuple[int, int]) -> list[list[NDArray[np.float64]]]:
    """Polygons of an object, each an outer ring and its holes, (V, 2) x and y in pixels, closed."""
    if isinstance(row.get("mask"), str):
        mask = unpack_mask({"size": list(size), "counts": row["mask"]})
        shapes = rasterio.features.shapes(mask.astype(np.uint8), mask=mask)
        polygons = [[np.asarray(ring) for ring in shape["coordinates"]] for shape, _ in shapes]
        if polygons:
            return polygons
    x0, y0, x1, y1 = (float(row[corner]) for corner in CORNERS)
    return [[np.array([[x0, y0], [x0, y1], [x1, y1], [x1, y0], [x0, y0]])]]


def _to_degrees(ring: NDArray[np.float64], crs: Any, grid: Any) -> NDArray[np.float64]:
    """Bring (V, 2) pixels to longitude and latitude."""
    x = grid.a * ring[:, 0] + grid.b * ring[:, 1] + grid.c
    y = grid.d * ring[:, 0] + grid.e * ring[:, 1] + grid.f
    lon, lat = rasterio.warp.transform(crs, "EPSG:4326", x, y)
    return np.stack([np.asarray(lon), np.asarray(lat)], axis=1)


def _geometry(polygons: list[list[NDArray[np.float64]]]) -> dict[str, Any]:
    """A GeoJSON geometry; outer rings run counterclockwise and holes clockwise (RFC 7946, section 3.1.6)."""
    written = [
        [_turned(ring, outer=position == 0).round(8).tolist() for position, ring in enumerate(polygon)]
        for polygon in polygons
    ]
    if len(written) == 1:
        return {"type": "Polygon", "coordinates": written[0]}
    return {"type": "MultiPolygon", "coordinates": written}


def _turned(ring: NDArray[np.float64], *, outer: bool) -> NDArray[np.float64]:
    """The ring in the direction that its place asks for."""
    x, y = ring[:, 0], ring[:, 1]
    counterclockwise = float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum()) > 0
    return ring if counterclockwise == outer else ring[::-1]
