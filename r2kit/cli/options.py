"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a packaged recipe.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="Changes, e.g. train.epochs=3.")]
DataArgument = Annotated[
    str, typer.Argument(metavar="DATA", help="A folder, a CSV or Parquet table, torchvision:NAME, or bluemarble.")
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images in one forward pass; does not change the result.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read images.")]
Tta = Annotated[
    bool, typer.Option("--tta", help="Average over the eight orientations of each image or tile, at eightfold cost.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
