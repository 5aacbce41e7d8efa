"""A detection from the recipe to the report, through the same commands as a classification."""

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import rasterio
import safetensors.torch
import torch
from PIL import Image
from rasterio.transform import Affine

import r2kit
from r2kit.cli import main
from r2kit.data.datamodule import DataModule
from r2kit.errors import DataError, RecipeError, RunError
from r2kit.evaluate import evaluate, summary_lines
from r2kit.export import export
from r2kit.models import build_network
from r2kit.predict import predict
from r2kit.recipe_file import load_recipe
from r2kit.report import write_report
from r2kit.report.card import card_of
from r2kit.run import Run
from r2kit.tasks import DetectionTask
from tests.objects.toy import make_objects

pytestmark = [
    # Lightning names the number of loader processes; r2kit chooses it.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    # Lightning 2.6 against the newest torch.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]


def test_a_run_folder_holds_everything(detection_run):
    rows = list(csv.DictReader(detection_run.metrics_csv.read_text().splitlines()))
    assert list(rows[0]) == ["epoch", "step", "lr", "train_loss"] + [
        f"val_{name}" for name in ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
    ]
    result = json.loads(detection_run.metrics_json.read_text())
    assert result["task"] == "detection"
    assert result["split"] == "test"
    assert result["classes"] == ["square", "bar"]
    assert (detection_run.path / result["predictions"]).is_file()
    assert detection_run.info["state"] == "finished"
    page = detection_run.report.read_text()
    assert "Boxes over images" in page
    assert page.count("data:image/jpeg") >= 4


def test_evaluating_again_gives_the_same_whatever_the_batch(detection_run):
    before = json.loads(detection_run.metrics_json.read_text())
    after = evaluate(detection_run, batch_size=1)
    for name in ("map", "map_50", "map_75"):
        assert after[name] == pytest.approx(before[name])
    assert "average precision of boxes" in summary_lines(after)[1]


def test_validation_measured_what_evaluation_measures(detection_run):
    """The figure of the epoch is of whole images merged from tiles, as that of the evaluation."""
    row = next(csv.DictReader(detection_run.metrics_csv.read_text().splitlines()))
    result = evaluate(detection_run, split="val")
    assert result["map"]["value"] == pytest.approx(float(row["val_map"]), abs=1e-6)
    assert result["map_50"]["value"] == pytest.approx(float(row["val_map_50"]), abs=1e-6)


def test_one_class_and_one_object_are_not_many(detection_run, tmp_path):
    run = Run.open(shutil.copytree(detection_run.path, tmp_path / "run"))
    figures = json.loads(run.metrics_json.read_text())
    figures |= {"classes": figures["classes"][:1], "objects": 1}
    assert "1 object, " in summary_lines(figures)[0]
    prepared = json.loads(run.preprocess_file.read_text())
    run.preprocess_file.write_text(json.dumps(prepared | {"classes": ["square"]}))
    card = card_of(Run.open(run.path))
    assert "finds objects of 1 class in an image" in card
    assert "- Mean average precision of boxes" in card  # a line of a list begins with a capital
    page = detection_run.report.read_text()
    assert "2 classes" in page
    assert "1 epochs" not in page


def test_other_data_with_its_classes_in_another_order(detection_run, tmp_path):
    """What a class is called decides, not its number."""
    objects_folder = make_objects(tmp_path / "data", 4, seed=1)
    data = json.loads((objects_folder / "boxes.json").read_text())
    names = {1: "square", 2: "bar"}
    data["categories"] = [{"id": 1, "name": "bar"}, {"id": 2, "name": "square"}]
    for entry in data["annotations"]:
        entry["category_id"] = 1 if names[entry["category_id"]] == "bar" else 2
    (objects_folder / "turned.json").write_text(json.dumps(data))
    one = evaluate(detection_run, data=objects_folder / "boxes.json")
    other = evaluate(detection_run, data=objects_folder / "turned.json")
    assert one["map"] == other["map"]
    assert one["per_class"] == other["per_class"]
    assert one["objects"] == len(data["annotations"])


def test_predict_writes_boxes_in_pixels_of_the_image_and_on_the_map(detection_run, tmp_path, capsys):
    rng = np.random.default_rng(0)
    pixels = rng.normal(90, 12, (100, 150, 3)).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    with rasterio.open(
        tmp_path / "b.tif",
        "w",
        driver="GTiff",
        height=100,
        width=150,
        count=3,
        dtype="uint8",
        transform=Affine(0.5, 0, 500_000, 0, -0.5, 5_000_000),
        crs="EPSG:32633",
        photometric="RGB",
    ) as file:
        file.write(pixels.transpose(2, 0, 1))
    (tmp_path / "c.png").write_bytes(b"nothing")
    table = predict(detection_run, tmp_path / "a.png")
    assert list(table.columns) == ["path", "class", "score", "x0", "y0", "x1", "y1", "mask"]
    corners = table[["x0", "y0", "x1", "y1"]].to_numpy()
    assert (corners >= 0).all()
    assert (corners[:, [0, 2]] <= 150).all()
    assert (corners[:, [1, 3]] <= 100).all()
    images = [str(tmp_path / name) for name in ("a.png", "b.tif")]
    with pytest.raises(SystemExit) as done:
        main(["predict", str(detection_run.path), *images, "-o", f"{tmp_path}/out"])
    assert done.value.code == 0
    assert "out.geojson" in capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text())
    assert [image["width"] for image in written["images"]] == [150, 150]
    places = json.loads((tmp_path / "out.geojson").read_text())["features"]
    of_raster = pd.read_csv(tmp_path / "out.csv").query("path.str.endswith('b.tif')")
    assert len(places) == len(of_raster)
    with pytest.raises(DataError, match=r"1 of 2 images could not be read.*out\.csv"):
        predict(detection_run, [tmp_path / "a.png", tmp_path / "c.png"], out=tmp_path / "out")
    assert predict(detection_run, tmp_path / "c.png", on_bad_file="skip").empty
    with pytest.raises(RunError, match="boxes have none to average"):
        predict(detection_run, tmp_path / "a.png", tta=True)
    with pytest.raises(RunError, match="boxes have none to average"):
        evaluate(detection_run, tta=True)


