"""timm's public `tests/test_models.py`, unchanged, over our names."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

import pytest

from r2kit.catalog import CATALOG

ROOT = Path(__file__).parents[2]
PLUGIN = "tests.backbones.timm_suite"
# Every test of timm 1.0.31 that runs over the names of `list_models`, but those of pretrained weights and of
# transformers. Its CI leaves the last two out, for time and memory.
EVERY_TEST = {
    "test_model_forward",
    "test_model_backward",
    "test_model_default_cfgs",
    "test_model_forward_torchscript",
    "test_model_forward_features",
    "test_model_forward_intermediates_features",
    "test_model_forward_intermediates",
    "test_model_forward_fx",
    "test_model_backward_fx",
    "test_prune_intermediate_layers_contract",
    "test_model_forward_fx_torchscript",
}
FAMILIES = defaultdict(list)
for _entry in CATALOG:
    if _entry.owner == "r2kit":
        FAMILIES[_entry.family].append(_entry.name)


def run(sources: Path, names: list[str], report: Path, *options: str) -> tuple[dict[str, set[str]], str]:
    """Run timm's file over `names`; return the tests that passed for each, and what pytest wrote."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", PLUGIN, "-p", "no:cacheprovider", "--over", ",".join(names)]
    # timm's `tests` would otherwise be taken for the package in which the plugin is.
    command += ["--import-mode=importlib", "-c", str(sources / "pyproject.toml"), "--rootdir", str(sources)]
    command += [str(sources / "tests" / "test_models.py"), f"--junitxml={report}", *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(report.parent)])}
    environment.pop("GITHUB_ACTIONS", None)  # there timm skips some
    pytest_ = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    passed: dict[str, set[str]] = defaultdict(set)
    for case in ElementTree.parse(report).iter("testcase"):
        test, _, parameters = case.attrib["name"].rstrip("]").partition("[")
        if len(case) == 0:  # neither failure, error nor skipped
            passed[parameters.rpartition("-")[2].removesuffix(".untrained")].add(test)
    return passed, pytest_.stdout[-4000:] + pytest_.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("names", FAMILIES.values(), ids=FAMILIES.keys())
def test_timms_own_tests_pass(timm_sources: Path, tmp_path: Path, names: list[str]) -> None:
    passed, words = run(timm_sources, names, tmp_path / "report.xml")
    for name in names:
        assert passed[name] == EVERY_TEST, f"{name}: {sorted(EVERY_TEST ^ passed[name])}\n{words}"


@pytest.mark.slow
@pytest.mark.network
def test_it_would_notice(timm_sources: Path, tmp_path: Path) -> None:
    """A network that claims one channel more than it has fails there."""
    (tmp_path / "broken.py").write_text(
        "from r2kit.backbones import _skeleton\n"
        "finish = _skeleton.StagedNet._finish\n"
        "def _finish(net, *arguments):\n"
        "    finish(net, *arguments)\n"
        "    net.num_features += 1\n"
        "_skeleton.StagedNet._finish = _finish\n"
    )
    passed, words = run(timm_sources, ["res2netplus50"], tmp_path / "r.xml", "-p", "broken", "-k", "default_cfgs")
    assert passed == {}
    assert "unpooled feature dim 2048 != model.num_features 2049" in words
