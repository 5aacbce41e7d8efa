"""Pages that are made when the documentation is built, so that they cannot fall behind what they describe.

mkdocs calls `on_files`. Everything else is a function from what r2kit knows of itself to Markdown, without torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from r2kit.catalog import CATALOG, CatalogEntry
from r2kit.cli import app
from r2kit.recipe_file import key_rows, packaged_recipes

ROOT = Path(__file__).parent.parent
COPIED = ("CONTRIBUTING.md", "benchmarks/RESULTS.md", "benchmarks/NOTES.md")
"""Documents of the repository that are pages as they are."""


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to those under docs/; called by mkdocs."""
    from mkdocs.structure.files import File

    for uri, content in pages().items():
        files.append(File.generated(config, uri, content=content))
    return files


def pages() -> dict[str, str]:
    """Return every generated page by its path in the site."""
    made: dict[str, Callable[[], str]] = {
        "reference/keys.md": keys_page,
        "reference/commands.md": commands_page,
        "reference/family.md": family_page,
        "reference/recipes.md": recipes_page,
    }
    found = {uri: make() for uri, make in made.items()}
    return found | {name: (ROOT / name).read_text(encoding="utf-8") for name in COPIED}


def keys_page() -> str:
    """Every key of a recipe, from the schema that checks them."""
    lines = [
        "# Every key of a recipe",
        "",
        "Made from the schema that checks recipes. On the command line a key is written `key.path=value`, in a file",
        "below its section. A key that is not here is an error.",
    ]
    section = None
    for row in key_rows():
        if row.section != section:
            section = row.section
            about = row.about if section else "Beside the sections below, a recipe has:"
            lines += ["", f"## `{section}`" if section else "## The recipe", "", about, ""]
            lines += ["| key | allowed | default | meaning |", "|---|---|---|---|"]
        lines.append(_row(f"`{row.key}`", row.allowed, f"`{row.default}`", row.meaning))
    return "\n".join(lines) + "\n"


def commands_page() -> str:
    """Every command with its arguments and options, from the command line itself."""
    lines = [
        "# Every command",
        "",
        "Made from the command line; `r2kit COMMAND --help` says the same. An error that a person can mend is one",
        "line and exit code 2; `--debug`, anywhere in the line, shows its traceback.",
    ]
    for name, command in walk_commands():
        context = command.make_context(name, [], resilient_parsing=True)
        pieces = command.collect_usage_pieces(context)
        lines += ["", f"## {name}", "", command.help or "", "", "```text", f"{name} {' '.join(pieces)}", "```"]
        rows = [record for param in command.params if (record := param.get_help_record(context)) is not None]
        rows = [row for row in rows if not row[0].startswith("--help")]
        if rows:
            lines += ["", "| argument or option | meaning |", "|---|---|"]
            lines += [_row(f"`{left}`", right) for left, right in rows]
    return "\n".join(lines) + "\n"


def walk_commands() -> list[tuple[str, Any]]:
    """Return every command that does something, by its whole name, in the order in which `r2kit --help` lists them."""
    found: list[tuple[str, Any]] = []

    def walk(name: str, command: Any) -> None:
        inner = getattr(command, "commands", None)
        if inner is None:
            found.append((name, command))
            return
        for word, below in inner.items():
            walk(f"{name} {word}", below)

    walk("r2kit", typer.main.get_command(app))
    return found


def family_page() -> str:
    """Every network with exact figures and their sources, from the catalogue."""
    lines = [
        "# The family",
        "",
        "Made from the catalogue that `r2kit models` lists. Parameters and multiply-adds are exact, for the image size",
        "and the number of classes of the row; `tests/backbones` builds every network and compares. Top-1 is what the",
        "source states for its own weights and protocol, nothing measured here. Where timm owns a name, timm's model",
        "is built.",
    ]
    for family in dict.fromkeys(entry.family for entry in CATALOG):
        lines += ["", f"## {family}", ""]
        lines += ["| name | whose | parameters | multiply-adds | at px | top-1, % | source | weights | notes |"]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        lines += [_network(entry) for entry in CATALOG if entry.family == family]
    return "\n".join(lines) + "\n"


def _network(entry: CatalogEntry) -> str:
    """One network as a row."""
    top1 = "not published" if entry.top1 is None else f"{entry.top1:.2f} ({entry.dataset})"
    weights = "none" if entry.weights is None else f"{entry.weights} (licence {entry.licence})"
    return _row(
        f"`{entry.name}`",
        entry.owner,
        f"{entry.params:,}",
        f"{entry.macs:,}",
        str(entry.input_size[-1]),
        top1,
        entry.source or "-",
        weights,
        entry.notes or "-",
    )


def recipes_page() -> str:
    """Every packaged recipe: its header as it is, and the file."""
    lines = [
        "# Recipes",
        "",
        "They come with the package: `r2kit finetune NAME` finds one by its name, `r2kit recipe copy NAME` writes it",
        "here to be changed. The header of each says what was measured with it, and what was not.",
    ]
    for name, path in packaged_recipes().items():
        text = path.read_text(encoding="utf-8")
        title = text.splitlines()[0].removeprefix("# ")
        lines += ["", f"## {name}", "", title, "", "```yaml", text.rstrip("\n"), "```"]
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    """One row of a table; what would end a cell, or be read as a tag, is escaped."""
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    """Text that is safe in a cell, whose signs are no Markdown; code stays code."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(
        part.replace("|", "\\|") if part.startswith("`") else re.sub(r"([*_|])", r"\\\1", part).replace("<", "&lt;")
        for part in parts
    )
