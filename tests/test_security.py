"""What comes from a stranger stays harmless: nothing in it runs, leads elsewhere or eats the memory."""

import ast
import json
import os
import pickle
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import Affine

import r2kit
from r2kit.checkpoint import _seal, read_checkpoint, write_checkpoint
from r2kit.cli import main
from r2kit.compare import compare_runs
from r2kit.data.preprocess import Preprocess
from r2kit.data.reader import open_raster, read_image
from r2kit.errors import DataError, R2kitError, RunError
from r2kit.maps import predict_map
from r2kit.maps.network import tile_of
from r2kit.maps.scene import Scene
from r2kit.predict import predict
from r2kit.report import write_report
from r2kit.run import Run
from r2kit.train import resume

PACKAGE = Path(r2kit.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


class Bomb:
    """A pickle that makes a file when it is opened the ordinary way."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def dotted(node):
    """The name that a call is made by, as written."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id if isinstance(node, ast.Name) else "?", *reversed(parts)])


def keyword(call, name):
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_line_of_the_package_could_run_what_it_reads(path):
    opens_code = {"marshal", "shelve", "dill", "joblib", "cloudpickle", "zipfile", "tarfile", "yaml", "torch.hub"}
    never = {"eval", "exec", "compile", "__import__", "read_pickle", "unpack_archive", "load_learner", "extractall"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not names & opens_code, f"line {node.lineno}: {names & opens_code}"
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        last = called.rsplit(".", 1)[-1]
        assert called not in never, f"line {node.lineno}: {called}"
        assert last not in never - {"eval", "compile"}, f"line {node.lineno}: {called}"  # model.eval(), torch.compile
        assert called not in ("pickle.load", "pickle.loads", "pickle.Unpickler"), f"line {node.lineno}: {called}"
        if called == "torch.load":
            assert keyword(node, "weights_only") == "True", f"line {node.lineno}"
        if called in ("np.load", "numpy.load"):
            assert keyword(node, "allow_pickle") in (None, "False"), f"line {node.lineno}"  # None is False
        if called == "YAML":
            assert keyword(node, "typ") == "'safe'", f"line {node.lineno}"
        if called.startswith("subprocess."):
            assert keyword(node, "shell") in (None, "False"), f"line {node.lineno}"


def contents(mark, kind):
    """Bytes that run code where they are unpickled."""
    if kind == "pickle":
        return pickle.dumps(Bomb(mark))
    file = mark.with_name("saved.pt")
    torch.save({"state_dict": {"w": torch.ones(1)}, "epoch": 0, "more": Bomb(mark)}, file)
    return file.read_bytes()


def test_the_bomb_goes_off_where_nobody_minds(tmp_path):
    pickle.loads(contents(tmp_path / "mark", "pickle"))
    assert (tmp_path / "mark").is_dir()


@pytest.mark.parametrize("kind", ["pickle", "torch"])
@pytest.mark.parametrize(
    "name",
    [
        "recipe.yaml",
        "run.json",
        "preprocess.json",
        "model.safetensors",
        "metrics.json",
        "metrics.csv",
        "split.parquet",
        "predictions_test.parquet",
    ],
)
def test_a_pickle_in_place_of_a_file_of_a_run_is_one_line_and_never_opened(
    finished_run, image_folder, tmp_path, name, kind
):
    folder = tmp_path / "run"
    shutil.copytree(finished_run.path, folder)
    assert (folder / name).is_file()
    (folder / name).write_bytes(contents(tmp_path / "mark", kind))

    def use():
        if name not in ("recipe.yaml", "preprocess.json", "model.safetensors"):
            write_report(Run.open(folder))
        else:
            predict(Run.open(folder), image_folder / "sand" / "000.png")

    with pytest.raises(R2kitError) as caught:
        use()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_checkpoint_with_code_is_never_opened_even_with_a_right_checksum(finished_run, tmp_path, kind):
    folder = tmp_path / "run"
    shutil.copytree(finished_run.path, folder)
    run = Run(folder)
    run.write_info(state="started")
    for file in (run.last_checkpoint, run.best_checkpoint, run.previous_checkpoint):
        file.write_bytes(contents(tmp_path / "mark", kind))
        if kind == "torch":
            _seal(file)
    with pytest.raises(RunError, match="could run code" if kind == "torch" else "damaged"):
        read_checkpoint(run.last_checkpoint)
    if kind == "torch":
        with pytest.raises(RunError, match="could run code"):
            resume(folder, quiet=True)
    assert not (tmp_path / "mark").exists()


def test_a_recipe_cannot_name_code(tmp_path, capsys):
    mark = tmp_path / "mark"
    for text in (
        f"name: !!python/object/apply:os.mkdir ['{mark}']\n",
        f"name: x\ndata: {{root: a}}\nmodel: !!python/object/apply:os.mkdir ['{mark}']\n",
    ):
        (tmp_path / "recipe.yaml").write_text(text)
        with pytest.raises(SystemExit) as stop:
            main(["recipe", "check", str(tmp_path / "recipe.yaml")])
        assert stop.value.code == 2
        assert "python/object" in capsys.readouterr().err
    assert not mark.exists()


def test_links_out_of_a_run_folder_are_refused(finished_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished_run.path, folder)
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    (folder / "inside.html").symlink_to("report.html")
    Run.open(folder)
    (folder / "inside.html").unlink()
    (folder / "explain").mkdir()
    for place in ("plots/curves.png", "report.html", "explain/explain.csv"):  # the last one is none of a new run's
        (folder / place).unlink(missing_ok=True)
        (folder / place).symlink_to(precious)
        with pytest.raises(RunError, match=rf"{Path(place).name}: is a link out of the run folder; remove it"):
            Run.open(folder)
        (folder / place).unlink()
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("place", ["report.html", "explain/explain.csv", ".lock", "checkpoints/.last.ckpt.part"])
def test_going_on_with_a_run_writes_through_no_link(finished_run, tmp_path, place):
    folder = tmp_path / "run"
    shutil.copytree(finished_run.path, folder)
    run = Run(folder)
    run.write_info(state="training")
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    file = folder / place
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    file.symlink_to(precious)
    if place.startswith("checkpoints"):  # these may lie elsewhere, but what is written is new
        state = read_checkpoint(run.last_checkpoint)
        write_checkpoint(state, run.last_checkpoint)
    else:
        with pytest.raises(RunError, match=r"link"):
            resume(folder, quiet=True)
    assert precious.read_text() == "mine"


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (
            [10**9, 10**9],
            r"its images had 1000000000 x 1000000000 pixels by its run\.json; a tile of .* is larger than",
        ),
        (None, "does not say how large its images were"),
    ],
)
def test_a_run_that_claims_absurd_images_makes_no_map(pond_run, tmp_path, write_scene, size, words):
    folder = tmp_path / "run"
    shutil.copytree(pond_run.path, folder)
    run = Run.open(folder)
    values = {**json.loads(run.preprocess_file.read_text()), "resize": "squash"}
    run.preprocess_file.write_text(json.dumps(values))
    scene = write_scene(tmp_path / "scene.tif")
    run.write_info(data={"image_size": size})
    tracemalloc.start()
    with pytest.raises(RunError, match=words):
        predict_map(run, scene, tmp_path / "map.tif")
    with pytest.raises(RunError, match=words):
        tile_of(run)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    "facts",
    [
        *({"data": {"image_size": size}} for size in (5, ["a", None], [0, 0], [-4, 8], [8])),
        {"data": []},
        {"model": {"parameters": "a", "macs": []}},
        {"versions": 3},
        {"best_epoch": "x"},
        {"train_seconds": "zz"},
        {"finished": 3},
    ],
    ids=str,
)
def test_a_record_that_is_none_is_one_line(finished_run, tmp_path, facts, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished_run.path, folder)
    info = Run(folder).info_file
    info.write_text(json.dumps({**json.loads(info.read_text()), **facts}))
    with pytest.raises(SystemExit) as stop:
        main(["report", str(folder)])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"run.json: holds no record of a run: {next(iter(facts))}" in line


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.json", '{"accuracy": 1}'),
        ("metrics.json", '{"accuracy": {"value": "<script>"}, "split": "test"}'),
        ("metrics.csv", "a,b\n1,2\n"),
    ],
)
def test_figures_that_are_none_are_one_line(finished_run, tmp_path, name, content, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished_run.path, folder)
    (folder / name).write_text(content)
    with pytest.raises(SystemExit) as stop:
        main(["report", str(folder)])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no report can be made of what its metrics.json and metrics.csv hold" in line
    if name == "metrics.csv":
        with pytest.raises(RunError, match=r"metrics\.csv: cannot be read as a table of a run"):
            compare_runs([Run.open(folder), finished_run], speed=False)