def test_the_report_can_do_without_its_images(detection_run, objects_folder, tmp_path):
    shutil.copytree(detection_run.path, tmp_path / "run")
    run = r2kit.Run.open(tmp_path / "run")
    run.recipe_file.write_text(run.recipe_file.read_text().replace(str(objects_folder), str(tmp_path / "gone")))
    page = write_report(run).read_text()
    assert "No images here" in page
    assert "average precision" in page
    run.metrics_json.unlink()
    with pytest.raises(RunError, match="the run has no result yet"):
        write_report(run)


@pytest.mark.parametrize("kind", ["retinanet", pytest.param("fcos", marks=pytest.mark.slow)])
def test_other_detectors_whole_images_and_measured_anchors(detection_recipe, objects_folder, tmp_path, kind):
    overrides = [f"task.model={kind}", "data.resize=pad", "augment.preset=natural"]
    overrides += ["data.val_fraction=0.2", "task.width=64"]
    run = r2kit.finetune(detection_recipe, overrides=overrides, out=tmp_path / "run", quiet=True)
    assert json.loads(run.metrics_json.read_text())["task"] == "detection"


def test_anchors_are_measured_on_the_training_boxes(detection_recipe, tmp_path):
    recipe = load_recipe(
        {**detection_recipe, "data": {**detection_recipe["data"], "root": str(make_objects(tmp_path / "data", 48))}},
        ["task.anchors=auto"],
    )
    data = DataModule(recipe.data, recipe.augment, seed=0, batch_size=2, target=recipe.target)
    data.setup()
    model = build_network(recipe, num_classes=2, bands=data.preprocess.bands)
    DetectionTask.from_data(recipe, model, data)
    sides = sorted(model.network.rpn.anchor_generator.scales.flatten().tolist())
    assert sides[0] == pytest.approx(14, abs=0.01)  # the side of a square
    assert sides[1] == pytest.approx((26 * 10) ** 0.5, abs=0.01)
    few = data.split.train[:10]
    data.split = replace(data.split, train=few)
    with pytest.raises(DataError, match="auto measures at least 50 training boxes"):
        DetectionTask.from_data(recipe, model, data)


