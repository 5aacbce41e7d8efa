"""Every block of README and docs/ runs here, in a small project; what cannot run says why, and is checked instead."""

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
from affine import Affine
from matplotlib.figure import Figure
from PIL import Image

import r2kit
from tests import blocks
from tests.conftest import make_images
from tests.maps.conftest import write_raster
from tests.objects.toy import make_objects

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),  # r2kit chooses the number of processes
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),  # Lightning 2.6 against the newest torch
    # What fastai 2.8 does at import; see tests/fastai/marks.py.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    pytest.mark.filterwarnings("ignore:The 'mode.chained_assignment' option is deprecated"),
]
BANDS = ("B04", "B03", "B02", "B08")
PAGES = [path.relative_to(blocks.ROOT).as_posix() for path in blocks.DOCUMENTS]


@pytest.fixture(scope="session")
def project(tmp_path_factory, image_folder, mask_folder) -> Path:
    """What the documents call path/to/...: small data of every kind, and recipes/."""
    root = tmp_path_factory.mktemp("project")
    data = root / "path" / "to"
    data.mkdir(parents=True)
    shutil.copytree(image_folder, data / "tiles")
    shutil.copytree(mask_folder, data / "masked")
    make_objects(data / "objects", 12)
    shutil.copytree(blocks.ROOT / "recipes", root / "recipes")
    tiles = sorted((data / "tiles").rglob("*.png"))
    shutil.copy(tiles[0], data / "photo.png")
    rows = [(path.relative_to(data), path.parent.name, f"flight{number % 6}") for number, path in enumerate(tiles)]
    pd.DataFrame(rows, columns=["path", "label", "group"]).to_csv(data / "tiles.csv", index=False)
    _write_several(data / "several")
    _write_rasters(data)
    return root


def _write_several(root: Path) -> None:
    """A table of pictures with none, one or both of two labels."""
    make_images(root / "source", 14)
    rows = []
    for number, path in enumerate(sorted((root / "source").rglob("*.png"))):
        shutil.move(path, root / f"{number:02d}.png")
        rows.append((f"{number:02d}.png", ["", "field", "sand", "field;sand"][number % 4], f"flight{number // 2}"))
    shutil.rmtree(root / "source")
    pd.DataFrame(rows, columns=["path", "label", "group"]).to_csv(root / "images.csv", index=False)


def _write_rasters(data: Path) -> None:
    """Tiles of four bands, a scene with its labels, and points on it."""
    rng = np.random.default_rng(0)
    place = {"crs": "EPSG:32633", "transform": Affine(10, 0, 500_000, 0, -10, 4_600_000)}
    for number in range(24):
        folder = data / "bands" / ("crop" if number % 2 else "soil")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = (1000 + 400 * (number % 2) + rng.normal(0, 100, (16, 16, 4))).astype(np.uint16)
        far = {"crs": "EPSG:4326", "transform": Affine(1e-4, 0, 14 * number - 170, 0, -1e-4, 10 * (number % 5))}
        with rasterio.open(write_raster(folder / f"{number:02d}.tif", pixels, **far), "r+") as file:
            file.descriptions = BANDS
    kind = (np.arange(192)[:, None] // 32 + np.arange(192)[None, :] // 32) % 2
    scene = np.where(kind[..., None], [20, 40, 120], [60, 140, 40]) + rng.normal(0, 20, (192, 192, 3))
    write_raster(data / "scene.tif", scene.clip(1, 255).astype(np.uint8), photometric="RGB", **place)
    write_raster(data / "ground.tif", (1 + kind[..., None]).astype(np.uint8), **place)
    at = rng.integers(0, 192, (30, 2))
    names = np.where(kind[at[:, 0], at[:, 1]] == 1, "water", "field")
    points = {"x": 500_005 + 10 * at[:, 1], "y": 4_599_995 - 10 * at[:, 0], "reference": names}
    pd.DataFrame(points).to_csv(data / "points.csv", index=False)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs_or_says_why_not(page, project, tmp_path, monkeypatch):
    found = blocks.blocks_of(blocks.ROOT / page)
    work = tmp_path / "project"
    shutil.copytree(project, work)
    monkeypatch.chdir(work)
    real = r2kit.finetune

    def small(recipe, *, overrides=(), **rest):
        return real(recipe, overrides=blocks.shrunk(["finetune", recipe, *overrides], ())[2:], **rest, quiet=True)

    monkeypatch.setattr(r2kit, "finetune", small)
    # Charts take most of the time of so small a run, and tests/test_plots.py looks at them.
    monkeypatch.setattr(Figure, "savefig", lambda self, target, **rest: Image.new("RGB", (8, 8)).save(target, "PNG"))
    names: dict = {}
    for block in found:
        assert block.language in blocks.LANGUAGES, f"{block.where}: a block is one of {blocks.LANGUAGES}"
        if block.not_run:
            blocks.check(block)
        else:
            blocks.run(block, names)


def test_tests_and_files_that_documents_name_are_there():
    """A promise whose test was renamed has none."""
    named = 0
    for page in [*blocks.DOCUMENTS, *(blocks.ROOT / "benchmarks").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        for file, test in re.findall(r"`((?:tests|benchmarks|recipes|notebooks)/[\w/]+\.\w+)(?:::(\w+))?", text):
            path = blocks.ROOT / file
            assert path.is_file(), f"{page.name}: {file} is not there"
            assert f"def {test}(" in path.read_text(encoding="utf-8") or not test, f"{page.name}: {file} has no {test}"
            named += bool(test)
    assert named >= 10


def test_a_block_that_is_wrong_fails(tmp_path, monkeypatch):
    """The test above can fail: each kind of mistake is found, whether the block runs or not."""
    monkeypatch.chdir(tmp_path)
    for language, text in (
        ("bash", "r2kit finetunne satellite"),
        ("bash", "r2kit evaluate runs/x --nonsense 3"),
        ("bash", "r2kit finetune satellite train.epoch=3"),
        ("bash", 'pip install -e ".[nonsense]"'),
        ("bash", "curl somewhere"),
        ("bash", "torchrun --nproc-per-node=2 -m r2kit finetune satellite train.lr=fast"),
        ("yaml", "model: {nane: x}"),
        ("python", "import r2kit ("),
    ):
        block = blocks.Block("here:1", language, text, not_run="a reason")
        with pytest.raises((AssertionError, r2kit.errors.RecipeError, SyntaxError)):
            blocks.check(block)
    with pytest.raises(AssertionError, match="not_there"):
        blocks.run(blocks.Block("here:1", "bash", "r2kit report not_there"), {})
    with pytest.raises(AssertionError, match="not run by this test"):
        blocks.run(blocks.Block("here:1", "bash", "git status"), {})


def test_marks_belong_to_the_next_block_only(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- not run: a reason -->\n<!-- with: train.epochs=2 seed=1 -->\n```bash\nr2kit doctor \\\n  && ls # x\n```\n"
        "```yaml\nseed: 1\n```\n<!-- not run: far away -->\nwords\n```text\n```\n"
    )
    first, second, third = blocks.blocks_of(page)
    assert (first.not_run, first.extra, first.where) == ("a reason", ("train.epochs=2", "seed=1"), "page.md:3")
    assert first.commands == [["r2kit", "doctor"], ["ls"]]
    assert (second.not_run, second.text, third.not_run) == (None, "seed: 1", None)
