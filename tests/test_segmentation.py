"""A segmentation from recipe to report, through the real command line."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.transform import Affine
from typer.testing import CliRunner

import r2kit
from r2kit.cli import app
from r2kit.data.reader import open_raster
from r2kit.data.targets import IGNORE
from r2kit.errors import DataError, RecipeError, RunError
from r2kit.evaluate import evaluate, summary_lines
from r2kit.predict import predict
from r2kit.recipe_file import load_recipe
from r2kit.report import write_report
from r2kit.train import dry_run

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]


def test_metrics_of_the_epochs(pond_run):
    history = pd.read_csv(pond_run.metrics_csv)
    columns = ["epoch", "step", "lr", "train_loss", "train_acc", "val_loss", "val_acc", "val_miou"]
    assert history.columns.tolist() == columns
    assert len(history) == 2
    assert history["val_miou"].between(0, 1).all()
    assert pond_run.info["best_epoch"] == int(history["val_miou"].argmax())


def test_the_result_is_that_of_the_stored_counts(pond_run):
    result = json.loads(pond_run.metrics_json.read_text())
    table = pd.read_parquet(pond_run.predictions("test"))
    assert result["task"] == "segmentation"
    assert result["split"] == "test"
    confusion = np.array([np.asarray(row).reshape(2, 2) for row in table["confusion"]]).sum(0)
    assert confusion.tolist() == result["confusion"]
    assert confusion.sum() == len(table) * (40 * 56 - 16)  # the corner is not known
    hit = np.diag(confusion)
    iou = hit / (confusion.sum(0) + confusion.sum(1) - hit)
    assert [row["iou"]["value"] for row in result["per_class"]] == pytest.approx(iou.tolist())
    assert result["miou"]["value"] == pytest.approx(iou.mean())
    assert result["miou"]["low"] <= iou.mean() <= result["miou"]["high"]
    assert result["baselines"]["logistic"]["miou"]["value"] > 0.9  # ponds are of another colour
    assert result["baselines"]["majority"]["miou"]["value"] < 0.55
    lines = summary_lines(result)
    assert lines[0].startswith("test mean IoU ")
    assert any("pond: IoU" in line for line in lines)


def test_validation_is_evaluated_as_the_best_epoch_was(pond_run):
    found = evaluate(pond_run, split="val", batch_size=3)
    history = pd.read_csv(pond_run.metrics_csv)
    assert found["miou"]["value"] == pytest.approx(history["val_miou"].max(), abs=1e-3)
    with pytest.raises(RunError, match="none of auto, train, val, test"):
        evaluate(pond_run, split="tset")


def test_averaging_over_orientations_stands_beside_the_result(pond_run):
    found = evaluate(pond_run, split="val", tta=True)
    assert found["predictions"] == "predictions_val_tta.parquet"
    assert "averaged over eight orientations" in summary_lines(found)[0]
    assert 0 < found["miou"]["value"] <= 1


def test_the_report_shows_masks(pond_run):
    page = write_report(pond_run).read_text(encoding="utf-8")
    assert "mean IoU" in page
    assert page.count("data:image/jpeg;base64") >= 12
    assert "pond" in page
    for name in ("batch", "predictions", "iou", "confusion", "curves"):
        assert (pond_run.plots / f"{name}.png").is_file()


def test_masks_come_in_the_size_and_place_of_their_images(pond_run, ponds, tmp_path):
    transform = Affine(10, 0, 500_000, 0, -10, 4_600_000)
    pixels = np.asarray(Image.open(ponds / "images" / "00.png"))
    tall = np.concatenate([pixels, pixels])[:, :20]
    options = {"driver": "GTiff", "count": 3, "dtype": "uint8", "photometric": "rgb", "crs": "EPSG:32633"}
    options |= {"transform": transform, "nodata": 0}
    tall[:3, :3] = 0
    with rasterio.open(tmp_path / "tall.tif", "w", height=80, width=20, **options) as out:
        out.write(tall.transpose(2, 0, 1))
    small = tmp_path / "in" / "00.png"
    small.parent.mkdir()
    Image.fromarray(pixels[:9, :7]).save(small)  # smaller than a tile
    paths = [ponds / "images" / "00.png", tmp_path / "tall.tif", small]
    table = predict(pond_run, paths, out=tmp_path / "out")
    assert [(row.height, row.width) for row in table.itertuples()] == [(40, 56), (80, 20), (9, 7)]
    assert [path.rsplit("/", 1)[-1] for path in table["mask"]] == ["00.png", "tall.tif", "00-2.png"]
    picture = Image.open(tmp_path / "out" / "00.png")
    assert picture.mode == "P"
    assert np.asarray(picture).shape == (40, 56)
    assert set(np.unique(picture)) <= {0, 1}
    with rasterio.open(tmp_path / "out" / "tall.tif") as mask:
        assert mask.transform == transform
        assert mask.crs.to_epsg() == 32633
        assert mask.nodata == IGNORE
        assert mask.tags(1)["CLASS_1"] == "pond"
        values = mask.read(1)
    assert (values[:3, :3] == IGNORE).all()  # the file says so, though the run knows no such value
    assert table[["share_land", "share_pond"]].sum(axis=1).tolist() == pytest.approx([1, 1, 1])
    assert pd.read_csv(tmp_path / "out" / "predictions.csv")["path"].tolist() == table["path"].tolist()


def test_a_large_jpeg_is_read_at_the_scale_of_the_training_images(pond_run, ponds, tmp_path):
    pixels = np.tile(np.asarray(Image.open(ponds / "images" / "00.png")), (4, 3, 1))  # 160 x 168: five tiles high
    Image.fromarray(pixels).save(tmp_path / "big.jpg", quality=100, subsampling=0)
    Image.fromarray(np.asarray(Image.open(tmp_path / "big.jpg"))).save(tmp_path / "same.png")
    table = predict(pond_run, [tmp_path / "big.jpg", tmp_path / "same.png"], out=tmp_path / "out")
    assert [(row.height, row.width) for row in table.itertuples()] == [(160, 168)] * 2
    masks = [np.asarray(Image.open(tmp_path / "out" / f"{name}.png")) for name in ("big", "same")]
    np.testing.assert_array_equal(*masks)


def test_a_broken_image_does_not_stop_the_others(pond_run, ponds, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(DataError, match=r"1 of 2 images could not be read; the other 1 are in .*out"):
        predict(pond_run, [ponds / "images" / "01.png", tmp_path / "bad.png"], out=tmp_path / "out")
    assert (tmp_path / "out" / "01.png").is_file()


def test_the_command_line(pond_run, ponds, tmp_path):
    runner = CliRunner()
    found = runner.invoke(app, ["evaluate", str(pond_run.path)])
    assert found.exit_code == 0, found.output
    assert "mean IoU" in found.output
    found = runner.invoke(app, ["predict", str(pond_run.path), str(ponds / "images"), "-o", str(tmp_path / "m")])
    assert found.exit_code == 0, found.output
    assert len(list((tmp_path / "m").glob("*.png"))) == 20


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_resized_images_train_too(pond_recipe, resize):
    dry_run(pond_recipe, overrides=[f"data.resize={resize}", "task.decoder=unet", "task.loss.lovasz=1.0"], quiet=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("augment.mixup=0.2", "augment.mixup: MixUp blends classes, and a pixel of a mask has one"),
        ("model={name: res2netplus50d, warm_start: true, pretrained: true}", "model.warm_start"),
        ("task={kind: segmentation, decoder: pan}", "task.decoder: pan pools 128 x 128 pixels into one"),
        ("task={kind: classification} data.resize=pad", "data.masks: task.kind=classification reads no masks"),
        ("task.loss.focal_gamma=3.0", "task.loss.focal_gamma: has no effect with focal=0"),
        ("task.loss.cross_entropy=0 task.loss.label_smoothing=0.1", "label_smoothing: has no effect with cross_"),
        ("task.loss.cross_entropy=0", "task.class_weights: dice and lovasz take the mean over the classes"),
        ("data.resize=pad task.overlap=0.5", "task.overlap: has no effect with data.resize=pad"),
        ("task={kind: multilabel} data.masks={}", "data.resize: only tasks that learn from masks or boxes"),
    ],
)
def test_what_does_not_go_together(pond_recipe, override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(pond_recipe, re.split(r" (?=\w+\.\w+)", override))


def test_class_weights_must_be_one_for_each_class(pond_recipe):
    with pytest.raises(RecipeError, match=r"task.class_weights: 3 weights for the 2 classes land, pond"):
        dry_run(pond_recipe, overrides=["task.class_weights=[1.0, 2.0, 3.0]"], quiet=True)


def test_the_run_starts_another_and_a_frozen_backbone_stands_still(pond_recipe, pond_run, tmp_path):
    recipe = {**pond_recipe, "train": {**pond_recipe["train"], "epochs": 1, "freeze": "backbone"}}
    recipe["model"] = {"name": "test_resnet", "pretrained": str(pond_run.path)}
    again = r2kit.finetune(recipe, out=tmp_path / "again", quiet=True)
    before, after = pond_run.model().backbone.state_dict(), again.model().backbone.state_dict()
    assert all((before[key] == after[key]).all() for key in before)


@pytest.mark.filterwarnings("ignore")  # exporters deprecate parts of themselves in every release
def test_a_scene_is_mapped_and_the_network_exported(pond_run, tmp_path):
    from r2kit.export import TOLERANCE, export
    from r2kit.maps import MapSettings, predict_map
    from tests.maps.conftest import write_raster

    rng = np.random.default_rng(1)
    scene = rng.integers(0, 255, (70, 100, 3)).astype(np.uint8)
    write_raster(tmp_path / "scene.tif", scene, photometric="RGB")
    path = predict_map(pond_run, tmp_path / "scene.tif", tmp_path / "map.tif", MapSettings(overlap=0.0))
    with open_raster(path) as file:
        assert file.shape == (70, 100)
        classes = file.read(1)
    assert set(np.unique(classes)) <= {0, 1}
    model = pond_run.model()
    image = pond_run.preprocess.normalize(torch.from_numpy(scene[:32, :32].transpose(2, 0, 1).copy())[None])
    with torch.inference_mode():
        own = model(image)[0].argmax(0).numpy()
    assert (classes[:32, :32] == own).mean() > 0.99  # equal but for ties in rounding
    (made,) = export(pond_run, ["torch-export"], out=tmp_path / "export")
    assert made.difference <= TOLERANCE["fp32"]
    assert np.load(tmp_path / "export" / "golden_output.npy").shape[1:] == (2, 32, 32)


def test_masks_never_replace_their_images(pond_run, ponds, tmp_path):
    image = tmp_path / "01.png"
    image.write_bytes((ponds / "images" / "01.png").read_bytes())
    before = image.read_bytes()
    with pytest.raises(DataError, match="could replace this image; give another --out"):
        predict(pond_run, [image], out=tmp_path)
    assert image.read_bytes() == before
    assert not (tmp_path / "predictions.csv").exists()
