import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rasterio.transform import Affine

from r2kit.data import findings
from r2kit.data.check import Verdict, check_data
from r2kit.data.datamodule import DataModule
from r2kit.data.findings import Finding
from r2kit.data.mends import in_folds
from r2kit.data.sources import open_source
from r2kit.data.splits import write_splits
from r2kit.recipe import AugmentSpec, DataSpec
from r2kit.recipe_file import load_recipe
from tests.data.test_perceptual import scene


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """A folder with its own parts: 2 classes, 12 train, 4 val and 12 test images each, all different."""
    seed = 0
    for part, count in (("train", 12), ("val", 4), ("test", 12)):
        for name in ("a", "<b>"):
            (tmp_path / "tiles" / part / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(scene(seed)).save(tmp_path / "tiles" / part / name / f"{i:02d}.png")
                seed += 1
    return tmp_path / "tiles"


def check(root: Path, *overrides: str) -> Verdict:
    return check_data(load_recipe({"data": {"root": str(root), "workers": 1}}, overrides), root.parent / "out", "train")


def kinds(verdict: Verdict, untrue: bool) -> list[str]:
    return [finding.kind for finding in verdict.findings if finding.untrue == untrue]


def test_clean_data_has_no_finding_and_a_manifest(scenes: Path) -> None:
    verdict = check(scenes)
    assert (verdict.untrue, verdict.findings) == (False, [])
    table = pd.read_parquet(scenes.parent / "out" / "manifest.parquet")
    assert len(table) == 56
    assert table["part"].value_counts().to_dict() == {"train": 24, "test": 24, "val": 8}
    assert {"id", "path", "class", "pixels", "nodata_share", "mean_red", "sha256", "height"} <= set(table.columns)


def test_copies_across_parts_make_a_result_untrue(scenes: Path) -> None:
    source = scenes / "train" / "a" / "03.png"
    (scenes / "test" / "a" / "copy.png").write_bytes(source.read_bytes())
    turned = Image.open(scenes / "train" / "a" / "05.png").transpose(Image.Transpose.ROTATE_90)
    turned.save(scenes / "test" / "a" / "turned.jpg", quality=70)
    (scenes / "train" / "a" / "again.png").write_bytes((scenes / "train" / "a" / "07.png").read_bytes())
    verdict = check(scenes)
    assert sorted(kinds(verdict, True)) == ["duplicates", "near copies"]
    assert kinds(verdict, False) == ["duplicates"]
    near = next(finding for finding in verdict.findings if finding.kind == "near copies")
    assert sorted(verdict.manifest["id"].iloc[near.pairs[0]]) == ["test/a/turned.jpg", "train/a/05.png"]
    page = (scenes.parent / "out" / "check.html").read_text()
    assert "would not be true" in page
    assert page.count("data:image/jpeg;base64,") == 2 * 3 + 2 * 4  # pairs, and four of each class
    assert "<b>/" not in page  # names of strangers are escaped
    assert "http" not in page.replace("http-equiv", "")

    assert near.change == f"train {shlex.quote(f'data.split_file={scenes.parent}/out/split.csv')}"
    mended = check(scenes, f"data.split_file={scenes.parent}/out/split.csv")
    assert not mended.untrue
    assert len(mended.manifest) - int(mended.manifest["part"].isna().sum()) == 56
    leak = next(finding for finding in verdict.findings if finding.kind == "duplicates" and finding.untrue)
    assert leak.change == "train data.on_leak=drop"

    dropped = check(scenes, "data.on_leak=drop")
    assert kinds(dropped, True) == ["near copies"]


def test_training_says_that_images_look_like_near_copies(scenes: Path) -> None:
    turned = Image.open(scenes / "train" / "a" / "05.png").transpose(Image.Transpose.ROTATE_90)
    turned.save(scenes / "test" / "a" / "turned.jpg", quality=70)
    data = DataModule(DataSpec(root=str(scenes), image_size=32), AugmentSpec(), seed=0, batch_size=4)
    data.setup()
    (note,) = data.split.warnings
    assert note.startswith("1 pair(s) of images in two parts look like near copies (turned, resized or compressed), ")
    assert f"e.g. {scenes}/train/a/05.png (train) and {scenes}/test/a/turned.jpg (test): r2kit data check" in note


def test_each_kind_of_target_has_its_own_checks(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def odd_rows(source, rows) -> list[Finding]:
        rows = rows[1::2][:, None]
        return [Finding("targets", True, f"{len(rows)} targets are odd", "make them even", rows)]

    monkeypatch.setitem(findings.TARGET_CHECKS, "mask", (odd_rows,))
    assert kinds(check(scenes), True) == []
    monkeypatch.setitem(findings.TARGET_CHECKS, "class", (odd_rows,))
    verdict = check(scenes)
    assert [(finding.kind, finding.untrue) for finding in verdict.findings] == [("targets", True)]
    assert (scenes.parent / "out" / "check.html").read_text().count("data:image/jpeg;base64,") == 6 + 2 * 4


def test_files_classes_and_splits(scenes: Path) -> None:
    (scenes / "train" / "a" / "03.png").write_bytes(b"")
    (scenes / "test" / "a" / "04.png").write_bytes((scenes / "train" / "<b>" / "04.png").read_bytes())
    verdict = check(scenes)
    assert kinds(verdict, True) == ["files"]
    assert len(verdict.skipped) == 3
    assert not check(scenes, "data.on_bad_file=skip").untrue

    few = check(scenes, "data.split=stratified", "data.folds=40")
    assert "split" in kinds(few, True)
    assert "class 'a' has" in next(f.text for f in few.findings if f.kind == "split")


def test_drift_imbalance_and_missing_pixels(tmp_path: Path, write_tiff: Callable[..., Path]) -> None:
    rows = []
    for i in range(63):
        part = "train" if i < 30 else "test" if i < 61 else "val"
        pixels = scene(i, bands=2, size=48).astype(np.int16) * (10 if part == "test" else 1)
        if part == "test":
            pixels[:30] = 0
        write_tiff(
            tmp_path / f"{i}.tif", pixels, nodata=0, transform=Affine(10, 0, 500_000 + 480 * i, 0, -10, 5_000_000)
        )
        rows.append({"path": f"{i}.tif", "label": "ab"[i in (0, 62)], "split": part})
    pd.DataFrame(rows).to_csv(tmp_path / "index.csv", index=False)
    verdict = check(tmp_path / "index.csv")
    assert not verdict.untrue  # neighbours touch and do not overlap
    texts = " | ".join(finding.text for finding in verdict.findings)
    assert "class 'a' has 61 images, 'b' only 2" in texts
    assert "1 class(es) have fewer than 5 images in test" not in texts  # 'b' has none there
    assert "band 'band1' is" in texts
    assert "% of the pixels in test have no measurement" in texts


def test_a_range_that_drifts_around_one_mean(tmp_path: Path, write_tiff: Callable[..., Path]) -> None:
    rng, rows = np.random.default_rng(0), []
    for i in range(40):
        part, spread = ("train", 10) if i < 20 else ("test", 40)
        pixels = (1000 + spread * rng.normal(size=(32, 32, 1))).astype(np.int16)
        write_tiff(tmp_path / f"{i}.tif", pixels, transform=Affine(10, 0, 500_000 + 480 * i, 0, -10, 5_000_000))
        rows.append({"path": f"{i}.tif", "label": "ab"[i % 2], "split": "val" if i < 2 else part})
    pd.DataFrame(rows).to_csv(tmp_path / "index.csv", index=False)
    drift = [finding.text for finding in check(tmp_path / "index.csv").findings if finding.kind == "drift"]
    assert len(drift) == 1
    assert drift[0].startswith("band 'band1' goes ")


def test_what_shows_nothing_or_the_same_again_is_left_out_by_a_second_file(scenes: Path) -> None:
    Image.fromarray(np.full((64, 64, 3), 7, np.uint8)).save(scenes / "train" / "a" / "flat.png")
    for name, source, angle in (("a/again", "train/a/05", 90), ("<b>/doubtful", "train/a/06", 180)):
        turned = Image.open(scenes / f"{source}.png").rotate(angle)
        turned.save(scenes / "train" / f"{name}.png")
    verdict = check(scenes)
    assert not verdict.untrue
    assert sorted(kinds(verdict, False)) == ["flat images", "near copies", "near copies"]
    clean = f"train {shlex.quote(f'data.split_file={scenes.parent}/out/clean.csv')}"
    assert {finding.change for finding in verdict.findings} == {clean}
    left = set(pd.read_csv(scenes.parent / "out" / "clean.csv")["id"])
    gone = {"train/a/flat.png", "train/a/06.png", "train/<b>/doubtful.png"}
    assert not left & gone
    assert len({"train/a/05.png", "train/a/again.png"} & left) == 1
    assert not (scenes.parent / "out" / "split.csv").exists()
    again = check(scenes, f"data.split_file={scenes.parent}/out/clean.csv")
    assert [finding.kind for finding in again.findings if "not in" not in finding.text] == []


def test_masks_are_checked(mask_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "masked"
    shutil.copytree(mask_folder, root)
    Image.fromarray(np.full((40, 40), 9, np.uint8)).save(root / "masks" / "0.png")  # none of its pixels is known
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(root / "masks" / "1.png")  # of another size
    odd = np.asarray(Image.open(root / "masks" / "2.png")).copy()
    odd[0, 0] = 77  # no class has it
    Image.fromarray(odd).save(root / "masks" / "2.png")
    classes = "data.masks.classes={bare land: 0, road: 255, sea: 3}"
    overrides = ["task.kind=segmentation", classes, "data.masks.ignore=[9]"]
    found = {finding.kind: finding for finding in check(root, *overrides).findings}
    assert found["files"].untrue
    assert found["files"].text.startswith("2 image(s) cannot be used, e.g. ")
    assert "1.png: is 20 x 20 pixels, its image 40 x 40" in found["files"].text
    assert found["masks"].text.startswith("1 mask(s) have no pixel with a class, e.g. that of ")
    assert found["masks"].pairs.tolist() == [[0]]
    assert found["masks"].change.endswith("/out/clean.csv")
    assert sorted(pd.read_csv(tmp_path / "out" / "clean.csv")["id"].str[7:-4].astype(int)) == list(range(3, 12))
    assert found["classes"].text == "no pixel of class sea"
    assert found["classes"].change == """train 'data.masks.classes={"bare land": 0, "road": 255}'"""
    mended = [shlex.split(found["classes"].change)[1], f"data.split_file={tmp_path}/out/clean.csv"]
    mended += ["data.on_bad_file=skip"]
    assert not {"masks", "classes"} & {finding.kind for finding in check(root, *overrides, *mended).findings}


def test_a_class_of_next_to_no_pixel_is_named(mask_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "masked"
    shutil.copytree(mask_folder, root)
    one = np.asarray(Image.open(root / "masks" / "3.png")).copy()
    one[0, 0] = 1
    Image.fromarray(one).save(root / "masks" / "3.png")
    classes = "data.masks.classes={land: 0, road: 255, well: 1}"
    # Images are in the order of their names: 0, 1, 10, 11, 2, 3.
    (rare,) = (f for f in check(root, "task.kind=segmentation", classes).findings if f.kind == "imbalance")
    assert rare.text.endswith("of the labelled pixels, e.g. 'well' 0.0052 %")
    assert (rare.pairs.tolist(), rare.change) == ([[5]], "train task.loss.dice=1")


def test_another_way_to_divide_is_named_and_works(tmp_path: Path) -> None:
    rows = []
    for i in range(20):
        Image.fromarray(scene(i)).save(tmp_path / f"{i}.png")
        rows.append({"path": f"{i}.png", "label": "ab"[i % 2], "group": f"g{i % 2}"})  # a group is a class
    pd.DataFrame(rows).to_csv(tmp_path / "index.csv", index=False)
    (found,) = (finding for finding in check(tmp_path / "index.csv").findings if finding.kind == "split")
    assert (found.untrue, found.change) == (True, "train data.split=stratified")
    assert "split" not in kinds(check(tmp_path / "index.csv", "data.split=stratified"), True)


def test_what_has_a_command_and_what_has_none(scenes: Path) -> None:
    for path in sorted((scenes / "test" / "a").iterdir())[2:]:
        path.unlink()
    (scenes / "train" / "a" / "03.png").write_bytes(b"")
    found = {finding.kind: finding for finding in check(scenes).findings}
    assert found["files"].change == "train data.on_bad_file=skip"
    assert "'a' 2: the figures of such a class are all but chance" in found["small classes"].text
    assert found["small classes"].pairs.shape == (2, 1)
    assert (
        found["small classes"].change == "train data.split=stratified data.folds=5"
    )  # folds alone: it has its own parts
    assert "split" not in found


def test_neighbours_are_not_divided_at_random_so_that_a_small_class_is_tested(tmp_path: Path) -> None:
    rows = []
    for i in range(36):
        Image.fromarray(scene(i)).save(tmp_path / f"{i}.png")
        rows.append({"path": f"{i}.png", "label": "ab"[i % 2], "lon": 10 + i // 6 * 0.3, "lat": 45 + i % 6 * 0.3})
    pd.DataFrame(rows).to_csv(tmp_path / "index.csv", index=False)
    large = ("data.split=blocks", "data.block_degrees=8")  # one block holds them all
    source = open_source(DataSpec(root=str(tmp_path / "index.csv")))
    change = in_folds(source, load_recipe({"data": {"root": str(tmp_path / "index.csv")}}, list(large)))
    assert "data.split=blocks data.block_degrees=" in change
    assert "stratified" not in change


def test_commands_that_mend_are_possible_with_what_is_set_already(make_folder: Callable[..., Path]) -> None:
    root = make_folder({"few": 4, "many": 90})
    found = {finding.kind: finding for finding in check(root).findings}
    assert found["small classes"].change == "train data.folds=4"  # five folds of four images cannot be
    assert found["imbalance"].change == "train data.sampler=square_root"
    spec = {"data": {"root": str(root), "workers": 1}, "task": {"class_weights": "effective_number"}}
    weighed = check_data(load_recipe(spec, ["data.folds=4", "data.fold=3"]), root.parent / "out", "train").findings
    changes = {finding.kind: finding.change for finding in weighed}
    # Class weights and a sampler exclude each other.
    assert changes["imbalance"] == "train task.class_weights=effective_number"
    assert changes["small classes"] == "train data.fold=0"
    split = root.parent / "split.csv"
    write_splits(open_source(DataSpec(root=str(root))), DataSpec(root=str(root)), 0, split)
    kept = {finding.kind: finding for finding in check(root, f"data.split_file={split}").findings}
    assert kept["small classes"].change == "train data.split_file=null data.folds=4"
    for change in (found["small classes"].change, kept["small classes"].change):
        assert kinds(check(root, *change.split()[1:]), True) == []
