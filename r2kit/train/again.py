"""A finished run, run again from its own folder: does the same come out?"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from r2kit.console import make_console, table
from r2kit.errors import RunError
from r2kit.recipe import Recipe
from r2kit.run import Run, next_free
from r2kit.train.flow import finetune


@dataclass(frozen=True)
class Finding:
    """Whether one thing about two runs agrees.

    Attributes:
        what: The thing.
        agrees: Whether it does.
        said: How, in words.
        decides: Whether the runs are only the same when it agrees.
    """

    what: str
    agrees: bool
    said: str
    decides: bool = True


def reproduce(run: str | Path, *, out: str | Path | None = None, quiet: bool = False) -> list[Finding]:
    """Run a finished run again into a new folder, and compare data, versions and result.

    Args:
        run: The folder of the finished run; nothing in it is changed.
        out: The new folder; by default beside it, ``<name>-again-<n>``.
        quiet: Print nothing.

    Returns:
        What was compared. The run is reproduced when all findings that decide agree.

    Raises:
        RunError: If the run is not finished, was trained with fastai, or `out` holds something.
        DataError: If its data are gone.
    """
    first = Run.open(run)
    if "fastai" in first.info:
        raise RunError(
            f"{first.path}: was trained with fastai, and what fastai did is not in its recipe; do the same again with "
            "r2kit.fastai"
        )
    folder = next_free(first.path.parent, f"{first.path.name}-again") if out is None else Path(out)
    second = finetune(_as_decided(first), out=folder, quiet=quiet)
    findings = compare_runs(first, second)
    console = make_console(quiet=quiet)
    rows = [[f.what, "agree" if f.agrees else "DIFFER" if f.decides else "differ", f.said] for f in findings]
    console.print(table(f"{first.path} and {second.path}", ["", "", ""], rows, numbers_from=3))
    wrong = [finding.what for finding in findings if finding.decides and not finding.agrees]
    console.print(
        f"not reproduced: {', '.join(wrong)} differ" if wrong else "reproduced: the same data gave the same bits"
    )
    return findings


def compare_runs(first: Run, second: Run) -> list[Finding]:
    """Compare what went into two finished runs, and what came out."""
    old, new = first.info, second.info
    data, again = old["data"]["fingerprint"], new["data"]["fingerprint"]
    versions = {**old["versions"], "python": old["python"]}, {**new["versions"], "python": new["python"]}
    names = sorted(versions[0].keys() | versions[1].keys())
    moved = [
        f"{n} {versions[0].get(n)} -> {versions[1].get(n)}" for n in names if versions[0].get(n) != versions[1].get(n)
    ]
    one, two = first.metrics_csv.read_bytes(), second.metrics_csv.read_bytes()
    halved = [f"{entry['at']}: {entry['batch_size']} images a pass" for entry in old.get("backed_off", [])]
    out_of_memory = [Finding("memory", False, f"ran out at {'; '.join(halved)} since", decides=False)] if halved else []
    return [
        Finding("data", data == again, _both(data[:12], again[:12])),
        Finding("versions", not moved, ", ".join(moved) or f"{len(names)} packages", decides=False),
        Finding("device", old["device"] == new["device"], _both(old["device"], new["device"]), decides=False),
        *out_of_memory,
        Finding(
            "metrics.csv",
            one == two,
            f"{len(one.splitlines()) - 1} epochs, byte for byte" if one == two else _first_other(one, two),
        ),
        _compare_weights(first, second),
    ]


def weights_digest(path: Path) -> str:
    """Return a SHA-256 of the tensors of a safetensors file: names, types, shapes and values, in the order of names."""
    sha = hashlib.sha256()
    for name, value in sorted(load_file(path).items()):
        sha.update(f"{name} {value.dtype} {value.shape}\n".encode())
        sha.update(np.ascontiguousarray(value).tobytes())
    return sha.hexdigest()


def _as_decided(run: Run) -> Recipe:
    """Return the recipe of a run with what it had left to the machine as the machine then decided."""
    recipe, decided = run.own_recipe, run.info.get("decided", {})
    changed = {}
    if recipe.train.batch_size == "auto":
        changed = {"batch_size": decided["batch_size"], "accumulate": decided["accumulate"]}
    if recipe.train.lr == "auto":
        changed["lr"] = decided["lr"]
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=changed)})


def _both(one: str, two: str) -> str:
    return one if one == two else f"{one} -> {two}"


def _first_other(one: bytes, two: bytes) -> str:
    """Say where two tables first differ."""
    old, new = (text.decode().splitlines() for text in (one, two))
    for epoch, (a, b) in enumerate(zip(old, new, strict=False)):
        if a != b:
            names = old[0].split(",")
            columns = [n for n, x, y in zip(names, a.split(","), b.split(","), strict=False) if x != y]
            return f"first in epoch {epoch}: {', '.join(columns)}"
    return f"{len(old) - 1} and {len(new) - 1} epochs"


def _compare_weights(first: Run, second: Run) -> Finding:
    one, two = (weights_digest(run.weights_file) for run in (first, second))
    if one == two:
        return Finding("weights", True, f"sha256 {one[:12]}")
    old, new = load_file(first.weights_file), load_file(second.weights_file)
    if old.keys() != new.keys() or any(old[key].shape != new[key].shape for key in old):
        return Finding("weights", False, "of other networks")
    largest = max(float(np.abs(old[key].astype(np.float64) - new[key]).max(initial=0.0)) for key in old)
    return Finding("weights", False, f"largest difference {largest:.3g}")
