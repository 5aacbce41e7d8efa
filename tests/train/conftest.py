import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from r2kit.recipe_file import load_recipe, to_yaml


class Attempts:
    """Runs `r2kit` commands in processes of their own, and ends them by signals; see killer.py."""

    def __init__(self):
        self.program = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("killer.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )

    def run(self, *command, **plan):
        self.program.stdin.write(json.dumps({"command": [str(part) for part in command], **plan}) + "\n")
        self.program.stdin.flush()
        return json.loads(self.program.stdout.readline())


@pytest.fixture(scope="session")
def attempts(cache):
    made = Attempts()
    yield made
    made.program.stdin.close()
    made.program.wait(timeout=30)
    made.program.stdout.close()


@pytest.fixture(scope="session")
def recipe_file(quick_recipe, tmp_path_factory):
    """A recipe with everything that could remember what ran before: 24 steps, loader processes, mixing, EMA."""
    overrides = [
        "name=hard",
        "data.workers=2",
        "train.batch_size=4",
        "train.epochs=4",
        "train.ema=true",
        "train.checkpoint_every=2",
        "train.accumulate=2",
        "model.drop_path_rate=0.1",
        "model.drop_rate=0.1",
        "augment.mixup=0.4",
        "augment.cutmix=0.4",
        "augment.mix_off_epochs=1",
    ]
    path = tmp_path_factory.mktemp("recipe") / "hard.yaml"
    path.write_text(to_yaml(load_recipe(quick_recipe, overrides)))
    return path


@pytest.fixture(scope="session")
def long_recipe_file(recipe_file):
    """The same with ten times as many steps."""
    path = recipe_file.with_name("long.yaml")
    path.write_text(to_yaml(load_recipe(recipe_file, ["train.epochs=40", "train.checkpoint_every=3"])))
    return path


@pytest.fixture(scope="session")
def long_unbroken(attempts, long_recipe_file, tmp_path_factory):
    """The run of `long_recipe_file` that nobody interrupts."""
    from r2kit.run import Run

    out = tmp_path_factory.mktemp("unbroken") / "long"
    done = attempts.run("finetune", long_recipe_file, "--out", out)
    assert done["status"] == 0, done["said"]
    return Run.open(out)


@pytest.fixture(scope="session")
def unbroken(attempts, recipe_file, tmp_path_factory):
    """The run of `recipe_file` that nobody interrupts."""
    from r2kit.run import Run

    out = tmp_path_factory.mktemp("unbroken") / "run"
    done = attempts.run("finetune", recipe_file, "--out", out)
    assert done["status"] == 0, done["said"]
    return Run.open(out)
