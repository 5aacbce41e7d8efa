"""COCO JSON: images, categories and annotations with boxes, outlines and crowds."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r2kit.data.boxes.listing import BoxListing, BoxRow, ImageRow, check_class, check_classes, inside, number, read_text
from r2kit.errors import DataError

_PART_WORD = re.compile(r"(?:^|[^a-z])(train|val|valid|validation|test)(?![a-z])", re.IGNORECASE)


def read_coco(root: Path, classes: Sequence[str] | None = None) -> BoxListing:
    """Read a COCO JSON file, or a folder with one for each part (train.json, instances_val2017.json, ...).

    Images are looked for beside the JSON file, in ``images/`` and in ``PART/`` or ``PARTyear/`` beside it or beside its
    folder. Boxes are x, y, width, height in pixels.

    Args:
        root: The file or the folder.
        classes: Class names to use, in this order; None takes the categories in order of their ids.

    Raises:
        DataError: If a file is no COCO JSON, or an entry cannot be used.
    """
    files = _files(root)
    names: tuple[str, ...] | None = None if classes is None else check_classes(classes, "data.boxes.classes")
    folder = root if root.is_dir() else root.parent
    if folder.name == "annotations":
        folder = folder.parent
    images: list[ImageRow] = []
    boxes: list[BoxRow] = []
    missing: list[tuple[str, str]] = []
    for file, part in files:
        data = _load(file)
        known = _categories(file, data)
        if names is None:
            names = tuple(known.values())
        elif classes is None and set(known.values()) != set(names):
            raise DataError(f"{file}: categories {', '.join(known.values())}; {files[0][0]} has {', '.join(names)}")
        position, left_out = _images(file, part, data, images, missing)
        boxes += _boxes(file, data, known, names, position, left_out)
    assert names is not None
    return BoxListing(str(root), folder, images, boxes, names, missing=missing)


def _files(root: Path) -> list[tuple[Path, str | None]]:
    """JSON files with their parts."""
    if not root.is_dir():
        return [(root, None)]
    found: dict[str, Path] = {}
    for folder in (root, root / "annotations", *(p for p in sorted(root.iterdir()) if p.is_dir())):
        for path in sorted(folder.glob("*.json")):
            match = _PART_WORD.search(path.stem) or (None if folder == root else _PART_WORD.search(folder.name))
            if match is None or path in found.values():
                continue
            part = {"valid": "val", "validation": "val"}.get(match[1].lower(), match[1].lower())
            if part in found:
                raise DataError(f"{path}: and {found[part]} are both of the part {part}; give data.root the one to use")
            found[part] = path
    if "train" not in found:
        raise DataError(f"{root}: no COCO JSON of a train part, such as train.json; or give data.root a .json file")
    return [(path, part) for part, path in found.items()]


def _load(file: Path) -> dict[str, Any]:
    """The JSON object with its three lists."""
    try:
        data = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}: is no JSON: {error.msg}") from None
    except ValueError:  # the interpreter reads no whole number of thousands of digits
        raise DataError(f"{file}: holds a number of more digits than any id or size has") from None
    except RecursionError:
        raise DataError(f"{file}: is nested too deeply") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise DataError(f"{file}: is no COCO JSON: it has no list '{key}'")
        for at, entry in enumerate(data[key]):
            if not isinstance(entry, dict):
                raise DataError(f"{file}: {key}[{at}]: is {type(entry).__name__}, expected an object")
    return data


def _categories(file: Path, data: dict[str, Any]) -> dict[Any, str]:
    """Class name by category id, in order of the ids."""
    found: dict[Any, str] = {}
    for at, entry in enumerate(data["categories"]):
        identity, name = _identity(file, f"categories[{at}]", entry, "id"), entry.get("name")
        if identity in found:
            raise DataError(f"{file}: categories[{at}]: id {identity} comes twice")
        if not isinstance(name, str):
            raise DataError(f"{file}: categories[{at}]: has no name")
        found[identity] = name
    check_classes(list(found.values()), f"{file}: categories")
    return dict(sorted(found.items()))


def _identity(file: Path, where: str, entry: dict[str, Any], key: str) -> int:
    """An id, which COCO has as a whole number."""
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(f"{file}: {where}: {key} is {value!r}; a whole number is needed")
    return value


def _images(
    file: Path, part: str | None, data: dict[str, Any], images: list[ImageRow], missing: list[tuple[str, str]]
) -> tuple[dict[int, int], set[int]]:
    """Add the images; return the position of each id, and the ids of images that are not there."""
    places = _places(file, part)
    position: dict[int, int] = {}
    left_out: set[int] = set()
    seen: dict[Path, str] = {image.path: image.where for image in images}
    for at, entry in enumerate(data["images"]):
        where = f"{file}: images[{at}]"
        identity, named = _identity(file, f"images[{at}]", entry, "id"), entry.get("file_name")
        if identity in position or identity in left_out:
            raise DataError(f"{where}: id {identity} comes twice")
        if not isinstance(named, str):
            raise DataError(f"{where}: has no file_name")
        candidates = [inside(place, named, where) for place in places]
        path = next((candidate for candidate in candidates if candidate.is_file()), None)
        if path is None:
            missing.append((str(candidates[0]), f"named by {where}, is not there"))
            left_out.add(identity)
            continue
        if path in seen:
            raise DataError(f"{where}: {path} is named by {seen[path]} too; an image has one entry")
        seen[path] = where
        size = (entry.get("height"), entry.get("width"))
        declared = None if None in size else tuple(int(number(v, where, "the size")) for v in size)
        images.append(ImageRow(path, part, declared, where))  # type: ignore[arg-type]
        position[identity] = len(images) - 1
    return position, left_out


def _places(file: Path, part: str | None) -> list[Path]:
    """Folders in which images may lie."""
    bases = [file.parent] + ([file.parent.parent] if file.parent.name == "annotations" else [])
    words = [] if part is None else [word for word in (part, "valid") if part == "val" or word == part]
    years = re.findall(r"(?:train|val|test)\d{4}", file.stem)
    return [place for base in bases for place in (base, base / "images", *(base / w for w in (*words, *years)))]


def _boxes(
    file: Path,
    data: dict[str, Any],
    known: dict[Any, str],
    names: tuple[str, ...],
    position: dict[int, int],
    left_out: set[int],
) -> list[BoxRow]:
    """The annotations of images that are there."""
    rows = []
    for at, entry in enumerate(data["annotations"]):
        where = f"{file}: annotations[{at}]"
        image, category = (_identity(file, f"annotations[{at}]", entry, key) for key in ("image_id", "category_id"))
        if image in left_out:
            continue
        if image not in position:
            raise DataError(f"{where}: image_id {image} is the id of no image")
        if category not in known:
            raise DataError(f"{where}: category_id {category} is the id of no category")
        box = entry.get("bbox")
        if not isinstance(box, list) or len(box) != 4:
            raise DataError(f"{where}: bbox is {box!r}; expected [x, y, width, height]")
        x, y, width, height = (number(value, where, "a number of bbox") for value in box)
        mask = _mask(where, entry.get("segmentation"))
        name = check_class(known[category], names, where)
        crowd = entry.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise DataError(f"{where}: iscrowd is {crowd!r}; allowed are 0 and 1")
        rows.append(BoxRow(position[image], (x, y, x + width, y + height), name, where, bool(crowd), mask))
    return rows


def _mask(where: str, outline: Any) -> Any:
    """Polygons or run lengths as COCO has them, None for none."""
    if outline is None or outline == []:
        return None
    if isinstance(outline, dict):
        counts, size = outline.get("counts"), outline.get("size")
        whole = isinstance(size, list) and len(size) == 2 and all(type(v) is int and v > 0 for v in size)
        if not whole or not isinstance(counts, str | list):
            raise DataError(f"{where}: segmentation needs size [height, width] and counts")
        return outline
    if not isinstance(outline, list):
        raise DataError(f"{where}: segmentation is {type(outline).__name__}; expected polygons or run lengths")
    for polygon in outline:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise DataError(f"{where}: a polygon needs at least three points as x, y, x, y, ...")
    return [[number(value, where, "a coordinate") for value in polygon] for polygon in outline]
