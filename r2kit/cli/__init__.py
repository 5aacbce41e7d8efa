"""The command line: parse, call one function, print errors. Everything heavy is imported inside the commands."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from r2kit import __version__
from r2kit.cli import about, after, training
from r2kit.cli.data import data_app
from r2kit.cli.recipes import recipe_app
from r2kit.errors import Interrupted, R2kitError

app = typer.Typer(
    name="r2kit",
    help="Fine-tune Res2Net, Res2NetPlus and their multi-scale kin on your own images.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help needs no rich, and answers sooner
    pretty_exceptions_enable=False,
)

# In the order in which `r2kit --help` lists them.
for command in (
    training.finetune,
    training.resume,
    training.reproduce,
    training.optimism,
    training.allocate,
    training.tune,
    training.compare,
    training.study,
    after.evaluate,
    after.predict,
    after.explain,
    after.export,
    after.area,
    after.report,
    after.push,
    after.demo,
    about.models,
    about.benchmark,
    about.doctor,
):
    app.command()(command)
app.add_typer(recipe_app, name="recipe")
app.add_typer(data_app, name="data")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"r2kit {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error that a person can mend is one line and exit code 2."""
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given  # accepted anywhere: people add it to the end of the line that failed
    try:
        app(args=[argument for argument in given if argument != "--debug"], prog_name="r2kit")
    except Interrupted as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
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