def test_text_in_place_of_a_raster_opens_nothing_else(tmp_path, write_scene):
    secret = write_scene(tmp_path / "secret.tif")
    body = (
        '<VRTDataset rasterXSize="8" rasterYSize="8"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
        f"<SourceFilename>{secret}</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    (tmp_path / "scene.tif").write_text(body)
    (tmp_path / "named.vrt").write_text(body)
    words = "scene.tif: is text that points to other files, not a raster; a virtual raster is named .vrt"
    with pytest.raises(DataError, match=words), open_raster(tmp_path / "scene.tif"):
        pass
    preprocess = Preprocess(("band1",), (0.5,), (0.2,), 255.0, (8, 8), "squash", "bilinear", ("a", "b"))
    with pytest.raises(DataError, match="is text that points to other files"):
        Scene(tmp_path / "scene.tif", preprocess)
    with pytest.raises(DataError, match="is not a JPEG, PNG, WebP or TIFF"):
        read_image(tmp_path / "scene.tif")
    with open_raster(tmp_path / "named.vrt") as dataset:
        assert dataset.read(1).shape == (8, 8)


def test_a_small_file_of_absurd_blocks_is_refused(tmp_path):
    path = tmp_path / "blocks.tif"
    profile = {"driver": "GTiff", "height": 16, "width": 16, "count": 1, "dtype": "uint8", "compress": "deflate"}
    side = 40_000
    grid = Affine(0.1, 0, 10, 0, -0.1, 50)
    with rasterio.open(path, "w", transform=grid, tiled=True, blockxsize=16, blockysize=16, **profile) as file:
        file.write(np.zeros((1, 16, 16), dtype=np.uint8))
    content = bytearray(path.read_bytes())
    for tag in (322, 323):  # TileWidth, TileLength
        at = content.index(tag.to_bytes(2, "little") + b"\x03\x00" + (1).to_bytes(4, "little"))
        content[at : at + 12] = (
            tag.to_bytes(2, "little") + b"\x04\x00" + (1).to_bytes(4, "little") + side.to_bytes(4, "little")
        )
    path.write_bytes(content)
    assert len(content) < 1000
    tracemalloc.start()
    with pytest.raises(DataError, match=r"blocks.tif: "):
        read_image(path)
    preprocess = Preprocess(("band1",), (0.5,), (0.2,), 255.0, (8, 8), "squash", "bilinear", ("a", "b"))
    with pytest.raises(DataError, match=r"stored in blocks of 40000 x 40000 pixels, more than 1 GB at once"):
        Scene(path, preprocess)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


@pytest.fixture
def write_scene():
    def write(path):
        grid = Affine(0.1, 0, 10, 0, -0.1, 50)
        kind = {"driver": "GTiff", "height": 8, "width": 8, "count": 1, "dtype": "uint8"}
        with rasterio.open(path, "w", crs="EPSG:4326", transform=grid, **kind) as file:
            file.write(np.full((1, 8, 8), 7, dtype=np.uint8))
        return path

    return write
