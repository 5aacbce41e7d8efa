"""Boxes and masks on the pixels they belong to, through every step between the file and the network."""

from pathlib import Path

import numpy as np
import pytest
import torch

from r2kit.data.boxes.samples import BoxSamples
from r2kit.data.boxes.source import open_boxes
from r2kit.data.datamodule import DataModule
from r2kit.errors import DataError
from r2kit.recipe import AugmentSpec, BoxSpec, DataSpec
from tests.objects.toy import make_objects


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_objects(tmp_path_factory.mktemp("objects") / "set", 14, size=(90, 130))


def module(folder, *, outlines=False, **changes) -> DataModule:
    root = folder / "boxes.json" if outlines else folder
    augment = AugmentSpec(**changes.pop("augment", {"preset": "overhead", "mosaic": 0.4, "copy_paste": 0.4}))
    spec = DataSpec(root=str(root), image_size=64, workers=0, **changes)
    data = DataModule(spec, augment, seed=1, batch_size=4, target="outlines" if outlines else "boxes")
    data.setup()
    return data


def coloured(image, label):
    """Where the red squares (1) or blue bars (2) are in an image (3, H, W) of raw values."""
    red, green, blue = image
    strong, weak = (red, blue) if label == 1 else (blue, red)
    return (strong - weak > 60) & (strong - green > 40)


@pytest.mark.parametrize("outlines", [False, True])
@pytest.mark.parametrize("resize", ["tile", "pad"])
def test_inputs_of_an_epoch_are_counted_as_the_loaders_have_them(folder, resize, outlines):
    data = module(folder, outlines=outlines, resize=resize)
    pieces = sum(len(batch["image"]) for batch in data.val_dataloader())
    assert data.inputs_of_epoch() == (len(data.train_dataloader().sampler), pieces)
    assert (pieces > len(data.split.val)) == (resize == "tile")  # images of 90 x 130 in tiles of 64


@pytest.mark.parametrize("outlines", [False, True])
@pytest.mark.parametrize("resize", ["tile", "pad", "squash", "crop"])
def test_boxes_follow_the_pixels_in_training(folder, resize, outlines):
    data = module(folder, outlines=outlines, resize=resize)
    samples = data._samples(True, data.split.train)
    assert isinstance(samples, BoxSamples)
    seen = 0
    for epoch in range(6):
        for at in samples.keys(data.split.train):
            sample = samples[(epoch, int(at))]
            image = sample["image"].numpy().astype(float)
            assert image.shape == (3, 64, 64)
            for position, (box, label) in enumerate(zip(sample["boxes"].numpy(), sample["labels"], strict=True)):
                x0, y0, x1, y1 = box
                assert 0 <= x0 < x1 <= 64
                assert 0 <= y0 < y1 <= 64
                inner = coloured(image, int(label))[round(y0 + 1) : round(y1 - 1), round(x0 + 1) : round(x1 - 1)]
                if inner.size >= 9:
                    assert inner.mean() > 0.9  # haze and light change colours a little
                    seen += 1
                if outlines:
                    mask = sample["masks"][position].numpy()
                    ys, xs = np.nonzero(mask)
                    np.testing.assert_allclose([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], box, atol=1.6)
                    assert coloured(image, int(label))[mask].mean() > 0.7
            again = samples[(epoch, int(at))]
            assert torch.equal(again["image"], sample["image"])
            assert torch.equal(again["boxes"], sample["boxes"])
    assert seen > 60


def test_every_object_is_in_some_tile(folder):
    data = module(folder, resize="tile", augment={"preset": "none"})
    samples = data._samples(True, data.split.train)
    keys = samples.keys(data.split.train)
    assert len(keys) > 2 * len(data.split.train)
    whole = 0
    for at in keys:
        sample, unit = samples[(0, int(at))], samples.units[int(at)]
        raw = data.source.read(unit.row)
        top, left, height, width = unit.window
        np.testing.assert_array_equal(
            sample["image"].numpy().transpose(1, 2, 0), raw[top : top + height, left : left + width]
        )
        sides = sample["boxes"][:, 2:] - sample["boxes"][:, :2]
        whole += int(((sides - torch.tensor([14.0, 14.0])).abs() < 0.01).all(1).sum())
    squares = data.object_counts().loc["square", "train"]
    assert whole >= squares


def test_evaluation_gives_every_piece_and_the_truth(folder):
    data = module(folder, resize="tile")
    batch = next(iter(data.val_dataloader()))
    assert set(batch) == {"image", "pieces", "truth", "index"}
    assert len(batch["image"]) == sum(len(pieces) for pieces in batch["pieces"])
    assert batch["image"].dtype == torch.float32
    for pieces, truth, row in zip(batch["pieces"], batch["truth"], batch["index"].tolist(), strict=True):
        assert pieces[0].shape == (90, 130)
        np.testing.assert_array_equal(truth.boxes, data.source.read_target(row).boxes)


