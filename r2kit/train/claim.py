"""The folder of a run, before and while it trains: whose it is, and what its processes know of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r2kit.errors import RunError
from r2kit.recipe import Recipe
from r2kit.recipe_file import find_recipe
from r2kit.run import Run, write_atomic

RUN_FOLDER = "R2KIT_RUN_FOLDER"  # tells the processes of the other devices where the first one made the run


def first_process() -> bool:
    """Whether this is the process that writes files: the only one, or rank zero."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", "0")))
    return rank == "0"


def claim(recipe: Recipe, out: str | Path | None, *, overwrite: bool, resume: bool) -> Run | None:
    """Return the run to go on with, or None for a new one; refuse a folder in use before any work is done.

    Raises:
        RunError: If the folder holds a run and neither `overwrite` nor `resume` is given, or a run of another recipe.
    """
    if out is None or not Run(out).exists() or not first_process():
        return None
    if not (overwrite or resume):
        raise RunError(f"{out}: holds a run already; give --overwrite, --resume auto, or another --out")
    if not resume:
        return None
    run = Run(out)
    if run.recipe != recipe:
        changed = _differences(run.recipe.model_dump(), recipe.model_dump())
        raise RunError(
            f"{out}: holds a run of another recipe, different in {', '.join(changed[:3])}; "
            f"go on with r2kit finetune {run.recipe_file} --out {out} --resume auto"
        )
    return run


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the key paths in which two recipes differ."""
    found: list[str] = []
    for key, value in new.items():
        if isinstance(value, dict):
            found += _differences(old[key], value, f"{prefix}{key}.")
        elif old[key] != value:
            found.append(f"{prefix}{key}")
    return found


def keep_as_written(run: Run, recipe: str | Path, overrides: Sequence[str]) -> None:
    """Keep the recipe as its author wrote it beside the resolved one, the overrides below it."""
    text = find_recipe(recipe).read_text(encoding="utf-8")
    if overrides:
        text = text.rstrip("\n") + "\n\n# given on the command line:\n" + "".join(f"#   {item}\n" for item in overrides)
    write_atomic(run.path / "recipe.written.yaml", text)
