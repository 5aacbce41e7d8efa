"""The command line: parse, call one function, print errors. Everything heavy is imported inside the commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from r2kit import __version__
from r2kit.errors import R2kitError, RecipeError

if TYPE_CHECKING:
    from r2kit.recipe import Recipe

app = typer.Typer(
    name="r2kit",
    help="Fine-tune Res2Net, Res2NetPlus and their multi-scale kin on your own images.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help needs no rich, and answers sooner
    pretty_exceptions_enable=False,
)
recipe_app = typer.Typer(
    help="Check, show, write and copy recipes.", no_args_is_help=True, rich_markup_mode=None, add_completion=False
)
app.add_typer(recipe_app, name="recipe")
data_app = typer.Typer(
    help="Describe, divide and check data before training.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)
app.add_typer(data_app, name="data")

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a packaged recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Changes, e.g. train.epochs=3.")
]
DataArgument = Annotated[
    str, typer.Argument(metavar="DATA", help="A folder, a CSV or Parquet table, or bluemarble for the embedded tiles.")
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images in one forward pass; does not change the result.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read images.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"r2kit {__version__}")
        raise typer.Exit


def _check_resume(resume: str | None, overwrite: bool) -> None:
    """Refuse any word but auto, and two options of which one keeps what the other removes."""
    if resume not in (None, "auto"):
        raise R2kitError(f"--resume: got '{resume}', allowed is auto")
    if overwrite and resume:
        raise R2kitError("--overwrite and --resume contradict each other; give one of them")


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


@app.command()
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


@app.command()
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


@app.command()
def evaluate(
    run: RunArgument,
    data: Annotated[
        Path | None, typer.Option(help="Another folder with the same classes; default: the run's held-out images.")
    ] = None,
    split: Annotated[str, typer.Option(help="auto (test if there is one), val or test.")] = "auto",
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    device: Device = "auto",
) -> None:
    """Measure a run on its held-out images, each number with an interval."""
    from r2kit.console import make_console, quiet_libraries
    from r2kit.evaluate import evaluate as measure
    from r2kit.evaluate import summary_lines
    from r2kit.run import Run

    quiet_libraries()
    opened = Run.open(run)
    metrics = measure(
        opened,
        data=None if data is None else str(data),
        split=split,
        batch_size=batch_size,
        workers=workers,
        device=device,
    )
    console = make_console()
    for line in summary_lines(metrics):
        console.print(line)


@app.command()
def predict(
    run: RunArgument,
    paths: Annotated[list[Path], typer.Argument(metavar="PATHS...", help="Image files and folders.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Table to write; a CSV and a Parquet file of this name are made.")
    ] = Path("predictions.csv"),
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    device: Device = "auto",
) -> None:
    """Predict the class of image files and folders, as CSV and Parquet."""
    from r2kit.console import make_console, quiet_libraries
    from r2kit.predict import predict as run_predict
    from r2kit.run import Run

    quiet_libraries()
    found = run_predict(Run.open(run), paths, out=out, batch_size=batch_size, workers=workers, device=device)
    console = make_console()
    for row in found.head(10).itertuples():
        console.print(f"{row.path}  {row[2]}  {row.confidence:.3f}")
    if len(found) > 10:
        console.print(f"and {len(found) - 10} more")
    console.print(f"written: {out.with_suffix('.csv')}, {out.with_suffix('.parquet')}")


@app.command()
def report(run: RunArgument) -> None:
    """Write the run's report.html anew."""
    from r2kit.console import quiet_libraries
    from r2kit.report import write_report
    from r2kit.run import Run

    quiet_libraries()
    typer.echo(write_report(Run.open(run)))


@app.command()
def models(
    pattern: Annotated[str | None, typer.Argument(help="Names to show, e.g. '*plus*' or 'scalenet'.")] = None,
) -> None:
    """List the family: parameters, GMACs, published top-1, weights and their licence."""
    from r2kit.catalog import family
    from r2kit.console import make_console, table

    entries = family(pattern)
    rows = [
        [
            entry.name,
            entry.family,
            f"{entry.params / 1e6:.2f}",
            f"{entry.macs / 1e9:.2f}",
            entry.input_size[-1],
            "-" if entry.top1 is None else f"{entry.top1:.2f}",
            "none" if entry.weights is None else f"{entry.weights} (licence {entry.licence})",
        ]
        for entry in entries
    ]
    columns = ["name", "family", "params (M)", "GMACs", "at px", "published top-1 (%)", "weights"]
    make_console().print(table("multi-scale backbones", columns, rows, numbers_from=2))


@app.command()
def doctor() -> None:
    """Show versions, device and abilities, and what is missing and how to get it."""
    from r2kit.doctor import examine

    for line in examine():
        typer.echo(line)


# ------------------------------------------------------------------------------------------------------- recipes


