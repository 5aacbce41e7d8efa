"""Every finding of a check prints a command; the command is one of ours, and the data is better off with it."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import typer
from PIL import Image
from rasterio.transform import Affine
from typer.testing import CliRunner

from r2kit.cli import app
from r2kit.data.datamodule import DataModule
from r2kit.data.findings import Kind
from r2kit.recipe import Recipe
from r2kit.recipe_file import load_recipe
from tests.data.test_perceptual import scene
from tests.objects.toy import make_objects

Found = list[tuple[str, str]]


def check(data: Path, *arguments: str) -> Found:
    """Kind and command of each finding, as `r2kit data check` prints them."""
    out = data.parent / "out"
    result = CliRunner().invoke(app, ["data", "check", str(data), *arguments, "--out", str(out)])
    assert result.exit_code in (0, 1), result.output
    lines = result.stdout.splitlines()
    found = []
    for at, line in enumerate(lines):
        if line.startswith(("untrue: ", "warning: ")):
            assert lines[at + 1].startswith("  mend: ")
            found.append((line.split(": ")[1], lines[at + 2].strip()))
    page = (out / "check.html").read_text()
    assert page.count("<p><code>r2kit ") == len(found)
    return found


def parsed(command: str) -> tuple[Any, Any]:
    """The command of ours and its arguments, read as the command line reads them; it is not run."""
    program, *words = shlex.split(command)
    assert program == "r2kit"
    found = typer.main.get_command(app)
    while hasattr(found, "commands"):
        found = found.commands[words.pop(0)]
    return found, found.make_context(found.name, words)


def recipe_of(command: str) -> Recipe:
    """The recipe that a command of training uses."""
    found, context = parsed(command)
    assert found.name == "finetune"
    assert context.params["recipe"] == "RECIPE"
    return load_recipe({"data": {"workers": 1, "image_size": 32}}, context.params["overrides"])


def trains(command: str) -> bool:
    """Whether the data can be opened and divided as a command says."""
    recipe = recipe_of(command)
    DataModule(recipe.data, recipe.augment, seed=0, batch_size=4, target=recipe.target).setup()
    return True


def write_scenes(root: Path, names: dict[str, int], start: int = 0) -> int:
    """Write root/NAME/*.png, all different; return the next seed."""
    for name, count in names.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(scene(start, size=48)).save(root / name / f"{i:02d}.png")
            start += 1
    return start


def turned(source: Path, copy: Path) -> None:
    Image.open(source).transpose(Image.Transpose.ROTATE_90).save(copy)


def many_faults(root: Path, write_tiff: Callable[..., Path]) -> Found:
    """A folder with its own parts: files, duplicates, near copies, flat images, small classes, imbalance."""
    write_scenes(root, {"train/a": 62, "train/b": 1, "test/a": 3, "test/b": 1, "val/a": 2, "val/b": 1})
    (root / "train" / "a" / "zero.png").write_bytes(b"")
    shutil.copy(root / "train" / "a" / "03.png", root / "test" / "a" / "copy.png")
    turned(root / "train" / "a" / "05.png", root / "test" / "a" / "turned.png")
    turned(root / "train" / "a" / "06.png", root / "train" / "a" / "again.png")
    Image.fromarray(np.full((48, 48, 3), 9, np.uint8)).save(root / "train" / "a" / "flat.png")
    return check(root)


def georeferenced(root: Path, write_tiff: Callable[..., Path]) -> Found:
    """A table whose parts overlap, share groups, differ in their values and in what is not measured."""
    root.mkdir()
    rows = []
    for i in range(44):
        part = "train" if i < 20 else "test" if i < 40 else "val"
        pixels = scene(i, bands=2, size=48).astype(np.int16) * (10 if part == "test" else 1)
        if part == "test":
            pixels[:20] = 0
        place = Affine(10, 0, 500_000 + 480 * (i % 39), 0, -10, 5_000_000)
        write_tiff(root / f"{i}.tif", pixels, nodata=0, transform=place)
        rows.append({"path": f"{i}.tif", "label": "ab"[i % 2], "split": part, "group": f"g{i % 30}"})
    pd.DataFrame(rows).to_csv(root / "index.csv", index=False)
    return check(root / "index.csv")


def masked(root: Path, write_tiff: Callable[..., Path]) -> Found:
    """Masks without any class, a class without a pixel, one with next to none."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for i in range(12):
        mask = np.where(rng.random((48, 48)) < 0.5, 255, 0).astype(np.uint8)
        if i == 0:
            mask[:] = 9
        if i == 3:
            mask[0, 0] = 1
        Image.fromarray(scene(i, size=48)).save(root / "images" / f"{i}.png")
        Image.fromarray(mask).save(root / "masks" / f"{i}.png")
    classes = "data.masks.classes={bare land: 0, road: 255, sea: 3, well: 1}"
    return check(root, "task.kind=segmentation", classes, "data.masks.ignore=[9]")


def grey_masks(root: Path, write_tiff: Callable[..., Path]) -> Found:
    """Grey masks that never reach the threshold."""
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for i in range(8):
        Image.fromarray(scene(i, size=48)).save(root / "images" / f"{i}.png")
        Image.fromarray(np.full((48, 48), 9 + i, np.uint8)).save(root / "masks" / f"{i}.png")
    return check(root, "task.kind=saliency", "data.masks.threshold=100")


def boxed(root: Path, write_tiff: Callable[..., Path]) -> Found:
    """COCO boxes outside, twice, and a class without any."""
    make_objects(root, 8)
    data = json.loads((root / "boxes.json").read_text())
    data["annotations"].append({**data["annotations"][0], "id": 900})
    data["annotations"].append({**data["annotations"][0], "id": 901, "bbox": [100, 70, 50, 50]})
    data["categories"].insert(0, {"id": 9, "name": "ship, old"})
    (root / "boxes.json").write_text(json.dumps(data))
    return check(root / "boxes.json", "task.kind=detection")


def numbered_boxes(root: Path, write_tiff: Callable[..., Path]) -> Found:
    """YOLO boxes without any of a class in the middle: its number cannot be given to another."""
    make_objects(root, 8)
    for path in (root / "labels").iterdir():
        path.write_text(path.read_text().replace("1 0.", "2 0."))
    names = (root / "classes.txt").read_text().splitlines()
    (root / "classes.txt").write_text("\n".join([names[0], "none", names[1], "last"]))
    return check(root, "task.kind=detection")


SETS = [many_faults, georeferenced, masked, grey_masks, boxed, numbered_boxes]


def test_every_kind_of_finding_prints_a_command_of_ours(tmp_path: Path, write_tiff: Callable[..., Path]) -> None:
    seen = set()
    for make in SETS:
        for kind, command in make(tmp_path / make.__name__, write_tiff):
            seen.add(kind)
            found, _ = parsed(command)
            if found.name == "finetune":
                recipe_of(command)  # the keys and values are those of a recipe
            else:
                result = CliRunner().invoke(app, [*shlex.split(command)[1:], "--out", str(tmp_path / "again.csv")])
                assert result.exit_code in (0, 1), f"{kind}: {command}: {result.output}"
    # `split` is that of data that cannot be divided, below.
    assert seen | {"split"} == set(get_args(Kind))


@pytest.mark.parametrize("own_parts", [False, True])
@pytest.mark.parametrize("alone", [1, 2])
def test_classes_of_one_image_give_way_to_a_table_without_them(tmp_path: Path, own_parts: bool, alone: int) -> None:
    root, sub = tmp_path / "tiles", "train/" if own_parts else ""
    names = {f"{sub}a": 8, f"{sub}b": 8, **{f"{sub}one{i}": 1 for i in range(alone)}}
    write_scenes(root, names | ({"test/a": 6, "test/b": 6} if own_parts else {}))
    command = dict(check(root))["split"]
    assert f"data.root={tmp_path}/out/kept.csv data.allow_outside=true" in command
    recipe = recipe_of(command)
    module = DataModule(recipe.data, recipe.augment, seed=0, batch_size=4)
    module.setup()
    assert module.classes == ("a", "b")
    assert len(module.split.test) == (12 if own_parts else 2)


def test_a_class_of_one_image_in_a_table_gives_way_too(tmp_path: Path) -> None:
    root = tmp_path / "tiles"
    write_scenes(root, {"x": 21})
    labels = ["a; b", "b", "a"] * 6 + ["a; lone", "b", "a"]
    paths = sorted(path.relative_to(tmp_path).as_posix() for path in root.rglob("*.png"))
    pd.DataFrame({"path": paths, "label": labels}).to_csv(tmp_path / "several.csv", index=False)
    command = dict(check(tmp_path / "several.csv", "task.kind=multilabel"))["split"]
    assert trains(command)
    kept = pd.read_csv(tmp_path / "out" / "kept.csv")
    assert (len(kept), sorted(kept["label"].unique())) == (21, ["a", "a;b", "b"])

    single = [cell.split(";")[0] for cell in labels[:-3]] + ["lone", "b", "a"]
    pd.DataFrame({"path": paths, "label": single}).to_csv(tmp_path / "one.csv", index=False)
    command = dict(check(tmp_path / "one.csv"))["split"]
    assert trains(command)
    assert len(pd.read_csv(tmp_path / "out" / "kept.csv")) == 20


def test_near_copies_that_cannot_be_left_out_are_kept_together(tmp_path: Path) -> None:
    root = tmp_path / "tiles"
    write_scenes(root, {"train/a": 8, "train/b": 1, "test/a": 4, "val/a": 2, "val/b": 3})
    (root / "test" / "b").mkdir()
    turned(root / "train" / "b" / "00.png", root / "test" / "b" / "turned.png")
    command = dict(check(root))["near copies"]
    recipe = recipe_of(command)
    assert command.endswith(f"data.root={tmp_path}/out/grouped.csv data.allow_outside=true data.split=group")
    module = DataModule(recipe.data, recipe.augment, seed=0, batch_size=4)
    module.setup()
    part = {Path(p).name: name for name in ("train", "val", "test") for p in _paths(module, name)}
    assert part["turned.png"] == part["00.png"] or not module.split.warnings


def _paths(module: DataModule, part: str) -> list[str]:
    return [p for p in module.source.manifest["path"].iloc[module.split.rows(part)] if "/b/" in p]


def test_drift_between_a_persons_own_parts_is_mended_by_dividing_anew(tmp_path: Path) -> None:
    rows = []
    for i in range(60):
        part = "train" if i < 36 else "test" if i < 48 else "val"
        pixels = scene(i, size=48) // (4 if part == "test" else 1)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        rows.append({"path": f"{i}.png", "label": "ab"[i % 2], "split": part})
    pd.DataFrame(rows).to_csv(tmp_path / "index.csv", index=False)
    commands = [command for kind, command in check(tmp_path / "index.csv") if kind == "drift"]
    assert set(commands) == {f"r2kit finetune RECIPE data.root={tmp_path}/index.csv data.split=stratified"}
    assert "drift" not in dict(check(tmp_path / "index.csv", "data.split=stratified"))


def test_what_is_mended_already_prints_the_command_that_does_it(
    tmp_path: Path, write_tiff: Callable[..., Path]
) -> None:
    many_faults(tmp_path / "tiles", write_tiff)
    given = ["data.on_bad_file=skip", "data.on_leak=drop", "data.sampler=balanced"]
    found = dict(check(tmp_path / "tiles", *given))
    start = f"r2kit finetune RECIPE data.root={tmp_path}/tiles"
    assert found["files"] == f"{start} data.on_leak=drop data.sampler=balanced data.on_bad_file=skip"
    assert found["imbalance"] == f"{start} data.on_bad_file=skip data.on_leak=drop data.sampler=balanced"
    assert trains(found["files"])
    assert trains(found["imbalance"])


def test_commands_keep_the_recipe_that_says_how_data_is_read(tmp_path: Path, write_tiff: Callable[..., Path]) -> None:
    grey_masks(tmp_path / "masked", write_tiff)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("task: {kind: saliency}\ndata: {masks: {threshold: 100}}\n")
    command = dict(check(tmp_path / "masked", "--recipe", str(recipe)))["classes"]
    assert command == f"r2kit data stats {tmp_path}/masked --recipe {recipe}"
    shown = CliRunner().invoke(app, shlex.split(command)[1:]).stdout
    assert "values of the masks" in shown
    assert all(f" {value} " in shown for value in range(9, 17))
    split = CliRunner().invoke(app, ["data", "split", str(tmp_path / "masked"), "--recipe", str(recipe), "-o",
                                     str(tmp_path / "split.csv")])  # fmt: skip
    assert f"use it: r2kit finetune {recipe} data.root={tmp_path}/masked data.split_file={tmp_path}/" in split.stdout


def test_statistics_of_each_part(tmp_path: Path) -> None:
    write_scenes(tmp_path / "tiles", {"train/a": 4, "train/b": 4, "test/a": 3, "test/b": 3})
    for path in (tmp_path / "tiles" / "test").rglob("*.png"):
        Image.fromarray((np.asarray(Image.open(path)) // 4).astype(np.uint8)).save(path)
    out = tmp_path / "stats.csv"
    shown = CliRunner().invoke(app, ["data", "stats", str(tmp_path / "tiles"), "--parts", "--out", str(out)])
    assert shown.exit_code == 0, shown.output
    table = pd.read_csv(out).set_index(["part", "band"])
    assert sorted(table.index.unique("part")) == ["all", "test", "train", "val"]
    assert table.loc[("test", "red"), "mean"] < 0.3 * table.loc[("train", "red"), "mean"]
