"""The examples of docs/scale.md: their syntax, and that they say what r2kit understands."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from ruamel.yaml import YAML
from typer.testing import CliRunner

from r2kit.catalog import family
from r2kit.recipe_file import load_recipe

DOCS = Path(__file__).parent.parent / "docs"
EXAMPLES = DOCS / "examples"


def commands(text):
    """The arguments behind `r2kit finetune` in every line of a text, continued lines joined."""
    joined = text.replace("\\\n", " ")
    return [shlex.split(match) for match in re.findall(r"r2kit finetune ([^`\n]*)", joined)]


def container():
    jobset = YAML(typ="safe").load((EXAMPLES / "jobset.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]
    return jobset, job, job["template"]["spec"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize("name", ["finetune.sbatch", "torchrun.sh"])
def test_scripts_are_bash(name):
    if shutil.which("bash") is None:
        pytest.skip("no bash here")
    done = subprocess.run(["bash", "-n", str(EXAMPLES / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_line_has_options_and_keys_that_r2kit_knows():
    from r2kit.cli import app

    known = CliRunner().invoke(app, ["finetune", "--help"]).output
    texts = [(EXAMPLES / name).read_text() for name in ("finetune.sbatch", "torchrun.sh")] + [
        (DOCS / "scale.md").read_text()
    ]
    found = [command for text in texts for command in commands(text)]
    arguments = container()[2]["args"]
    found.append(arguments[arguments.index("finetune") + 1 :])
    assert len(found) >= 5
    for command in found:
        load_recipe({}, [part for part in command if re.match(r"[a-z]+\.[a-z_]+=", part)])
        for option in (part.split("=")[0] for part in command if part.startswith("--")):
            assert option in known, option


def test_keys_named_in_the_text_exist():
    for key, value in re.findall(r"`(train\.[a-z_]+)=([a-z0-9.]+)`", (DOCS / "scale.md").read_text()):
        load_recipe({}, [f"{key}={value}"])


def test_the_sbatch_file_asks_for_what_it_uses():
    text = (EXAMPLES / "finetune.sbatch").read_text()
    options = dict(re.findall(r"#SBATCH --([a-z-]+)=(\S+)", text))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"].startswith("SIGUSR1@")
    assert "143" in text


def test_the_jobset_meets_at_its_first_pod():
    jobset, job, train = container()
    assert jobset["kind"] == "JobSet"
    name, subdomain = jobset["metadata"]["name"], jobset["spec"]["network"]["subdomain"]
    assert f"--rdzv-endpoint={name}-{job['name']}-0-0.{subdomain}:29500" in train["args"]
    pods = job["template"]["spec"]["parallelism"]
    assert pods == job["template"]["spec"]["completions"]
    assert f"--nnodes={pods}" in train["args"]
    assert f"--nproc-per-node={train['resources']['limits']['nvidia.com/gpu']}" in train["args"]


def test_the_reason_against_fsdp_holds():
    with pytest.raises(ValueError, match="`fsdp` requires a GPU accelerator"):
        Trainer(accelerator="cpu", strategy="fsdp", logger=False)


def test_the_largest_network_is_as_small_as_the_text_says():
    assert max(entry.params for entry in family()) < 120e6
