"""Prediction of image files: order, numbers, files written, and images that cannot be read."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import r2kit
from r2kit.data.reader import read_image
from r2kit.errors import DataError
from r2kit.predict import predict
from tests.conftest import make_images


@pytest.fixture
def images(tmp_path):
    folder = make_images(tmp_path / "new", 4, size=28, seed=5)
    for file in (folder / "sand").iterdir():
        shutil.move(file, folder / f"sand-{file.name}")
    (folder / "sand").rmdir()
    return folder


def test_a_folder_gives_one_row_an_image_with_the_models_own_probabilities(finished_run, images):
    table = predict(finished_run, images)
    names = finished_run.preprocess.classes
    assert list(table) == ["path", "class", "confidence", *(f"prob_{name}" for name in names)]
    assert table["path"].tolist() == sorted(table["path"])
    assert len(table) == 12
    raw = torch.stack([finished_run.preprocess.apply(read_image(path)) for path in table["path"]])
    with torch.inference_mode():
        expected = finished_run.model()(raw).softmax(1).numpy()
    probs = table[[f"prob_{name}" for name in names]].to_numpy()
    np.testing.assert_allclose(probs, expected, atol=1e-5)
    np.testing.assert_allclose(table["confidence"], probs.max(1))
    assert table["class"].tolist() == [names[i] for i in probs.argmax(1)]


@pytest.mark.parametrize("transforms", [[], [{"name": "GaussNoise", "p": 0.1}]])
def test_a_large_jpeg_is_read_as_in_evaluation(quick_recipe, tmp_path, transforms):
    rng = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / "large" / name).mkdir(parents=True)
        for number in range(10):  # fine texture, of which a JPEG decoded smaller keeps another share
            pixels = rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "large" / name / f"{number}.jpg", quality=95)
    recipe = {**quick_recipe, "augment": {"transforms": transforms}}
    overrides = [f"data.root={tmp_path / 'large'}", "train.epochs=1"]
    run = r2kit.finetune(recipe, overrides=overrides, out=tmp_path / "run", quiet=True)
    module = run.datamodule()
    module.setup()
    rows = module.split.test
    raw = torch.stack([run.preprocess.apply(module.source.read(row)) for row in rows])
    with torch.inference_mode():
        expected = run.model()(raw).softmax(1).numpy()
    found = predict(run, [module.source.manifest["path"].iloc[row] for row in rows]).filter(like="prob_").to_numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_averaged_predictions_do_not_depend_on_how_a_file_lies(finished_run, images, tmp_path):
    raw = read_image(sorted(images.rglob("*.png"))[0])
    raw[:8] //= 8  # its upper third in shadow
    turned = tmp_path / "turned"
    turned.mkdir()
    for turns in range(4):
        Image.fromarray(np.rot90(raw, turns)).save(turned / f"{turns}.png")
    plain, averaged = predict(finished_run, turned), predict(finished_run, turned, tta=True)
    assert (plain.attrs["tta"], averaged.attrs["tta"]) == (False, True)
    assert np.ptp(averaged.filter(like="prob_").to_numpy(), axis=0).max() < 1e-3  # what resizing 8 bits rounds
    assert np.ptp(plain.filter(like="prob_").to_numpy(), axis=0).max() > 1e-2


def test_nothing_depends_on_the_batch_size(finished_run, images):
    one, many = predict(finished_run, images, batch_size=1), predict(finished_run, images, batch_size=7)
    pd.testing.assert_frame_equal(one, many, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["found", "found.csv", "found.parquet", "deeper/v1.2"])
def test_csv_and_parquet_hold_the_table(finished_run, images, tmp_path, name):
    table = predict(finished_run, [images / "field", images / "sand-000.png"], out=tmp_path / name)
    stem = {"deeper/v1.2": "deeper/v1.2"}.get(name, "found")
    csv, parquet = pd.read_csv(tmp_path / f"{stem}.csv"), pd.read_parquet(tmp_path / f"{stem}.parquet")
    assert len(table) == 5
    pd.testing.assert_frame_equal(csv, table, check_dtype=False)
    pd.testing.assert_frame_equal(parquet, table, check_dtype=False)


def _break(images):
    broken = images / "field" / "000.png"
    broken.write_bytes(broken.read_bytes()[:200])
    (images / "water" / "note.png").write_text("no picture")
    return broken


def test_unreadable_images_are_listed_and_the_others_are_still_written(finished_run, images, tmp_path):
    broken = _break(images)
    with pytest.raises(DataError) as caught:
        predict(finished_run, images, out=tmp_path / "found", batch_size=2)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("2 of 13 images could not be read")
    assert str(broken) in line
    assert "note.png" in line
    assert "the other 11 are in" in line
    assert "mend or remove them" in line
    assert len(pd.read_csv(tmp_path / "found.csv")) == 11


def test_skipped_images_are_returned_with_their_reason(finished_run, images):
    broken = _break(images)
    table = predict(finished_run, images, on_bad_file="skip")
    assert len(table) == 11
    assert str(broken) not in set(table["path"])
    assert [path for path, _ in table.attrs["skipped"]] == [str(broken), str(images / "water" / "note.png")]
    assert all(reason for _, reason in table.attrs["skipped"])


def test_only_unreadable_images_give_an_empty_table(finished_run, tmp_path):
    (tmp_path / "x.png").write_text("no picture")
    table = predict(finished_run, tmp_path / "x.png", on_bad_file="skip")
    assert len(table) == 0
    assert "confidence" in table


def test_grey_and_turned_images_are_read_like_training_images(finished_run, tmp_path):
    grey = np.random.default_rng(0).integers(0, 255, (30, 20), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert len(predict(finished_run, tmp_path / "grey.png")) == 1


def test_a_missing_path_is_refused(finished_run, tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        predict(finished_run, tmp_path / "nowhere")


def test_a_place_that_cannot_be_written_is_refused(finished_run, images, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        predict(finished_run, images / "field", out=tmp_path / "file" / "found")


@pytest.mark.slow
def test_nothing_depends_on_the_number_of_workers(finished_run, images):
    pd.testing.assert_frame_equal(predict(finished_run, images), predict(finished_run, images, workers=2))
