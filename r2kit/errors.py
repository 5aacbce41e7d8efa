"""The errors that r2kit raises on purpose, and the words that help a person mend them.

Every message is one line that says where, what came, what is allowed and, where one exists, the command that mends it.
The command line prints it behind ``error:`` and exits with code 2; from Python it is an ordinary exception.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_ENDLESS = re.compile(r"\S{1000,}")  # longer than any path in use: what a damaged file gave for a name or a number


class R2kitError(Exception):
    """Base of every error that r2kit raises on purpose; of words without end its message has both ends."""

    def __init__(self, *said: object) -> None:
        super().__init__(*(_ENDLESS.sub(_ends, one) if isinstance(one, str) else one for one in said))


def _ends(found: re.Match[str]) -> str:
    return f"{found[0][:100]}...{found[0][-20:]}"


class RecipeError(R2kitError):
    """A recipe or an override is wrong. Holds every problem found, one line each.

    Args:
        problems: One line per problem, or a single line.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(R2kitError):
    """The data cannot be used as it is: a missing folder, an empty class, an unreadable file."""


class ModelError(R2kitError):
    """A model cannot be built or its weights cannot be loaded."""


class RunError(R2kitError):
    """A run folder is missing, incomplete, in use, or would be overwritten."""


class Interrupted(BaseException):  # nothing went wrong
    """Somebody asked the run to stop: Ctrl-C, or a scheduler.

    No error, and none of `Exception`: like KeyboardInterrupt it passes through whatever mends errors on its way.

    Args:
        number: The signal; None where another process of the run received it.
        saved: What became of the work.
    """

    def __init__(self, number: int | None, saved: str) -> None:
        name = signal.Signals(number).name if number is not None else "another process"
        super().__init__(f"stopped by {name}: {saved}")
        self.number = number
        # A shell's words for what ended by Ctrl-C, and for what was terminated: SLURM's own signals mean the latter.
        self.exit_code = 130 if number == signal.SIGINT else 143


class MissingExtraError(R2kitError):
    """An optional dependency is needed and not installed.

    Args:
        package: The package that is missing, as pip knows it.
        extra: The extra of r2kit that brings it.
        purpose: What needs it, as the subject of a sentence.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f'{purpose} needs {package}, which is not installed: pip install "r2kit[{extra}]"')


def did_you_mean(name: str, options: Iterable[str], limit: int = 1) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest option, or an empty string when none is near.

    Args:
        name: What was written.
        options: What is allowed.
        limit: How many suggestions at most.
    """
    lowered = {option.lower(): option for option in options}
    near = difflib.get_close_matches(name.lower(), list(lowered), n=limit, cutoff=0.55)
    if not near:
        return ""
    return "; did you mean " + " or ".join(f"'{lowered[n]}'" for n in near) + "?"


@contextmanager
def naming(path: str | Path, what: str = "cannot be read") -> Iterator[None]:
    """Turn whatever a library raises about the bytes of a file into a `DataError` that names the file.

    Args:
        path: The file.
        what: What went wrong, for the message.

    Raises:
        DataError: In place of any other exception; errors of r2kit pass.
    """
    try:
        yield
    except R2kitError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except MemoryError as error:
        raise DataError(f"{path}: does not fit into memory") from error
    except Exception as error:  # decoders raise nearly anything: SyntaxError, struct.error, GDAL's own, ...
        reason = str(error).strip().splitlines()
        raise DataError(f"{path}: {what}: {reason[0] if reason else type(error).__name__}") from error


def require(module: str, package: str, extra: str, purpose: str) -> None:
    """Raise `MissingExtraError` unless ``module`` can be imported.

    Args:
        module: Import name, for example ``mpl_toolkits.basemap_data``.
        package: The package's name on the registry.
        extra: The extra of r2kit that brings it.
        purpose: What needs it, as the subject of a sentence.
    """
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        found = False
    if not found:
        raise MissingExtraError(package, extra, purpose)
