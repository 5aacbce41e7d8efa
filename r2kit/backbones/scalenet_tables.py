"""ScaleNet's channel tables: the authors' file format, its checks, and the four published tables.

A table has one row per scale-aggregation block, in forward order: ``[n1, n2, n4, n7, side]``, the output channels of
the branches that look at the block's map pooled by 1, 2, 4 and 7, and the side of that map for a 224-px image (56, 28,
14 and 7 for stages 1 to 4). The rows alone fix the depth of the network. A count of 0 removes the branch.

Source: Li et al. 2019, "Data-Driven Neuron Allocation for Scale Aggregation Networks", arXiv:1904.09460; the tables
are those of the folder ``structures`` of github.com/Eli-YiLi/ScaleNet.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r2kit.errors import ModelError

Row = tuple[int, int, int, int, int]
Structure = tuple[Row, ...]

SCALES = (1, 2, 4, 7)
"""Pooling factors of a block's four branches, in the order of a row's counts."""

SIDES = (56, 28, 14, 7)
"""Sides of the four stages' maps for a 224-px image."""


def read_structure(source: str | Path | Sequence[Sequence[int]]) -> Structure:
    """Read and check a channel table.

    Args:
        source: A path to a JSON file of the authors' format, or the rows themselves.

    Returns:
        The rows as tuples ``(n1, n2, n4, n7, side)``.

    Raises:
        ModelError: If the file cannot be read, or a row is not of the format, or a stage has no row.
    """
    if isinstance(source, (str, Path)):
        return _check(_load(Path(source)), f"structure file {source}")
    return _check(source, "structure")


def save_structure(structure: Sequence[Sequence[int]], path: str | Path) -> None:
    """Write a channel table as JSON in the authors' format, one row a line.

    Args:
        structure: Rows ``(n1, n2, n4, n7, side)``.
        path: File to write; its folder must exist.

    Raises:
        ModelError: If the table is not of the format or the file cannot be written.
    """
    rows = ",\n ".join(json.dumps(list(row)) for row in read_structure(structure))
    try:
        Path(path).write_text(f"[{rows}]\n", encoding="utf-8")
    except OSError as error:
        raise ModelError(f"structure file {path}: cannot be written ({error.strerror})") from error


def stages_of(structure: Structure) -> list[list[Row]]:
    """Return the rows of a checked table by stage, four non-empty lists."""
    return [[row for row in structure if row[-1] == side] for side in SIDES]


def _load(path: Path) -> Any:
    """Parse a JSON file, naming it in every error."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"structure file {path}: cannot be read ({error.strerror}); give a JSON table such as "
            "`r2kit allocate` writes, or a list of rows [n1, n2, n4, n7, side]"
        ) from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ModelError(f"structure file {path}: not JSON ({error})") from error


def _check(rows: Any, where: str) -> Structure:
    """Check every row, then the order of the stages."""
    if isinstance(rows, (str, bytes)) or not isinstance(rows, Sequence) or not rows:
        raise ModelError(f"{where}: expected a list of rows [n1, n2, n4, n7, side], got {_shown(rows)}")
    checked = tuple(_check_row(row, f"{where}, row {number}") for number, row in enumerate(rows, start=1))
    for number, (before, after) in enumerate(itertools.pairwise(checked), start=2):
        if after[-1] > before[-1]:
            raise ModelError(
                f"{where}, row {number}: side {after[-1]} follows {before[-1]}; rows go in forward order, sides "
                f"from {SIDES[0]} down to {SIDES[-1]}"
            )
    missing = [side for side in SIDES if all(row[-1] != side for row in checked)]
    if missing:
        raise ModelError(f"{where}: no row of side {missing[0]}; each of the sides {SIDES} needs at least one row")
    return checked


def _check_row(row: Any, where: str) -> Row:
    """Check one row: four counts that are not all zero, and a side."""
    entries = list(row) if isinstance(row, Sequence) and not isinstance(row, (str, bytes)) else None
    if entries is None or len(entries) != 5 or any(type(entry) is not int for entry in entries):
        raise ModelError(f"{where}: expected five whole numbers [n1, n2, n4, n7, side], got {_shown(row)}")
    *counts, side = entries
    if min(counts) < 0 or sum(counts) == 0:
        raise ModelError(f"{where}: channel counts must be 0 or more and not all 0, got {counts}")
    if side not in SIDES:
        raise ModelError(f"{where}: side must be one of {SIDES} (the map's side for a 224-px image), got {side}")
    return (counts[0], counts[1], counts[2], counts[3], side)


def _shown(value: Any) -> str:
    """Return a value for an error message, cut to a line's length."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# One stage begins a new line, as in the network.
