"""timm's own tests and scripts, which its wheel leaves out: fetched once into pytest's cache, never into this tree."""

import subprocess
import sys
import tarfile
import urllib.request
from pathlib import Path

import pytest
import timm

SCRIPTS = "https://raw.githubusercontent.com/huggingface/pytorch-image-models"


@pytest.fixture(scope="session")
def timm_sources(pytestconfig: pytest.Config) -> Path:
    """The source distribution of the installed timm: `tests/`, and `pyproject.toml` with the options of its pytest."""
    release = f"timm-{timm.__version__}"
    folder = pytestconfig.cache.mkdir("timm-sources")
    if not (folder / release).is_dir():
        fetch = ["download", release.replace("-", "=="), "--no-binary", ":all:", "--no-deps", "--dest", str(folder)]
        pip = subprocess.run([sys.executable, "-m", "pip", *fetch], capture_output=True, text=True, timeout=300)
        if pip.returncode:
            pytest.skip(f"no source distribution of {release} to be had: {pip.stderr.strip().splitlines()[-1:]}")
        with tarfile.open(folder / f"{release}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    return folder / release


@pytest.fixture(scope="session")
def timm_scripts(pytestconfig: pytest.Config) -> Path:
    """A folder with `train.py` and `validate.py` of the installed timm. Copies put there by hand serve too."""
    folder = pytestconfig.cache.mkdir(f"timm-scripts-{timm.__version__}")
    for script in ("train.py", "validate.py"):
        if not (folder / script).exists():
            try:
                with urllib.request.urlopen(f"{SCRIPTS}/v{timm.__version__}/{script}", timeout=20) as answer:
                    (folder / script).write_bytes(answer.read())
            except OSError as error:
                pytest.skip(f"timm's {script} is neither in {folder} nor to be had: {error}")
    return folder
