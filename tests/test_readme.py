"""What the README tells people to type exists; its blocks run in test_documents."""

import re
from pathlib import Path

import pytest

from r2kit.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_two_commands_are_those_that_ci_runs():
    first, second = re.search(r"```bash\n(pip install.*)\n(pip install.*)\n```", README).groups()
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
    for line in README.split("## What you can do")[1].split("```text")[1].split("```")[0].strip().splitlines():
        for option in re.findall(r"(--[a-z]+)", line):
            assert option in helps[line.split()[1]], line


def test_links_and_pictures_exist():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target


def test_fastai_block_runs(image_folder):
    vision = pytest.importorskip("fastai.vision.all", reason="fastai (extra fastai) is not installed")
    code = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[1]
    dls = vision.ImageDataLoaders.from_folder(
        image_folder, valid_pct=0.5, seed=0, item_tfms=vision.Resize(32), bs=4, num_workers=0, device="cpu"
    )
    names: dict = {"dls": dls}
    exec(code, names)
    assert len(names["learn"].splitter(names["learn"].model)) == 3
