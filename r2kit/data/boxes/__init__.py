"""Boxes in images as people bring them: COCO JSON, YOLO text and VOC XML, read into one table."""

from r2kit.data.boxes.coco import read_coco
from r2kit.data.boxes.listing import BoxListing, BoxRow, ImageRow
from r2kit.data.boxes.settle import BadBox, Boxes, settle
from r2kit.data.boxes.voc import read_voc
from r2kit.data.boxes.yolo import read_yolo

__all__ = [
    "BadBox",
    "BoxListing",
    "BoxRow",
    "Boxes",
    "ImageRow",
    "read_coco",
    "read_voc",
    "read_yolo",
    "settle",
]
