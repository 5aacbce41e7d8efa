"""The built documentation: strict, whole, and without anything from another host."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from ruamel.yaml import YAML

from r2kit.catalog import CATALOG
from r2kit.recipe_file import all_keys, key_rows, packaged_recipes

ROOT = Path(__file__).parent.parent


def load(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks():
    return load("hooks")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("material", reason="mkdocs-material (extra docs) is not installed")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return out


def test_every_page_is_in_the_navigation_and_is_built(site, hooks):
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r": ([\w/.-]+\.md)$", text, flags=re.MULTILINE))
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert listed == there | set(hooks.pages())
    for page in listed:
        assert (site / page).with_suffix(".html").is_file(), page


def test_nothing_comes_from_another_host(site):
    loads = re.compile(
        r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?(?:https?:)?//[^>]*|<link[^>]*href=\"?(?:https?:)?//[^>]*>"
    )
    for page in site.rglob("*.html"):
        found = [tag for tag in loads.findall(page.read_text(encoding="utf-8")) if 'rel="canonical"' not in tag]
        assert not found, f"{page.name}: {found[:2]}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name


def test_every_key_command_network_and_recipe_has_its_place(hooks):
    pages = hooks.pages()
    keys = pages["reference/keys.md"]
    assert {row.key for row in key_rows()} == set(all_keys())
    for row in key_rows():
        assert row.meaning, f"{row.key} has no words"
        assert f"| `{row.key}` |" in keys, row.key
    commands = hooks.walk_commands()
    assert len(commands) > 20
    for name, command in commands:
        assert command.help, name
        assert f"## {name}\n" in pages["reference/commands.md"]
        for option in (option for param in command.params for option in param.opts if option.startswith("--")):
            assert option in pages["reference/commands.md"], f"{name} {option}"
    family = pages["reference/family.md"]
    for entry in CATALOG:
        assert f"| `{entry.name}` | {entry.owner} | {entry.params:,} | {entry.macs:,} |" in family
    for name, path in packaged_recipes().items():
        assert path.read_text(encoding="utf-8").rstrip() in pages["reference/recipes.md"], name


def test_cells_stay_cells(hooks):
    assert hooks._row("'*plus*' of res2net50_26w_4s") == "| '\\*plus\\*' of res2net50\\_26w\\_4s |"
    assert hooks._row("a | b <c>", "`x|y <z>`", "two\nlines") == "| a \\| b &lt;c> | `x\\|y <z>` | two lines |"


def test_every_picture_is_made_by_the_script_from_a_run(finished_run, tmp_path, monkeypatch):
    pictures = load("pictures")
    monkeypatch.setattr(pictures, "CHARTS", {**pictures.CHARTS, "satellite_blocks.png": "confusion.png"})  # no blocks
    names = {*pictures.CHARTS, pictures.MAP}
    texts = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    shown = {name for path in texts for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", path.read_text(encoding="utf-8"))}
    assert {Path(name).name for name in shown} == names
    assert {path.name for path in (ROOT / "docs" / "images").iterdir()} == names
    for file in pictures.make_pictures(finished_run, tmp_path, cell=64):
        with Image.open(file) as image:
            assert image.text["Comment"].startswith("quick, seed 3, 20")
            assert min(image.size) > 100


def test_headers_of_recipes_say_what_they_must():
    for name, path in packaged_recipes().items():
        text = path.read_text(encoding="utf-8")
        head = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
        for word in ("Command", "Data layout", "Device", "Time", "Result"):
            assert f"# {word}" in text, f"{name}: {word}"
        assert re.search(r"seed \d|seeds \d|not measured", head), f"{name}: a seed, or not measured"
        assert YAML(typ="safe", pure=True).load(text), name
