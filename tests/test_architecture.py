"""The house rules that a machine can check: who imports whom, what is light, how long a file may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "r2kit"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the ground up; a module imports only from lower levels, or from its own.
LEVELS = [
    {"errors", "seeding"},
    {"cache", "console"},
    {"recipe", "catalog"},
    {"recipe_file"},
    {"backbones"},
    {"data"},
    {"losses", "metrics", "schedules", "calibration", "parts"},
    {"dense", "objects"},
    {"models", "freeze", "optim"},
    {"tasks"},
    {"run"},
    {"checkpoint"},
    {"inference", "result", "draw"},
    {"baselines", "callbacks", "stopping", "loggers", "lr_finder", "benchmark", "write_boxes", "finder"},
    {"plots", "evaluate", "predict", "maps", "export", "doctor", "noise"},
    {"page"},
    {"explain"},
    {"report", "area", "demo", "cluster"},
    {"train", "push"},
    {"fastai"},
    {"allocate", "tune", "compare", "optimism"},
    {"study"},
    {"cli"},
]
LEVEL = {name: height for height, names in enumerate(LEVELS) for name in names}
LIGHT = {"errors", "recipe", "recipe_file", "catalog", "cache", "cli", "run"}
HEAVY = {"torch", "lightning", "timm", "pandas", "rasterio", "albumentations", "matplotlib", "scipy", "sklearn"}


def room(path: Path) -> str:
    """The part of the house that a file belongs to: a subpackage or a module."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path, *, top_only: bool) -> set[str]:
    """The modules a file imports; `top_only` leaves out those inside functions and `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{alias.name}" if node.module == "r2kit" else node.module for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    here = room(path)
    if here in {"__init__", "__main__"}:
        return
    assert here in LEVEL, f"{here} has no level in this test yet"
    for name in imports(path, top_only=True):
        if name.startswith("r2kit."):
            there = name.split(".")[1]
            assert there == "__version__" or there == here or LEVEL[there] < LEVEL[here], f"{here} imports {there}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_light_modules_import_nothing_heavy_at_the_top(path):
    if room(path) in LIGHT:
        assert not {name.split(".")[0] for name in imports(path, top_only=True)} & HEAVY


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_readable(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 640, "split it"


def test_import_and_help_load_no_torch():
    code = (
        "import sys, r2kit, r2kit.cli\n"
        "try: r2kit.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'lightning', 'timm', 'pandas', 'pydantic', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


def test_public_names_are_few_and_real():
    import r2kit

    assert len(r2kit.__all__) <= 15
    for name in r2kit.__all__:
        assert getattr(r2kit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        r2kit.nonsense  # noqa: B018