def test_an_image_smaller_than_a_tile_keeps_its_scale(tmp_path):
    root = make_objects(tmp_path / "set", 12, size=(40, 50))
    for augment in ({"preset": "none"}, {"preset": "overhead"}):
        data = module(root, resize="tile", augment=augment)
        samples = data._samples(True, data.split.train)
        for at in samples.keys(data.split.train):
            sides = (lambda b: (b[:, 2:] - b[:, :2]).sort(1).values)(samples[(0, int(at))]["boxes"])
            assert (sides <= torch.tensor([14.01, 26.01])).all()
        found = data._samples(False, data.split.val)[(0, int(data.split.val[0]))]
        assert found["image"].shape == (1, 3, 64, 64)
        assert found["pieces"][0].placement.target[2:] == (40, 50)


def test_crowds_are_not_taught(tmp_path):
    import json

    root = make_objects(tmp_path / "set", 12)
    data = json.loads((root / "boxes.json").read_text())
    for entry in data["annotations"]:
        entry["iscrowd"] = int(entry["category_id"] == 2)
    (root / "boxes.json").write_text(json.dumps(data))
    opened = module(root, outlines=True, resize="pad", augment={"preset": "none"})
    samples = opened._samples(True, opened.split.train)
    labels = torch.cat([samples[(0, int(at))]["labels"] for at in samples.keys(opened.split.train)])
    assert set(labels.tolist()) == {1}
    truth = next(iter(opened.val_dataloader()))["truth"]
    assert any(target.crowd.any() for target in truth)


def spec(root, **boxes) -> DataSpec:
    return DataSpec(root=str(root), workers=0, boxes=BoxSpec(**boxes))


def test_the_format_is_seen(folder, tmp_path):
    assert open_boxes(spec(folder), outlines=False).classes == ("square", "bar")
    assert open_boxes(spec(folder / "boxes.json"), outlines=True).target == "outlines"
    with pytest.raises(DataError, match=r"have no outline, which task\.kind=instance learns from"):
        open_boxes(spec(folder), outlines=True)
    with pytest.raises(DataError, match="holds no boxes that are known"):
        open_boxes(spec(folder / "images"), outlines=False)
    with pytest.raises(DataError, match="no file of boxes"):
        open_boxes(spec(folder / "classes.txt"), outlines=False)
    with pytest.raises(DataError, match="did you mean 'set'"):
        open_boxes(spec(folder.parent / "sett"), outlines=False)


def test_missing_and_broken_images(tmp_path):
    root = make_objects(tmp_path / "set", 6)
    (root / "images" / "00.png").unlink()
    with pytest.raises(DataError, match=r"00\.png: named by .*images\[0\], is not there"):
        open_boxes(spec(root / "boxes.json"), outlines=False)
    lenient = spec(root / "boxes.json").model_copy(update={"on_bad_file": "skip"})
    (root / "images" / "02.png").write_bytes(b"broken")
    source = open_boxes(lenient, outlines=False)
    assert source.manifest["id"].tolist() == [f"images/0{i}.png" for i in (1, 3, 4, 5)]
    assert len(source.skipped) == 2
    # The boxes of the others are still theirs.
    whole = open_boxes(spec(make_objects(tmp_path / "again", 6) / "boxes.json"), outlines=False)
    np.testing.assert_array_equal(source.read_target(1).boxes, whole.read_target(3).boxes)
    assert whole.fingerprint == open_boxes(spec(tmp_path / "again" / "boxes.json"), outlines=False).fingerprint


def test_data_check_names_bad_boxes(tmp_path):
    from r2kit.data.check import check_data
    from r2kit.recipe_file import load_recipe

    root = make_objects(tmp_path / "set", 24)
    lines = (root / "labels" / "03.txt").read_text().splitlines()
    (root / "labels" / "03.txt").write_text("\n".join([*lines, lines[0], "1 0.99 0.5 0.4 0.1", "0 0.5 0.5 0 0.1"]))
    (root / "classes.txt").write_text("square\nbar\nship")
    recipe = load_recipe({"data": {"root": str(root)}, "task": {"kind": "detection"}})
    verdict = check_data(recipe, tmp_path / "out")
    found = {finding.kind: finding for finding in verdict.findings}
    assert verdict.untrue
    assert "1 box(es) reach out of their image and 1 lie outside or have no area" in found["boxes"].text
    assert "03.txt:4" in found["boxes"].text
    assert "listed twice" in found["boxes twice"].text
    assert "ship" in found["classes"].text
    assert found["small classes"].text == "test has 4 image(s), fewer than 5: figures on so few are all but chance"
    assert "03.png" in (tmp_path / "out" / "check.html").read_text()
    lenient = load_recipe(recipe, ["data.boxes.on_bad_box=mend"])
    assert not check_data(lenient, tmp_path / "out").untrue
