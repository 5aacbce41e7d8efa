"""What the README tells people to type works."""

import re
from pathlib import Path

import pytest

import r2kit
from r2kit.cli import main
from r2kit.recipe_file import packaged_recipes

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_two_commands_are_those_that_ci_runs():
    first, second = re.search(r"```\n(pip install.*)\n(pip install.*)\n```", README).groups()
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert first == 'pip install -e ".[demo]" && r2kit finetune recipes/satellite.yaml'
    assert second == 'pip install -e ".[dev]"  && pytest'
    for part in ('pip install -q -e ".[demo]"', "r2kit finetune recipes/satellite.yaml", '-e ".[dev]"', "\npytest\n"):
        assert part in script


def test_every_command_that_is_named_exists(capsys):
    commands = set(re.findall(r"^r2kit ([a-z]+)", README, flags=re.MULTILINE))
    assert len(commands) >= 7
    helps = {}
    for command in commands:
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0
        helps[command] = capsys.readouterr().out
    for line in README.split("## What you can do")[1].split("```")[1].strip().splitlines():
        for option in re.findall(r"(--[a-z]+)", line):
            assert option in helps[line.split()[1]], line


def test_links_and_pictures_exist():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target


def test_python_block_runs(image_folder, tmp_path, monkeypatch, capsys):
    code = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    real = r2kit.finetune

    def quick(recipe, *, overrides, out):
        assert recipe in packaged_recipes()
        small = [*overrides, f"data.root={image_folder}", "model.name=test_resnet", "data.workers=0", "data.limit=18"]
        return real(recipe, overrides=small, out=out, quiet=True)

    monkeypatch.setattr(r2kit, "finetune", quick)
    names: dict = {}
    exec(code, names)
    assert (tmp_path / "runs" / "quick" / "report.html").is_file()
    assert names["model"].num_classes == 10


def test_fastai_block_runs(image_folder):
    vision = pytest.importorskip("fastai.vision.all", reason="fastai (extra fastai) is not installed")
    code = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[1]
    dls = vision.ImageDataLoaders.from_folder(
        image_folder, valid_pct=0.5, seed=0, item_tfms=vision.Resize(32), bs=4, num_workers=0, device="cpu"
    )
    names: dict = {"dls": dls}
    exec(code, names)
    assert len(names["learn"].splitter(names["learn"].model)) == 3


def test_every_block_of_python_has_a_test():
    assert README.count("```python") == 2
