"""Commands that train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from r2kit.cli.options import Overrides, RecipeArgument, RunArgument
from r2kit.errors import R2kitError


def _check_resume(resume: str | None, overwrite: bool) -> None:
    """Refuse any word but auto, and two options of which one keeps what the other removes."""
    if resume not in (None, "auto"):
        raise R2kitError(f"--resume: got '{resume}', allowed is auto")
    if overwrite and resume:
        raise R2kitError("--overwrite and --resume contradict each other; give one of them")


def finetune(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The run folder, named exactly; default runs/<recipe>-<n>.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Everything up to the first two steps; keeps nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that --out holds.")] = False,
    resume: Annotated[
        str | None, typer.Option(metavar="auto", help="auto: go on with the run that --out holds.")
    ] = None,
) -> None:
    """Train, evaluate and explain a network as a recipe says."""
    _check_resume(resume, overwrite)
    from r2kit import train

    if dry_run:
        train.dry_run(recipe, overrides=overrides or [])
    else:
        train.finetune(recipe, out=out, overrides=overrides or [], overwrite=overwrite, resume=resume == "auto")


def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that was interrupted.")],
) -> None:
    """Go on with an interrupted run from the very step, to the result it would have had."""
    from r2kit import train

    train.resume(run)


def reproduce(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="The new folder, named exactly; default RUN-again-<n>.")] = None,
) -> None:
    """Run a finished run again from its own folder, and say whether the same comes out; exit code 1 if not."""
    from r2kit import train

    if any(finding.decides and not finding.agrees for finding in train.reproduce(run, out=out)):
        raise typer.Exit(1)


def optimism(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder of the two runs, honest and random.")] = Path("runs/optimism"),
) -> None:
    """Train under a random split and under one by blocks or groups: what the random one would have promised."""
    from r2kit.optimism import optimism as measure

    measure(recipe, out=out, overrides=overrides or [])


def allocate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    budget: Annotated[
        str,
        typer.Option(
            help="macs=2.9G: multiply-adds; macs=0.8x: of the recipe's network; channels=1.0: of each block's 1x1."
        ),
    ] = ...,  # type: ignore[assignment]  # typer's word for an option that must be given
    out: Annotated[
        Path | None, typer.Option(help="The folder, named exactly; default runs/<recipe>-allocation-<n>.")
    ] = None,
    seed_width: Annotated[
        float, typer.Option(help="Channels of each scale of the seed network over those of the block's 1x1.")
    ] = 1.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the allocation that --out holds.")] = False,
    resume: Annotated[
        str | None, typer.Option(metavar="auto", help="auto: go on with the seed network that --out holds.")
    ] = None,
) -> None:
    """Learn on a recipe's data how many channels each scale of a ScaleNet should have."""
    _check_resume(resume, overwrite)
    from r2kit.allocate import allocate as learn

    learn(
        recipe,
        budget=budget,
        out=out,
        overrides=overrides or [],
        seed_width=seed_width,
        overwrite=overwrite,
        resume=resume == "auto",
    )


def compare(
    given: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN", help="Finished runs, the base first; with --recipe, KEY.PATH=VALUE changes."),
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Train --models by this recipe, then compare them.")] = None,
    models: Annotated[str | None, typer.Option(help="Names, separated by commas; the first is the base.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds for each network, counted up from the recipe's.")] = 1,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for compare.html and new runs.")] = Path("compared"),
) -> None:
    """Compare runs on the same images: paired differences with intervals, and what each costs."""
    from r2kit.compare import compare_command

    compare_command(given or [], recipe=recipe, models=models, seeds=seeds, out=out)


def study(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    vary: Annotated[
        list[str],
        typer.Option(help="A key and its other values, once for each: model.block.scale=2,4,8, train.lr=1e-3,3e-3."),
    ] = ...,  # type: ignore[assignment]  # typer's word for an option that must be given
    seeds: Annotated[int, typer.Option(min=1, help="Seeds for each network, counted up from the recipe's.")] = 1,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for study.csv, study.png and the runs.")] = Path(
        "study"
    ),
) -> None:
    """Vary one key at a time around a recipe: accuracy against parameters and multiply-adds, as table and picture."""
    from r2kit.study import study as train_all

    train_all(recipe, vary, seeds=seeds, out=out, overrides=overrides or [])


def tune(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    space: Annotated[
        list[str],
        typer.Option(
            help="A key to search, once for each: train.lr=1e-4..1e-2:log, model.drop_path_rate=0..0.3, "
            "train.optimizer=adamw,sgd."
        ),
    ] = ...,  # type: ignore[assignment]  # typer's word for an option that must be given
    trials: Annotated[int, typer.Option(min=1, help="Trials in the end, earlier ones and other processes' too.")] = 20,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder; given again the search goes on, or is shared. Default runs/<recipe>-tune-<n>."),
    ] = None,
) -> None:
    """Search a few keys of a recipe for what is best on the validation images; the result is a recipe."""
    from r2kit.tune import tune as search

    search(recipe, space=space, trials=trials, out=out, overrides=overrides or [])
