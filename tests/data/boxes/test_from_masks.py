import json

import numpy as np
import pytest
from PIL import Image

from r2kit.data.boxes.from_masks import masks_to_coco
from r2kit.data.boxes.source import open_boxes
from r2kit.errors import DataError
from r2kit.recipe import DataSpec


@pytest.fixture
def lakes(tmp_path):
    """Two images of 20 x 30: a lake and an island in a corner, and a speck; and nothing."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    mask = np.zeros((20, 30), dtype=np.uint8)
    mask[5:9, 10:16], mask[9, 16] = 2, 2  # joined at a corner
    mask[0:3, 0:2] = 5
    mask[15, 15] = 2
    for name, values in (("a", mask), ("b", np.zeros_like(mask))):
        Image.fromarray(np.repeat(values[..., None] * 40, 3, axis=2)).save(tmp_path / "images" / f"{name}.jpg")
        Image.fromarray(values).save(tmp_path / "masks" / f"{name}.png")
    return tmp_path


def test_patches_become_boxes_and_outlines_that_our_reader_reads(lakes):
    file = masks_to_coco(lakes, {"lake": 2, "island": 5})
    assert [entry["bbox"] for entry in json.loads(file.read_text())["annotations"]] == [[10, 5, 7, 5], [0, 0, 2, 3]]
    source = open_boxes(DataSpec(root=str(file)), outlines=True)
    assert source.classes == ("lake", "island")
    target = source.read_target(0)
    assert target.boxes.tolist() == [[10, 5, 17, 10], [0, 0, 2, 3]]
    mask = np.asarray(Image.open(lakes / "masks" / "a.png")).copy()
    mask[15, 15] = 0
    assert np.array_equal(target.masks[0], mask == 2)
    assert np.array_equal(target.masks[1], mask == 5)
    assert len(source.read_target(1).boxes) == 0


def test_a_missing_mask_another_size_and_no_object_are_one_line(lakes):
    with pytest.raises(DataError, match="no patch of 500 pixels of lake in the masks"):
        masks_to_coco(lakes, {"lake": 2}, min_pixels=500)
    Image.new("L", (30, 10)).save(lakes / "masks" / "b.png")
    with pytest.raises(DataError, match="is 10 x 30, its image 20 x 30"):
        masks_to_coco(lakes, {"lake": 2})
    (lakes / "masks" / "b.png").unlink()
    with pytest.raises(DataError, match=r"b.jpg: has no mask; want masks/b.\* beside"):
        masks_to_coco(lakes, {"lake": 2})
