"""Commands about the family and this machine."""

from __future__ import annotations

from typing import Annotated

import typer


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


def doctor() -> None:
    """Show versions, device and abilities, and what is missing and how to get it."""
    from r2kit.doctor import examine

    for line in examine():
        typer.echo(line)
