"""YOLO text: one file an image, one line a box: class number, centre x and y, width, height, in shares of the image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from r2kit.data.boxes.listing import BoxListing, BoxRow, ImageRow, check_classes, number, read_text
from r2kit.data.folder import PART_OF_FOLDER
from r2kit.data.reader import IMAGE_SUFFIXES, find_images
from r2kit.errors import DataError, did_you_mean

_NAME_FILES = ("data.yaml", "dataset.yaml", "data.yml", "dataset.yml", "classes.txt", "obj.names", "labels/classes.txt")


def read_yolo(root: Path, classes: Sequence[str] | None = None) -> BoxListing:
    """Read a folder with images/ and labels/, or such a pair in each of train/, val/ and test/.

    The label file of ``images/a/b.jpg`` is ``labels/a/b.txt``. Folders train, val and test directly below images/ are
    parts. An image whose label file is empty or missing has no object. A line with more than five numbers outlines the
    object by a polygon x1 y1 x2 y2 ...; its box is the polygon's.

    Args:
        root: The folder.
        classes: Names by class number; None takes data.yaml or classes.txt of the folder.

    Raises:
        DataError: If the layout is another one, no names are known, or a line cannot be used.
    """
    pairs = list(_pairs(root))
    names = check_classes(classes, "data.boxes.classes") if classes is not None else _names(root)
    images: list[ImageRow] = []
    boxes: list[BoxRow] = []
    for image_folder, label_folder, part in pairs:
        seen: dict[Path, Path] = {}
        for path in find_images([image_folder]):
            inner = path.relative_to(image_folder)
            label_file = (label_folder / inner).with_suffix(".txt")
            if label_file in seen:
                raise DataError(f"{label_file}: belongs to both {seen[label_file].name} and {path.name}; rename one")
            seen[label_file] = path
            own = PART_OF_FOLDER.get(inner.parts[0].lower()) if part is None and len(inner.parts) > 1 else part
            images.append(ImageRow(path, own, None, str(label_file)))
            if label_file.is_file():
                boxes += _boxes(label_file, len(images) - 1, names)
        _refuse_orphans(label_folder, image_folder, set(seen))
    _check_parts(root, images)
    return BoxListing(str(root), root, images, boxes, names, relative=True)


def _pairs(root: Path) -> Iterator[tuple[Path, Path, str | None]]:
    """Folders of images and labels, with the part where the layout has parts above them."""
    if not root.is_dir():
        near = [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
        raise DataError(f"{root}: no such folder{did_you_mean(root.name, near)}")
    if (root / "images").is_dir():
        if not (root / "labels").is_dir():
            raise DataError(f"{root}: has images/ but no labels/; expected images/NAME.jpg and labels/NAME.txt")
        yield root / "images", root / "labels", None
        return
    parts = [p for p in sorted(root.iterdir()) if p.name.lower() in PART_OF_FOLDER and (p / "images").is_dir()]
    if not parts:
        raise DataError(f"{root}: has no images/ and labels/; expected images/NAME.jpg and labels/NAME.txt")
    for folder in parts:
        if not (folder / "labels").is_dir():
            raise DataError(f"{folder}: has images/ but no labels/; expected images/NAME.jpg and labels/NAME.txt")
        yield folder / "images", folder / "labels", PART_OF_FOLDER[folder.name.lower()]


def _check_parts(root: Path, images: list[ImageRow]) -> None:
    """Parts that do not cover every image, or lack the training part, are none."""
    found = {image.part for image in images}
    if found == {None}:
        return
    if None in found:
        stray = next(image.path for image in images if image.part is None)
        raise DataError(f"{stray}: is in none of train, val and test, and others are")
    if "train" not in found:
        raise DataError(f"{root}: has no train part beside {', '.join(sorted(part for part in found if part))}")


def _names(root: Path) -> tuple[str, ...]:
    """Class names of data.yaml (key names, a list or a map by number) or of a text file with one name a line."""
    for name in _NAME_FILES:
        path = root / name
        if not path.is_file():
            continue
        if path.suffix in (".yaml", ".yml"):
            return check_classes(_yaml_names(path), str(path))
        return check_classes([line.strip() for line in read_text(path).splitlines() if line.strip()], str(path))
    raise DataError(
        f"{root}: names no classes; add a classes.txt with one name a line, or give data.boxes.classes=[car,truck]"
    )


def _yaml_names(path: Path) -> list[str]:
    """The key `names` of a YOLO data file."""
    try:
        data = YAML(typ="safe", pure=True).load(read_text(path))
    except YAMLError as error:
        raise DataError(f"{path}: is no YAML: {str(error).splitlines()[0]}") from None
    names: Any = data.get("names") if isinstance(data, dict) else None
    if isinstance(names, dict) and sorted(names, key=str) == sorted(range(len(names)), key=str):
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, str | int) for name in names):
        raise DataError(f"{path}: key names must be a list of class names, or a map from 0, 1, ... to them")
    return [str(name) for name in names]


def _boxes(path: Path, image: int, names: Sequence[str]) -> Iterator[BoxRow]:
    """The boxes of one label file."""
    for line, text in enumerate(read_text(path).splitlines(), 1):
        fields = text.split()
        if not fields:
            continue
        where = f"{path}:{line}"
        if len(fields) < 5 or (len(fields) > 5 and (len(fields) % 2 == 0 or len(fields) < 7)):
            raise DataError(
                f"{where}: {len(fields)} fields; expected class, centre x, centre y, width, height, or class and a "
                "polygon's x y x y ..."
            )
        kind = number(fields[0], where, "the class number")
        if kind != int(kind) or not 0 <= kind < len(names):
            raise DataError(
                f"{where}: class number {fields[0]}, and there are {len(names)} classes, 0 to {len(names) - 1} "
                f"({', '.join(names)}); name all in data.boxes.classes or mend the file"
            )
        values = [number(field, where, "a coordinate") for field in fields[1:]]
        # A coordinate far outside cannot be a share of the image: pixels were written, and all boxes would be clipped.
        if max(abs(value) for value in values) > 2.0:
            raise DataError(f"{where}: coordinates {' '.join(fields[1:5])} are no shares of the image (0 to 1)")
        mask = None
        if len(values) == 4:
            x, y, width, height = values
            corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        else:
            corners = (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
            mask = [values]
        yield BoxRow(image, corners, names[int(kind)], where, mask=mask)


def _refuse_orphans(labels: Path, images: Path, known: set[Path]) -> None:
    """A label file with boxes and no image is a mistake that would silently lose them."""
    for path in sorted(labels.rglob("*.txt")):
        if path not in known and path.name != "classes.txt" and path.stat().st_size:
            inner = path.relative_to(labels).with_suffix("")
            raise DataError(f"{path}: has no image; expected {images / inner} with one of {', '.join(IMAGE_SUFFIXES)}")
