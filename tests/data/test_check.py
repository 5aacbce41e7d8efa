import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rasterio.transform import Affine

from r2kit.data import findings
from r2kit.data.check import Verdict, check_data
from r2kit.data.findings import Finding
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


def test_each_kind_of_target_has_its_own_checks(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def odd_rows(source) -> list[Finding]:
        rows = np.arange(1, len(source.manifest), 2)[:, None]
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


def test_what_has_a_command_and_what_has_none(scenes: Path) -> None:
    for path in sorted((scenes / "test" / "a").iterdir())[2:]:
        path.unlink()
    (scenes / "train" / "a" / "03.png").write_bytes(b"")
    found = {finding.kind: finding for finding in check(scenes).findings}
    assert found["files"].change == "train data.on_bad_file=skip"
    assert "'a' 2: the figures of such a class are all but chance" in found["small classes"].text
    assert found["small classes"].pairs.shape == (2, 1)
    assert "split" not in found
