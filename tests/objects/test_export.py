"""A detector as ONNX: the boxes of PyTorch, for images of any size."""

import json

import numpy as np
import pytest

from r2kit.errors import RunError
from r2kit.export import export
from r2kit.export.detector import largest_difference

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
