"""Fenced blocks of the documents, and how a test runs or at least checks each of them."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from r2kit.cli import app, main
from r2kit.cli.data import chosen_data
from r2kit.recipe_file import load_recipe, packaged_recipes

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = ("bash", "python", "yaml", "text")

_FENCE = re.compile(r"^ *```(.*)$")
_MARK = re.compile(r"^<!-- (not run|with|file): (.+) -->$")
# A command with a recipe trains this; what the line says beside it stays.
SMALL = (
    "data.image_size=32",
    "data.workers=0",
    "data.on_bad_file=error",
    "model.name=test_resnet.r160_in1k",
    "model.pretrained=false",
    "train.epochs=1",
    "train.batch_size=4",
    "augment.mix_off_epochs=0",
)
TRAINS = {"finetune", "tune", "optimism", "allocate", "study"}


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        where: Document and line of its fence.
        language: bash, python, yaml or text.
        text: What it holds.
        not_run: Why it is checked only; None where it runs.
        extra: Overrides that it needs beside `SMALL`.
        file: Name under which the commands of the page find it; None for no file.
    """

    where: str
    language: str
    text: str
    not_run: str | None = None
    extra: tuple[str, ...] = ()
    file: str | None = None

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command of a bash block, comments left out and continued lines joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        parts = [part for line in lines for part in _parts(line)]
        return [words for words in parts if words]


def _parts(line: str) -> Iterator[list[str]]:
    """The commands of a line, split at &&."""
    words: list[str] = []
    for word in shlex.split(line, comments=True):
        if word == "&&":
            yield words
            words = []
        else:
            words.append(word)
    yield words


def blocks_of(document: Path) -> list[Block]:
    """Every fenced block of a document, with the marks in the comments right above it."""
    found: list[Block] = []
    opened: int | None = None
    language, body, marks = "", [], {}
    for number, line in enumerate(document.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if fence and opened is None:
            opened, language, body = number, fence.group(1).strip(), []
        elif fence:
            where = f"{document.relative_to(ROOT).as_posix()}:{opened}"
            extra = tuple(shlex.split(marks.get("with", "")))
            found.append(Block(where, language, "\n".join(body), marks.get("not run"), extra, marks.get("file")))
            opened, marks = None, {}
        elif opened is not None:
            body.append(line)
        elif mark := _MARK.match(line):
            marks[mark.group(1)] = mark.group(2)
        elif line.strip():
            marks = {}
    assert opened is None, f"{document}:{opened}: this block has no end"
    return found


def check(block: Block) -> None:
    """Check a block without running it: Python compiles, keys and options are those that r2kit has."""
    if block.language == "python":
        compile(block.text, block.where, "exec")
    elif block.language == "yaml":
        load_recipe(_as_file(block))
    elif block.language == "bash":
        for words in block.commands:
            check_command(words, block.where)


def _as_file(block: Block) -> dict:
    """The plain values of a YAML block."""
    from ruamel.yaml import YAML

    return YAML(typ="safe", pure=True).load(block.text) or {}


def check_command(words: list[str], where: str) -> None:
    """Check the words of one command: what r2kit, pip and bash would look up is there."""
    program = words[0]
    if "r2kit" in words and program in ("torchrun", "python"):
        check_r2kit(words[words.index("r2kit") + 1 :], where)
    elif program == "r2kit":
        check_r2kit(words[1:], where)
    elif program == "pip":
        _check_extras(words, where)
    elif program in ("bash", "sbatch"):
        assert (ROOT / words[1]).is_file(), f"{where}: {words[1]} is not there"
    elif program == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file() or words[1] == "train.py", f"{where}: {words[1]} is not there"
    else:
        known = "cd git pytest mkdocs python ruff mypy kubectl gdalbuildvrt gdal_translate jupyter"
        assert program in known.split(), f"{where}: nobody checks '{program}'"


def check_r2kit(words: list[str], where: str) -> None:
    """Parse the arguments of a command as the command line does, and its overrides as a recipe does."""
    command: Any = typer.main.get_command(app)
    rest = [word for word in words if word != "--debug"]
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"{where}: r2kit {rest[0]}: no such command"
        command, rest = command.commands[rest[0]], rest[1:]
    try:
        context = command.make_context("r2kit", list(rest))
    except typer.Exit:  # --help and --version end here
        return
    except Exception as error:  # typer brings a click of its own, whose errors have no public name
        said = error.format_message() if hasattr(error, "format_message") else repr(error)
        raise AssertionError(f"{where}: r2kit {shlex.join(words)}: {said}") from None
    given = list(context.params.get("overrides") or [])
    if isinstance(data := context.params.get("data"), str):  # of `r2kit data ...`: the images come as an argument
        given = [*chosen_data(data), *given]
    recipe = context.params.get("recipe")
    known = recipe is not None and Path(recipe).stem in packaged_recipes()
    load_recipe(Path(recipe).stem if known else {}, given)


def _check_extras(words: list[str], where: str) -> None:
    """The extras that pip is to install exist."""
    import tomllib

    known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for word in words:
        if extras := re.search(r"\[([a-z,]+)\]$", word):
            missing = set(extras.group(1).split(",")) - set(known)
            assert not missing, f"{where}: pip: no extra {missing}"


def run(block: Block, names: dict) -> None:
    """Run a block in the current folder.

    Args:
        block: What runs.
        names: The variables that the Python blocks of a page share.
    """
    if block.language == "python":
        exec(compile(block.text, block.where, "exec"), names)
    elif block.language == "yaml":
        load_recipe(_as_file(block))
        if block.file:
            Path(block.file).write_text(block.text + "\n", encoding="utf-8")
    elif block.language == "bash":
        for words in block.commands:
            check_command(words, block.where)
            run_command(words, block)


def run_command(words: list[str], block: Block) -> None:
    """Run one r2kit command, made small where it trains; exit code 0 is right, and 1 where the command judges."""
    assert words[0] == "r2kit", f"{block.where}: '{words[0]}' is not run by this test; say why with <!-- not run: -->"
    arguments = words[1:]
    if arguments[0] in TRAINS or "--recipe" in arguments:
        arguments = shrunk(arguments, block.extra)
    output, began, code = io.StringIO(), time.process_time(), None
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            main(arguments)
    except SystemExit as ended:
        code = ended.code
    judges = arguments[:2] == ["data", "check"] or arguments[0] == "reproduce"
    fine = (0, None, 1) if judges else (0, None)
    assert code in fine, f"{block.where}: r2kit {shlex.join(arguments)}\n{output.getvalue()}"
    print(f"{time.process_time() - began:5.1f} s  {block.where}: r2kit {shlex.join(words[1:])}")  # seen with pytest -s


def shrunk(arguments: list[str], extra: tuple[str, ...]) -> list[str]:
    """The arguments of a command that trains with `SMALL`, on data of the project where it names none."""
    recipe = arguments[arguments.index("--recipe") + 1] if "--recipe" in arguments else arguments[1]
    small = [*SMALL, *extra]
    if Path(recipe).stem in packaged_recipes():
        packaged = load_recipe(Path(recipe).stem)
        if packaged.data.resolved_source in ("bluemarble", "torchvision"):
            given = any(word.startswith("data.root=") for word in arguments)
            folder = "path/to/tiles" if packaged.target == "class" else "path/to/masked"
            small += [
                "data.source=auto",
                "data.name=null",
                "data.split=auto",
                *([] if given else [f"data.root={folder}"]),
            ]
    return [*arguments, *small]
