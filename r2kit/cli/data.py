"""`r2kit data ...`"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from r2kit.cli.options import DataArgument, Overrides

if TYPE_CHECKING:
    from r2kit.recipe import Recipe

RecipeOfData = Annotated[
    str | None,
    typer.Option(help="Recipe whose data part says how images are read and divided; default: the defaults."),
]

data_app = typer.Typer(
    help="Describe, divide and check data before training.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)


@data_app.command("stats")
def data_stats(
    data: DataArgument,
    overrides: Overrides = None,
    recipe: RecipeOfData = None,
    parts: Annotated[bool, typer.Option("--parts", help="Of train, val and test each, beside all.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the figures, as .csv or .parquet.")] = None,
) -> None:
    """Measure every band over all images: mean, deviation, range, percentiles, share without measurement.

    For masks, also the pixels of each of their values.
    """
    import numpy as np
    import pandas as pd

    from r2kit.console import make_console, table
    from r2kit.data.masks import MaskedImages
    from r2kit.data.sources import open_source
    from r2kit.data.splits import PARTS, make_split
    from r2kit.data.statistics import describe_bands
    from r2kit.data.table import write_table

    described = _recipe_of(data, overrides, recipe)
    source = open_source(described.data, described.target)
    rows_of = {"all": np.arange(len(source.manifest))}
    if parts:
        split = make_split(source.manifest, source.strata, described.data, described.seed, source.contents)
        rows_of |= {part: split.rows(part) for part in PARTS if len(split.rows(part))}
    found = {part: describe_bands(source, rows) for part, rows in rows_of.items()}
    whole = found["all"]
    if out is not None:
        frames = [frame.reset_index().assign(part=part) for part, frame in found.items()]
        write_table(pd.concat(frames) if parts else whole.reset_index(), out)
    console = make_console()
    rows = [
        [*([part] if parts else []), band, *(f"{value:.5g}" for value in frame.loc[band])]
        for band in whole.index
        for part, frame in found.items()
    ]
    head = [*(["part"] if parts else []), "band", *whole.columns]
    console.print(table(f"bands of {whole.attrs['images']} images, in raw units", head, rows))
    console.print(f"percentiles: {whole.attrs['percentiles']}")
    if isinstance(source, MaskedImages):
        total = sum(source.values.values())
        values = [
            [source.meaning.say([value]).removeprefix("value "), str(n), f"{n / total:.4%}"]
            for value, n in source.values.items()
        ]
        console.print(table("values of the masks", ["value", "pixels", "share"], values))
    for path, reason in source.skipped:
        console.print(f"left out: {path}: {reason}")
    if out is not None:
        console.print(f"written: {out}")


@data_app.command("split")
def data_split(
    data: DataArgument,
    overrides: Overrides = None,
    recipe: RecipeOfData = None,
    by: Annotated[
        str, typer.Option(help="auto, blocks, group or stratified; auto as a recipe with this data would do.")
    ] = "auto",
    folds: Annotated[int | None, typer.Option(min=2, help="One file for each of so many folds: NAME-0, ...")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write, .csv or .parquet.")] = Path("split.csv"),
) -> None:
    """Divide images into train, val and test, as a file that a recipe uses with data.split_file."""
    from r2kit.data.sources import open_source
    from r2kit.data.splits import PARTS, write_splits

    extra = [f"data.split={by}"] + ([] if folds is None else [f"data.folds={folds}"])
    divided = _recipe_of(data, [*(overrides or []), *extra], recipe)
    command = ["r2kit", "finetune", recipe or "RECIPE", *chosen_data(data), *(overrides or [])]
    for path, split in write_splits(open_source(divided.data, divided.target), divided.data, divided.seed, out):
        counts = ", ".join(f"{len(split.rows(part))} {part}" for part in PARTS)
        typer.echo(f"{path}: {split.described}: {counts}")
        for warning in split.warnings:
            typer.echo(f"  note: {warning}")
        typer.echo(f"  use it: {shlex.join([*command, f'data.split_file={path}'])}")


@data_app.command("check")
def data_check(
    data: DataArgument,
    overrides: Overrides = None,
    recipe: RecipeOfData = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for check.html and manifest.parquet.")] = Path(
        "data-check"
    ),
) -> None:
    """Look for what would make a result untrue; exit code 1 if there is something, 2 if the data cannot be opened."""
    from r2kit.data.check import check_data

    checked = _recipe_of(data, overrides, recipe)
    command = shlex.join(["r2kit", "finetune", recipe or "RECIPE", *chosen_data(data), *(overrides or [])])
    again = [data, *(overrides or []), *([] if recipe is None else ["--recipe", recipe])]
    verdict = check_data(checked, out, command, shlex.join(again))
    for finding in verdict.findings:
        typer.echo(f"{'untrue' if finding.untrue else 'warning'}: {finding.kind}: {finding.text}")
        typer.echo(f"  mend: {finding.mend}")
        typer.echo(f"  {finding.change}")
    typer.echo(f"written: {out / 'check.html'}, {out / 'manifest.parquet'}")
    if verdict.untrue:
        typer.echo("verdict: a result on this data would not be true")
        raise typer.Exit(1)
    typer.echo("verdict: nothing found that would make a result untrue")


@data_app.command("noise")
def data_noise(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Finished runs: the k folds of one recipe.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for noise.html and noise.csv.")] = Path("data-noise"),
) -> None:
    """Rank labels that are likely wrong, by the predictions of test images that the runs did not learn."""
    from r2kit.noise import describe, rank_noise
    from r2kit.run import Run

    ranked = rank_noise([Run.open(run) for run in runs], out)
    typer.echo(
        f"{int(ranked['issue'].sum())} of {len(ranked)} test images look more like another class than like their own"
    )
    for row in ranked.head(10).to_dict("records"):
        typer.echo(f"  {row['path']}: {describe(row)}")
    typer.echo(f"written: {out / 'noise.html'}, {out / 'noise.csv'}")


def _recipe_of(data: str, overrides: list[str] | None, recipe: str | None = None) -> Recipe:
    """The recipe, or the defaults, with DATA as its data."""
    from r2kit.recipe_file import load_recipe

    # JSON is YAML, so that a path with any characters stays one text; what a recipe says about its data gives way.
    keys = {"source": '"auto"', "root": "null", "name": "null"}
    keys |= {
        item.split("=", 1)[0].removeprefix("data."): json.dumps(item.split("=", 1)[1]) for item in chosen_data(data)
    }
    instead = [f"data.{key}={value}" for key, value in keys.items()]
    return load_recipe({} if recipe is None else recipe, [*instead, *(overrides or [])])


def chosen_data(data: str) -> list[str]:
    """DATA as key.path=value items."""
    if data == "bluemarble":
        return ["data.source=bluemarble"]
    if data.startswith("torchvision:"):
        return [f"data.name={data.removeprefix('torchvision:')}"]
    return [f"data.root={data}"]
