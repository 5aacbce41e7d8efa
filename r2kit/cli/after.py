"""Commands that take the folder of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from r2kit.cli.options import BatchSize, Device, RunArgument, Tta, Workers


def evaluate(
    run: RunArgument,
    data: Annotated[
        Path | None, typer.Option(help="Another folder with the same classes; default: the run's held-out images.")
    ] = None,
    split: Annotated[str, typer.Option(help="auto (test if there is one), val or test.")] = "auto",
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    device: Device = "auto",
    tta: Tta = False,
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
        tta=tta,
    )
    console = make_console()
    for line in summary_lines(metrics):
        console.print(line)


def predict(
    run: RunArgument,
    paths: Annotated[list[Path], typer.Argument(metavar="PATHS...", help="Image files and folders.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Table to write; a CSV and a Parquet file of this name are made.")
    ] = Path("predictions.csv"),
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    device: Device = "auto",
    tta: Tta = False,
) -> None:
    """Predict the class of image files and folders, as CSV and Parquet."""
    from r2kit.console import make_console, quiet_libraries
    from r2kit.predict import predict as run_predict
    from r2kit.run import Run

    quiet_libraries()
    found = run_predict(Run.open(run), paths, out=out, batch_size=batch_size, workers=workers, device=device, tta=tta)
    console = make_console()
    for row in found.head(10).itertuples():
        console.print(f"{row.path}  {row[2]}  {row.confidence:.3f}")
    if len(found) > 10:
        console.print(f"and {len(found) - 10} more")
    console.print(f"written: {out.with_suffix('.csv')}, {out.with_suffix('.parquet')}")


def report(run: RunArgument) -> None:
    """Write the run's report.html anew."""
    from r2kit.console import quiet_libraries
    from r2kit.report import write_report
    from r2kit.run import Run

    quiet_libraries()
    typer.echo(write_report(Run.open(run)))
