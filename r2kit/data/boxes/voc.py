"""VOC XML: one file an image, with the corners of each object in pixels that count from one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

from r2kit.data.boxes.listing import BoxListing, BoxRow, ImageRow, check_class, check_classes, inside, number
from r2kit.data.folder import PART_OF_FOLDER
from r2kit.data.reader import IMAGE_SUFFIXES
from r2kit.errors import DataError, did_you_mean

_MAX_DEPTH = 32


@dataclass
class Element:
    """One element of an XML file with its line; namespaces and attributes are not read."""

    tag: str
    line: int
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def find(self, tag: str) -> Element | None:
        """The first child of this name."""
        return next((child for child in self.children if child.tag == tag), None)


def parse_xml(path: Path) -> Element:
    """Parse an XML file, with lines and without document types: no entity can be declared, so none can expand.

    Raises:
        DataError: If the file cannot be read, is broken, declares a document type or nests too deeply.
    """
    top = Element("", 0)
    stack = [top]
    parser = expat.ParserCreate()

    def refuse(*_: object) -> None:
        raise DataError(f"{path}:{parser.CurrentLineNumber}: declares a document type (DOCTYPE), which is not read")

    def start(tag: str, _: object) -> None:
        if len(stack) > _MAX_DEPTH:
            raise DataError(f"{path}:{parser.CurrentLineNumber}: elements nested deeper than {_MAX_DEPTH}")
        element = Element(tag, parser.CurrentLineNumber)
        stack[-1].children.append(element)
        stack.append(element)

    def text(data: str) -> None:
        stack[-1].text += data

    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.StartElementHandler = start
    parser.EndElementHandler = lambda _: stack.pop()
    parser.CharacterDataHandler = text
    try:
        parser.Parse(path.read_bytes(), True)
    except expat.ExpatError as error:
        raise DataError(f"{path}:{error.lineno}: is no XML: {expat.ErrorString(error.code)}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    return top.children[0]


def read_voc(root: Path, classes: Sequence[str] | None = None) -> BoxListing:
    """Read a folder with Annotations/*.xml and JPEGImages/, or with images and XML files side by side.

    A pixel's number counts from one and both corners belong to the object, as VOC defines it: the box of xmin 1 and
    xmax 10 reaches from 0 to 10. Parts come from ImageSets/Main/{train,val,test}.txt where those name every image.

    Args:
        root: The folder.
        classes: Class names; None takes those that occur, sorted.

    Raises:
        DataError: If the layout is another one, or a file cannot be used.
    """
    if not root.is_dir():
        near = [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
        raise DataError(f"{root}: no such folder{did_you_mean(root.name, near)}")
    annotations = root / "Annotations" if (root / "Annotations").is_dir() else root
    pictures = next((root / name for name in ("JPEGImages", "images") if (root / name).is_dir()), annotations)
    files = sorted(annotations.rglob("*.xml"))
    if not files:
        raise DataError(f"{annotations}: has no XML file; expected Annotations/NAME.xml and JPEGImages/NAME.jpg")
    parts = _parts(root)
    images: list[ImageRow] = []
    boxes: list[BoxRow] = []
    missing: list[tuple[str, str]] = []
    for file in files:
        tree = parse_xml(file)
        if tree.tag != "annotation":
            raise DataError(f"{file}:{tree.line}: the root element is <{tree.tag}>, expected <annotation>")
        picture = _picture(file, tree, annotations, pictures)
        if not picture.is_file():
            missing.append((str(picture), f"named by {file}, is not there"))
            continue
        images.append(ImageRow(picture, _part(file, annotations, parts), _size(file, tree), str(file)))
        boxes += [_box(file, item, len(images) - 1) for item in tree.children if item.tag == "object"]
    twice = {image.path for image in images}
    if len(twice) < len(images):
        paths = [image.path for image in images]
        again = next(path for path in paths if paths.count(path) > 1)
        raise DataError(f"{again}: two XML files describe it, e.g. {images[paths.index(again)].where}")
    if classes is None:
        names = tuple(sorted({box.name for box in boxes}))
        if not names:
            raise DataError(f"{root}: no object in any XML file; name the classes with data.boxes.classes=[...]")
    else:
        names = check_classes(classes, "data.boxes.classes")
        for box in boxes:
            check_class(box.name, names, box.where)
    return BoxListing(str(root), root, images, boxes, names, missing=missing)


def _picture(file: Path, tree: Element, annotations: Path, pictures: Path) -> Path:
    """The image of an XML file: the one of the same stem, else the one it names."""
    inner = file.relative_to(annotations)
    for suffix in IMAGE_SUFFIXES:
        for spelled in (suffix, suffix.upper()):
            candidate = (pictures / inner).with_suffix(spelled)
            if candidate.is_file():
                return candidate
    named = tree.find("filename")
    if named is None or not named.text.strip():
        raise DataError(f"{file}:{tree.line}: names no image (<filename>), and none of its own name is in {pictures}")
    return inside(pictures, named.text.strip(), f"{file}:{named.line}")


def _size(file: Path, tree: Element) -> tuple[int, int] | None:
    """(H, W) as declared; a size of zero, which some tools write for "unknown", counts as none."""
    size = tree.find("size")
    if size is None:
        return None
    found = []
    for name in ("height", "width"):
        element = size.find(name)
        if element is None:
            return None
        found.append(int(number(element.text.strip(), f"{file}:{element.line}", name)))
    return (found[0], found[1]) if min(found) > 0 else None


def _box(file: Path, item: Element, image: int) -> BoxRow:
    """One object."""
    where = f"{file}:{item.line}"
    name, bounds = item.find("name"), item.find("bndbox")
    if name is None or not name.text.strip():
        raise DataError(f"{where}: the object has no <name>")
    if bounds is None:
        raise DataError(f"{where}: the object has no <bndbox>; rotated boxes are not read")
    corners = []
    for tag in ("xmin", "ymin", "xmax", "ymax"):
        element = bounds.find(tag)
        if element is None:
            raise DataError(f"{file}:{bounds.line}: the <bndbox> has no <{tag}>")
        corners.append(number(element.text.strip(), f"{file}:{element.line}", tag))
    x0, y0, x1, y1 = corners
    return BoxRow(image, (x0 - 1.0, y0 - 1.0, x1, y1), name.text.strip(), where)


def _parts(root: Path) -> dict[str, str]:
    """Part of each stem, from ImageSets/Main."""
    found: dict[str, str] = {}
    for word in ("train", "val", "test"):
        path = root / "ImageSets" / "Main" / f"{word}.txt"
        if not path.is_file():
            continue
        for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            stem = text.split()[0] if text.split() else ""
            if stem and found.setdefault(stem, word) != word:
                raise DataError(f"{path}:{line}: '{stem}' is in {found[stem]}.txt too")
    return found


def _part(file: Path, annotations: Path, parts: dict[str, str]) -> str | None:
    """The part of an XML file: by ImageSets, else by a folder train, val or test above it."""
    if parts:
        if file.stem not in parts:
            raise DataError(f"{file}: is in none of train.txt, val.txt and test.txt of ImageSets/Main")
        return parts[file.stem]
    inner = file.relative_to(annotations).parts
    return PART_OF_FOLDER.get(inner[0].lower()) if len(inner) > 1 else None