@recipe_app.command("check")
def recipe_check(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Check a recipe and name every problem by file, line and key."""
    from r2kit.recipe_file import load_recipe

    load_recipe(recipe, overrides or [])
    typer.echo(f"{recipe}: ok")


@recipe_app.command("show")
def recipe_show(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Print a recipe with every default filled in."""
    from r2kit.recipe_file import load_recipe, to_yaml

    typer.echo(to_yaml(load_recipe(recipe, overrides or [])), nl=False)


@recipe_app.command("schema")
def recipe_schema() -> None:
    """Print the JSON Schema of a recipe, for editors that complete and check YAML."""
    from r2kit.recipe_file import to_schema

    typer.echo(json.dumps(to_schema(), indent=2))


@recipe_app.command("new")
def recipe_new(
    file: Annotated[Path | None, typer.Argument(help="File to write; printed when left out.")] = None,
) -> None:
    """Write a commented starting point with every key and its default."""
    from r2kit.recipe_file import new_recipe

    _write_new(new_recipe(), file)


@recipe_app.command("copy")
def recipe_copy(
    name: Annotated[str, typer.Argument(help="Name of a packaged recipe, e.g. satellite.")],
    file: Annotated[Path | None, typer.Argument(help="File to write; default ./NAME.yaml.")] = None,
) -> None:
    """Write a packaged recipe into the current folder."""
    from r2kit.errors import did_you_mean
    from r2kit.recipe_file import packaged_recipes

    packaged = packaged_recipes()
    if name not in packaged:
        hint = did_you_mean(name, packaged) or f"; packaged recipes are: {', '.join(packaged)}"
        raise RecipeError(f"{name}: no packaged recipe of this name{hint}")
    _write_new(packaged[name].read_text(encoding="utf-8"), file or Path(f"{name}.yaml"))


def _write_new(text: str, file: Path | None) -> None:
    """Print, or write a file that does not exist yet."""
    if file is None:
        typer.echo(text, nl=False)
        return
    try:
        with file.open("x", encoding="utf-8") as handle:
            handle.write(text)
    except FileExistsError:
        raise RecipeError(f"{file}: exists already; name another file") from None
    except OSError as error:
        raise RecipeError(f"{file}: cannot be written: {error.strerror or error}") from None
    typer.echo(f"written: {file}")


# ---------------------------------------------------------------------------------------------------------- data


@data_app.command("stats")
def data_stats(
    data: DataArgument,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Also write the figures, as .csv or .parquet.")] = None,
) -> None:
    """Measure every band over all images: mean, deviation, range, percentiles, share without measurement."""
    import numpy as np

    from r2kit.console import make_console, table
    from r2kit.data.sources import open_source
    from r2kit.data.statistics import describe_bands
    from r2kit.data.table import write_table

    source = open_source(_recipe_of(data, overrides).data)
    found = describe_bands(source, np.arange(len(source.manifest)))
    if out is not None:
        write_table(found.reset_index(), out)
    rows = [[band, *(f"{value:.5g}" for value in row)] for band, row in zip(found.index, found.to_numpy(), strict=True)]
    console = make_console()
    console.print(table(f"bands of {found.attrs['images']} images, in raw units", ["band", *found.columns], rows))
    console.print(f"percentiles: {found.attrs['percentiles']}")
    for path, reason in source.skipped:
        console.print(f"left out: {path}: {reason}")
    if out is not None:
        console.print(f"written: {out}")


@data_app.command("split")
def data_split(
    data: DataArgument,
    overrides: Overrides = None,
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
    recipe = _recipe_of(data, [*(overrides or []), *extra])
    for path, split in write_splits(open_source(recipe.data), recipe.data, recipe.seed, out):
        counts = ", ".join(f"{len(split.rows(part))} {part}" for part in PARTS)
        typer.echo(f"{path}: {split.described}: {counts}")
        for warning in split.warnings:
            typer.echo(f"  note: {warning}")
        typer.echo(f"  use it: r2kit finetune RECIPE data.root={data} data.split_file={path}")


@data_app.command("check")
def data_check(
    data: DataArgument,
    overrides: Overrides = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe whose data part says how images are divided; default: the defaults.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for check.html and manifest.parquet.")] = Path(
        "data-check"
    ),
) -> None:
    """Look for what would make a result untrue; exit code 1 if there is something, 2 if the data cannot be opened."""
    from r2kit.data.check import check_data

    verdict = check_data(_recipe_of(data, overrides, recipe), out)
    for finding in verdict.findings:
        typer.echo(f"{'untrue' if finding.untrue else 'warning'}: {finding.kind}: {finding.text}")
        typer.echo(f"  mend: {finding.mend}")
    typer.echo(f"written: {out / 'check.html'}, {out / 'manifest.parquet'}")
    if verdict.untrue:
        typer.echo("verdict: a result on this data would not be true")
        raise typer.Exit(1)
    typer.echo("verdict: nothing found that would make a result untrue")


def _recipe_of(data: str, overrides: list[str] | None, recipe: str | None = None) -> Recipe:
    """The recipe, or the defaults, with DATA as its data."""
    from r2kit.recipe_file import load_recipe

    source, root = ("bluemarble", None) if data == "bluemarble" else ("auto", data)
    if recipe is None:
        return load_recipe({"data": {"source": source, "root": root}}, overrides or [])
    # JSON is YAML, so that a path with any characters stays one text.
    return load_recipe(recipe, [f"data.source={source}", f"data.root={json.dumps(root)}", *(overrides or [])])


# -------------------------------------------------------------------------------------------------------- errors


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error that a person can mend is one line and exit code 2."""
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given  # accepted anywhere: people add it to the end of the line that failed
    try:
        app(args=[argument for argument in given if argument != "--debug"], prog_name="r2kit")
    except R2kitError as error:
        if debug:
            raise
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