def test_instances_with_outlines(detection_recipe, objects_folder, tmp_path):
    overrides = ["task.kind=instance", f"data.root={objects_folder / 'boxes.json'}", "data.image_size=48"]
    overrides += ["task.model=mask_rcnn", "train.batch_size=2", "task.regions=16", "data.limit=10"]
    recipe = {**detection_recipe, "task": {"kind": "instance", "width": 16, "max_detections": 5}}
    run = r2kit.finetune(recipe, overrides=overrides, out=tmp_path / "run", quiet=True)
    result = json.loads(run.metrics_json.read_text())
    assert result["task"] == "instance"
    assert result["boxes"]["map"]["value"] is not None
    found = predict(run, objects_folder / "images" / "00.png", out=tmp_path / "out")
    written = json.loads((tmp_path / "out.json").read_text())
    assert len(written["annotations"]) == len(found)
    assert all("segmentation" in entry for entry in written["annotations"])
    pytest.importorskip("onnxruntime")
    (made,) = export(run, ["onnx"], out=tmp_path / "exported")
    assert made.difference <= 1e-4
    boxes, masks = (np.load(tmp_path / "exported" / f"golden_{name}.npy") for name in ("output", "masks"))
    assert len(boxes) == len(masks)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["augment.mixup=0.5"], "augment.mixup: MixUp and CutMix blend labels of whole images"),
        (["data.sampler=balanced"], "data.sampler: balanced is for images of one class"),
        (["data.source=table"], "data.source: table has no boxes"),
        (["task.model=fcos", "task.anchors=auto"], "task.anchors: fcos has none"),
        (["task.model=fcos"], "task.width: fcos normalises each of 32 channels on its own"),
        (["task.model=mask_rcnn"], "task.model: got mask_rcnn"),
        (["data.resize=pad", "data.boxes.overlap=0.5"], "data.boxes.overlap: has no effect with data.resize=pad"),
        (["task.kind=classification"], "unknown key|augment.mosaic: is for boxes"),
    ],
)
def test_recipes_that_contradict_themselves(detection_recipe, overrides, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(detection_recipe, overrides)


def test_only_boxes_have_mosaics(detection_recipe):
    for key in ("augment.mosaic=0.5", "augment.copy_paste=0.1", "data.boxes.overlap=0.5"):
        with pytest.raises(RecipeError, match=r"is for boxes|reads no boxes"):
            load_recipe({}, [key])


def test_data_without_objects_in_a_part_is_refused(detection_recipe, tmp_path):
    root = make_objects(tmp_path / "data", 12)
    for path in sorted((root / "labels").iterdir())[1:]:
        path.write_text("")
    with pytest.raises(DataError, match="images hold no object"):
        r2kit.finetune(detection_recipe, overrides=[f"data.root={root}"], out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_figures_do_not_depend_on_the_number_of_processes(detection_recipe, detection_run, tmp_path):
    """An uneven share of images: the figures after training nothing are those of one process."""
    from r2kit.recipe_file import to_yaml

    (tmp_path / "toy.yaml").write_text(to_yaml(load_recipe(detection_recipe, ["data.val_fraction=0.25"])))
    rows = []
    for devices in (1, 2):
        out = tmp_path / f"run{devices}"
        command = [sys.executable, "-m", "r2kit", "finetune", str(tmp_path / "toy.yaml"), "--out", str(out)]
        command += [f"train.devices={devices}", f"train.strategy={'ddp' if devices > 1 else 'auto'}", "train.lr=1e-12"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
        assert done.returncode == 0, done.stderr
        result = r2kit.Run.open(out)
        row = next(csv.DictReader(result.metrics_csv.read_text().splitlines()))
        again = evaluate(result, split="val")
        assert float(row["val_map"]) == pytest.approx(again["map"]["value"], abs=1e-6)
        rows.append(row)


def test_a_detector_gives_its_backbone_to_a_classification(detection_run):
    model = r2kit.create_model("test_resnet", pretrained=str(detection_run.path), num_classes=4)
    found = safetensors.torch.load_file(detection_run.weights_file)
    own = model.state_dict()
    assert set(model.load_report.missing) == {"fc.weight", "fc.bias"}
    for name in own.keys() - {"fc.weight", "fc.bias"}:
        assert torch.equal(own[name], found[f"network.backbone.body.{name}"])
