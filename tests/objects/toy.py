"""Small sets of images with objects."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("square", "bar")
_SHAPES = ((14, 14, (230, 60, 60)), (26, 10, (40, 60, 220)))  # width, height, colour


def make_objects(root: Path, count: int, size: tuple[int, int] = (80, 112), seed: int = 0) -> Path:
    """Write a YOLO folder with a red square and a blue bar in most images, and boxes.json, the same as COCO."""
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    rng = np.random.default_rng(seed)
    height, width = size
    images, annotations = [], []
    for number in range(count):
        pixels = rng.normal(90, 12, (height, width, 3))
        lines = []
        images.append({"id": number, "file_name": f"{number:02d}.png", "height": height, "width": width})
        for kind, (w, h, colour) in enumerate(_SHAPES):
            if number % 7 == 6:
                continue  # an image without an object
            x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
            pixels[y : y + h, x : x + w] = colour
            lines.append(f"{kind} {(x + w / 2) / width} {(y + h / 2) / height} {w / width} {h / height}")
            outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            entry = {"id": len(annotations), "image_id": number, "category_id": kind + 1, "bbox": [x, y, w, h]}
            annotations.append({**entry, "segmentation": outline})
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / "images" / f"{number:02d}.png")
        (root / "labels" / f"{number:02d}.txt").write_text("\n".join(lines))
    (root / "classes.txt").write_text("\n".join(CLASSES))
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    data = {"images": images, "annotations": annotations, "categories": categories}
    (root / "boxes.json").write_text(json.dumps(data))
    return root
