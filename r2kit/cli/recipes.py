"""`r2kit recipe ...`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from r2kit.cli.options import Overrides, RecipeArgument
from r2kit.errors import RecipeError

recipe_app = typer.Typer(
    help="Check, show, write and copy recipes.", no_args_is_help=True, rich_markup_mode=None, add_completion=False
)


@recipe_app.command("check")
def recipe_check(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Check a recipe and name every problem by file, line and key."""
    from r2kit.recipe_file import load_recipe

    checked = load_recipe(recipe, overrides or [])
    if checked.augment.transforms:
        from r2kit.data.custom import make_transforms  # only here: albumentations takes seconds to import

        make_transforms(checked.augment.transforms)
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
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="File to write; printed when left out.")] = None,
    task: Annotated[str, typer.Option(help="The kind of task, e.g. segmentation.")] = "classification",
) -> None:
    """Write a commented starting point with every key and its default."""
    from r2kit.recipe_file import new_recipe

    _write_new(new_recipe(task), file)


@recipe_app.command("copy")
def recipe_copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a packaged recipe, e.g. satellite.")],
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="File to write; default ./NAME.yaml.")] = None,
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
