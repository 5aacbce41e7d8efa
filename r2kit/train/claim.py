"""The folder of a run, before it trains: whether it may be used, and what is written into it first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from r2kit import plots
from r2kit.backbones.scalenet import ScaleNet
from r2kit.backbones.scalenet_tables import save_structure
from r2kit.errors import RunError
from r2kit.lr_finder import plot_lr
from r2kit.recipe import Recipe
from r2kit.recipe_file import find_recipe
from r2kit.run import Run, installed_versions, write_atomic
from r2kit.train.choices import record
from r2kit.train.prepare import Job


def claim(recipe: Recipe, out: str | Path | None, *, overwrite: bool, resume: bool) -> Run | None:
    """Return the run to go on with, or None for a new one; refuse a folder in use before any work is done.

    Raises:
        RunError: If the folder holds a run and neither `overwrite` nor `resume` is given, or a run of another recipe,
            or a link to a file elsewhere that the run would write over.
    """
    if out is None or not Run(out).exists():
        return None
    if not (overwrite or resume):
        raise RunError(f"{out}: holds a run already; give --overwrite, --resume auto, or another --out")
    if not resume:
        return None
    run = Run(out)
    run.refuse_links_out()
    if run.recipe != recipe:
        changed = _differences(run.recipe.model_dump(), recipe.model_dump())
        raise RunError(
            f"{out}: holds a run of another recipe, different in {', '.join(changed[:3])}; "
            f"go on with r2kit resume {out}"
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


def check_same_data(run: Run, fingerprint: str) -> None:
    """Refuse to go on with other data than the run began with.

    Raises:
        RunError: If the fingerprint of the data is another one.
    """
    before = run.info.get("data", {}).get("fingerprint", fingerprint)
    if before != fingerprint:
        raise RunError(
            f"{run.path}: the data have changed since it began: fingerprint {before[:12]}, now {fingerprint[:12]}; "
            "put them back, or start again with r2kit finetune ... --overwrite"
        )


def changed_versions(run: Run) -> list[str]:
    """Say which packages are not those that the run began with."""
    before, now = run.info.get("versions", {}), installed_versions()
    return [f"{name} was {before[name]}, is {now[name]}" for name in now if before.get(name, now[name]) != now[name]]


def write_beginning(job: Job, run: Run) -> None:
    """Write what is known before the first step: preprocessing, split, facts, and a picture of a batch."""
    job.data.preprocess.save(run.preprocess_file)
    if isinstance(job.model, ScaleNet) and job.recipe.model.structure is not None:
        save_structure(job.model.structure, run.structure_file)
    job.data.split.save(run.split_file, job.data.source.manifest, job.data.source.contents)
    run.write_info(
        state="training",
        versions=installed_versions(),
        device=job.device_name,
        data={
            "source": job.data.source.name,
            "fingerprint": job.data.source.fingerprint,
            "image_size": job.data.original_size,
        },
        split=job.data.split.kind,
        decided=record(job.batch, job.task.lr),
        choices=[asdict(choice) for choice in job.choices],
        model={"parameters": job.parameters, "macs": job.macs, "train_images_per_second": round(job.speed, 1)},
    )
    plots.save(plots.batch_mosaic(next(iter(job.data.train_dataloader())), job.data, epoch=0), run, "batch")
    if job.lr_trial is not None:
        plots.save(plot_lr(job.lr_trial), run, "lr_finder")
