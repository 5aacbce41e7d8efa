"""Fixtures of the tests of detectors."""

import pytest


@pytest.fixture(scope="session")
def detection_recipe(objects_folder) -> dict:
    """A recipe that trains a tiny detector on tiles in seconds."""
    return {
        "name": "toy",
        "data": {"root": str(objects_folder), "image_size": 64, "resize": "tile", "workers": 0},
        "task": {"kind": "detection", "width": 32, "max_detections": 20},
        "model": {"name": "test_resnet"},
        "train": {"epochs": 1, "batch_size": 4, "lr": 3e-3},
        "augment": {"mosaic": 0.3, "copy_paste": 0.3},
    }


@pytest.fixture(scope="session")
def detection_run(detection_recipe, tmp_path_factory):
    """A finished run of `detection_recipe`; tests read it and do not change it."""
    import r2kit

    return r2kit.finetune(detection_recipe, out=tmp_path_factory.mktemp("runs") / "toy", quiet=True)
