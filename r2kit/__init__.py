"""r2kit: transfer learning with multi-scale image backbones.

The names below load what they need on first use, so that ``import r2kit`` imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from r2kit.backbones import create_model as create_model
    from r2kit.backbones.fast import optimize as optimize
    from r2kit.errors import R2kitError as R2kitError
    from r2kit.recipe import Recipe as Recipe
    from r2kit.recipe_file import load_recipe as load_recipe
    from r2kit.report import write_report as write_report
    from r2kit.run import Run as Run
    from r2kit.train import finetune as finetune

_HOMES = {
    "R2kitError": "r2kit.errors",
    "Recipe": "r2kit.recipe",
    "Run": "r2kit.run",
    "create_model": "r2kit.backbones",
    "finetune": "r2kit.train",
    "load_recipe": "r2kit.recipe_file",
    "optimize": "r2kit.backbones.fast",
    "write_report": "r2kit.report",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'r2kit' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
