from types import SimpleNamespace

import matplotlib
import pytest


@pytest.fixture(scope="module", autouse=True)
def _no_windows():
    matplotlib.use("Agg")


@pytest.fixture(scope="module")
def fa():
    """What a notebook has after its two star imports."""
    names: dict = {}
    exec("from fastai.vision.all import *\nfrom r2kit.fastai import *", names)
    return SimpleNamespace(**names)
