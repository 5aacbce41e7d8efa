"""Commands about the family and this machine."""

from __future__ import annotations

from typing import Annotated

import typer


def models(
    pattern: Annotated[
        str | None, typer.Argument(metavar="PATTERN", help="Names to show, e.g. '*plus*' or 'scalenet'.")
    ] = None,
) -> None:
    """List the family: parameters, GMACs, published top-1, weights and their licence."""
    from r2kit.catalog import CATALOG, family
    from r2kit.console import make_console, table
    from r2kit.errors import ModelError, did_you_mean

    entries = family(pattern)
    if pattern is not None and not entries:
        raise ModelError(
            f"no network of the family matches '{pattern}'{did_you_mean(pattern, [entry.name for entry in CATALOG])}; "
            "r2kit models alone lists all; a recipe takes timm's other names, too"
        )
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


def benchmark(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Any backbone that r2kit models or timm knows.")],
    against: Annotated[str, typer.Option(help="The backbone it stands beside.")] = "resnet50d",
    size: Annotated[int, typer.Option(min=16, help="Side of the images in pixels.")] = 224,
    batch_size: Annotated[int, typer.Option(min=2, help="Images in a step.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each that are timed.")] = 10,
) -> None:
    """Measure how fast a backbone trains and predicts on this machine's CPU, beside another, in one interleaved run."""
    import torch

    from r2kit.benchmark import compare_speed
    from r2kit.console import make_console, table

    speeds, why = compare_speed(model, against, (size, size), batch_size, rounds=rounds)
    rows = [
        [
            entry.name,
            "training step" if entry.training else "inference",
            f"{entry.images_per_second:.1f}",
            f"{entry.ratio:.2f}",
        ]
        for entry in speeds
    ]
    title = f"{size} px, batch {batch_size}, {torch.get_num_threads()} CPU threads, medians of {rounds} rounds"
    console = make_console()
    console.print(table(title, ["network", "what", "images/s", f"against {against}"], rows, numbers_from=2))
    console.print(f"fast form (r2kit.optimize, train.optimize=auto): {why}")


def doctor() -> None:
    """Show versions, device and abilities, and what is missing and how to get it."""
    from r2kit.doctor import examine

    for line in examine():
        typer.echo(line)
