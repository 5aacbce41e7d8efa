"""A detector as ONNX: the boxes and masks of PyTorch, for images of any size, also where nothing is found."""

import json

import numpy as np
import pytest
import torch

from r2kit.data.preprocess import Preprocess
from r2kit.errors import RunError
from r2kit.export import export
from r2kit.export.detector import DeployedDetector, detector_to_onnx, largest_difference, plain_detector
from r2kit.objects.anchors import standard_anchors
from r2kit.objects.detectors import build_detector

PRE = Preprocess(("red", "green", "blue"), (0.4,) * 3, (0.2,) * 3, 255.0, (256, 256), "tile", "bilinear", ("a", "b"))

pytestmark = pytest.mark.filterwarnings("ignore")  # exporters deprecate parts of themselves in every release


def test_a_detector_finds_the_same_in_onnx(detection_run, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    (made,) = export(detection_run, ["onnx"], out=tmp_path / "out")
    assert made.difference <= 1e-4
    assert set(made.milliseconds) == {1}
    about = json.loads((tmp_path / "out" / "export.json").read_text())
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    inside = session.get_modelmeta().custom_metadata_map
    assert json.loads(inside["r2kit.classes"]) == about["classes"] == list(detection_run.preprocess.classes)
    image, expected = (np.load(tmp_path / "out" / f"golden_{name}.npy") for name in ("input", "output"))
    boxes, labels, scores = session.run(None, {"pixels": image})
    assert len(scores) > 0
    ours = (boxes, labels, scores)
    assert largest_difference(ours, (expected[:, :4], expected[:, 4].astype(int), expected[:, 5])) <= 1e-4
    assert set(labels) <= set(range(len(about["classes"])))


@pytest.mark.parametrize("kind", ["mask_rcnn", "fcos"])
def test_masks_and_images_without_objects_are_the_same_too(kind, tmp_path):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    masks = kind == "mask_rcnn"
    anchors = standard_anchors(kind, "small") if masks else None
    model = build_detector(kind, "test_resnet", num_classes=2, anchors=anchors, width=64, min_score=0.0).eval()
    image = np.random.default_rng(0).uniform(0, 255, (1, 3, 256, 256)).astype(np.float32)
    network = DeployedDetector(model, PRE).eval()
    find = plain_detector(network)
    scores = np.sort(find(image)[2])[::-1]
    head = model.network.roi_heads if masks else model.network
    head.score_thresh = float(scores[4] + scores[5]) / 2  # five are left
    exported = detector_to_onnx(network, image, tmp_path / "model.onnx", {}, masks=masks)
    counts = []
    for pixels in (
        image,
        image[..., :150] / 3,  # no multiple of 32
        np.zeros((1, 3, 256, 320), np.float32),
    ):
        ours, theirs = exported(pixels), find(pixels)
        assert len(ours) == 3 + masks
        assert largest_difference(ours, theirs) <= 1e-4
        counts.append(len(theirs[2]))
    assert counts[0] == 5
    if masks:
        assert exported(image)[3].shape == (5, 256, 256)
        assert 0 in counts
        other = (*find(image)[:3], 1 - find(image)[3])
        assert largest_difference(other, find(image)) > 0.1


def test_what_a_detector_cannot_be_exported_to_is_said(detection_run, tmp_path):
    for to, precisions in ((["openvino"], ["fp32"]), (["onnx"], ["fp16"])):
        with pytest.raises(RunError, match="exported to onnx in fp32 alone"):
            export(detection_run, to, precisions, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_objects_differ():
    boxes = np.array([[0, 0, 10, 10], [20, 20, 30, 30]], np.float32)
    one = (boxes, np.array([0, 1]), np.array([0.9, 0.8], np.float32))
    assert largest_difference(one, one) == 0
    swapped = tuple(part[::-1] for part in one)
    assert largest_difference(one, swapped) == 0
    assert largest_difference(one, (boxes + 5, one[1], one[2])) == pytest.approx(0.05)
    assert largest_difference(one, (boxes, np.array([0, 0]), one[2])) == float("inf")
    assert largest_difference(one, tuple(part[:1] for part in one)) == float("inf")