# fmt: off
SCALENET50_LIGHT: Structure = (
    (30, 8, 10, 16, 56), (30, 9, 9, 16, 56), (30, 27, 7, 0, 56),
    (59, 55, 13, 1, 28), (59, 43, 8, 18, 28), (59, 57, 12, 0, 28), (59, 59, 9, 1, 28),
    (117, 65, 71, 3, 14), (107, 16, 33, 100, 14), (111, 49, 62, 34, 14), (106, 61, 61, 28, 14), (99, 71, 59, 27, 14),
    (76, 50, 67, 63, 14),
    (141, 182, 189, 0, 7), (83, 9, 185, 235, 7), (77, 16, 184, 235, 7),
)

SCALENET50: Structure = (
    (62, 9, 5, 12, 56), (55, 27, 5, 1, 56), (59, 26, 0, 3, 56),
    (125, 41, 6, 3, 28), (90, 39, 9, 37, 28), (106, 56, 4, 9, 28), (116, 56, 3, 0, 28),
    (223, 71, 55, 0, 14), (196, 104, 44, 5, 14), (195, 98, 52, 4, 14), (155, 128, 66, 0, 14), (134, 129, 86, 0, 14),
    (120, 127, 98, 4, 14),
    (237, 354, 106, 0, 7), (172, 435, 90, 0, 7), (138, 462, 97, 0, 7),
)

SCALENET101: Structure = (
    (61, 11, 7, 7, 56), (56, 23, 4, 3, 56), (59, 24, 3, 0, 56),
    (123, 41, 1, 6, 28), (126, 38, 1, 6, 28), (127, 41, 3, 0, 28), (127, 41, 3, 0, 28),
    (220, 86, 35, 0, 14), (186, 64, 55, 36, 14), (156, 25, 53, 107, 14), (191, 44, 52, 54, 14),
    (181, 53, 83, 24, 14), (221, 82, 34, 4, 14), (177, 62, 90, 12, 14), (130, 75, 102, 34, 14), (206, 71, 55, 9, 14),
    (203, 83, 53, 2, 14), (207, 73, 54, 7, 14), (245, 84, 12, 0, 14), (221, 103, 17, 0, 14), (221, 100, 20, 0, 14),
    (158, 99, 84, 0, 14), (220, 106, 15, 0, 14), (173, 92, 73, 3, 14), (135, 122, 84, 0, 14), (109, 71, 132, 29, 14),
    (147, 94, 93, 7, 14), (191, 108, 42, 0, 14), (127, 95, 113, 6, 14), (203, 117, 21, 0, 14),
    (282, 377, 23, 0, 7), (279, 388, 15, 0, 7), (84, 442, 155, 1, 7),
)

SCALENET152: Structure = (
    (39, 27, 10, 14, 56), (45, 32, 8, 5, 56), (46, 36, 8, 0, 56),
    (55, 26, 35, 63, 28), (89, 44, 19, 27, 28), (93, 62, 14, 10, 28), (110, 43, 12, 14, 28), (109, 54, 13, 3, 28),
    (119, 59, 0, 1, 28), (106, 70, 3, 0, 28), (114, 65, 0, 0, 28),
    (224, 102, 31, 1, 14), (163, 49, 68, 78, 14), (115, 65, 73, 105, 14), (143, 107, 71, 37, 14),
    (144, 97, 92, 25, 14), (195, 87, 60, 16, 14), (198, 77, 62, 21, 14), (168, 139, 43, 8, 14),
    (80, 80, 71, 127, 14), (138, 88, 93, 39, 14), (107, 93, 65, 93, 14), (230, 103, 25, 0, 14),
    (182, 132, 40, 4, 14), (179, 114, 53, 12, 14), (220, 76, 53, 9, 14), (227, 118, 13, 0, 14),
    (196, 110, 51, 1, 14), (232, 118, 8, 0, 14), (224, 114, 20, 0, 14), (214, 100, 43, 1, 14), (139, 114, 97, 8, 14),
    (198, 113, 47, 0, 14), (151, 87, 115, 5, 14), (171, 103, 83, 1, 14), (172, 104, 72, 10, 14),
    (205, 88, 65, 0, 14), (170, 122, 64, 2, 14), (170, 98, 81, 9, 14), (223, 101, 32, 2, 14), (192, 114, 52, 0, 14),
    (112, 99, 134, 13, 14), (109, 116, 130, 3, 14), (110, 90, 118, 40, 14), (194, 115, 49, 0, 14),
    (178, 135, 45, 0, 14), (209, 135, 14, 0, 14),
    (341, 368, 6, 0, 7), (363, 348, 4, 0, 7), (311, 398, 6, 0, 7),
)
# fmt: on
