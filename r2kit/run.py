"""The run folder: the one home of its file names, and the way in and out of it."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from r2kit.errors import RecipeError, RunError
from r2kit.recipe import Recipe
from r2kit.recipe_file import load_recipe, to_yaml

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from r2kit.data.datamodule import DataModule
    from r2kit.data.preprocess import Preprocess
    from r2kit.data.sources import Source

_RECORDED = (
    "r2kit",
    "torch",
    "torchvision",
    "lightning",
    "timm",
    "albumentations",
    "torchmetrics",
    "numpy",
    "rasterio",
)


class _Record(BaseModel):
    """Facts that others rely on; none has to be there, and there may be more."""

    model_config = ConfigDict(strict=True)


class _DataFacts(_Record):
    source: str = ""
    fingerprint: str = ""
    image_size: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] | None = None


class _ModelFacts(_Record):
    parameters: int = 0
    macs: int = 0
    train_images_per_second: float = 0.0


class _Facts(_Record):
    """What run.json may say: the file may be a stranger's, and pages and maps are made from it."""

    id: str = ""
    state: str = ""
    seed: int = 0
    command: str = ""
    versions: dict[str, str] = {}
    python: str = ""
    platform: str = ""
    git: str | None = None
    started: str = ""
    finished: str = ""
    device: str = ""
    split: str = ""
    best_epoch: int | None = None
    train_seconds: float = 0.0
    seconds: float = 0.0
    data: _DataFacts = _DataFacts()
    model: _ModelFacts = _ModelFacts()


class Run:
    """A folder that holds everything about one fine-tuning run.

    Args:
        path: The folder; `Run.create` and `Run.open` check it, the constructor does not.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.opened: Source | None = None
        """The data, while the training that has them open is about: not listed and checked again."""

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    # ------------------------------------------------------------------------------------------- the files

    @property
    def recipe_file(self) -> Path:
        """The fully resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def info_file(self) -> Path:
        """Versions, seed, devices, data fingerprint, command, times and state."""
        return self.path / "run.json"

    @property
    def preprocess_file(self) -> Path:
        """Bands, statistics, size and class names."""
        return self.path / "preprocess.json"

    @property
    def structure_file(self) -> Path:
        """The channel table, where the recipe names one: a copy, so that the run outlives the file."""
        return self.path / "structure.json"

    @property
    def split_file(self) -> Path:
        """Which image was in which split."""
        return self.path / "split.parquet"

    @property
    def metrics_csv(self) -> Path:
        """One row for each epoch."""
        return self.path / "metrics.csv"

    @property
    def metrics_json(self) -> Path:
        """The evaluated result."""
        return self.path / "metrics.json"

    @property
    def weights_file(self) -> Path:
        """The weights of the best epoch, as safetensors."""
        return self.path / "model.safetensors"

    @property
    def best_checkpoint(self) -> Path:
        """The checkpoint of the best epoch."""
        return self.path / "checkpoints" / "best.ckpt"

    @property
    def last_checkpoint(self) -> Path:
        """The newest checkpoint."""
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def previous_checkpoint(self) -> Path:
        """The checkpoint before the newest, for the day on which that one is damaged."""
        return self.path / "checkpoints" / "previous.ckpt"

    @property
    def plots(self) -> Path:
        """Folder of the pictures."""
        return self.path / "plots"

    @property
    def report(self) -> Path:
        """The self-contained page."""
        return self.path / "report.html"

    @property
    def card(self) -> Path:
        """What the network is for, what it was measured to do, and its limits."""
        return self.path / "model_card.md"

    def predictions(self, split: str) -> Path:
        """Stored predictions of one split (``val`` or ``test``)."""
        return self.path / f"predictions_{split}.parquet"

    # ------------------------------------------------------------------------------------- making and opening

    @classmethod
    def create(cls, recipe: Recipe, out: str | Path | None = None, *, overwrite: bool = False) -> Run:
        """Make the folder of a new run and write its recipe.

        Args:
            recipe: The checked recipe.
            out: The folder, named exactly; by default ``runs/<name>-<n>`` with the first free n.
            overwrite: Replace the run that the folder holds.

        Raises:
            RunError: If the folder holds a run or anything else, or cannot be written.
        """
        path = _new_folder(recipe.name) if out is None else Path(out)
        run = cls(path)
        if run.exists():
            if not overwrite:
                raise RunError(f"{path}: holds a run already; give --overwrite, --resume auto, or another --out")
            for entry in path.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                elif entry.name != ".lock":
                    entry.unlink()
        elif path.exists() and not _only_begun(path):
            raise RunError(f"{path}: exists and is not a run folder; give another --out")
        try:
            run.best_checkpoint.parent.mkdir(parents=True, exist_ok=True)
            run.plots.mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(f"{path}: cannot be written: {error.strerror or error}; give another --out") from None
        write_atomic(run.recipe_file, to_yaml(recipe))
        run.write_info(
            id=uuid.uuid4().hex[:12],
            state="started",
            command=" ".join(sys.argv),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            seed=recipe.seed,
            versions=installed_versions(),
            python=platform.python_version(),
            platform=f"{platform.system()} {platform.machine()}",
            git=_git_commit(),
        )
        return run

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Open the folder of a finished run.

        Raises:
            RunError: If there is no such folder, or it holds no finished run.
        """
        run = cls(path)
        if not run.path.exists():
            raise RunError(f"{path}: no such run folder{_near_run(run.path)}")
        if not run.exists():
            lacking = run.info_file if run.recipe_file.is_file() else run.recipe_file
            raise RunError(f"{path}: not a run folder: it has no {lacking.name}")
        run.refuse_links_out()
        for needed in (run.weights_file, run.preprocess_file):
            if not needed.is_file():
                raise RunError(
                    f"{path}: the run is not finished, {needed.name} is missing; go on with r2kit resume {path}"
                )
        return run

    def refuse_links_out(self) -> None:
        """Refuse a folder, perhaps a stranger's, in which a file that is written anew is a link to one elsewhere.

        Raises:
            RunError: If there is such a link. Checkpoints may lie elsewhere.
        """
        inside, checkpoints = self.path.resolve(), self.best_checkpoint.parent
        for folder, folders, files in os.walk(self.path):  # which enters no link
            if Path(folder) == self.path and checkpoints.name in folders:
                folders.remove(checkpoints.name)
            for name in (*folders, *files):
                entry = Path(folder) / name
                if entry.is_symlink() and not entry.resolve().is_relative_to(inside):
                    raise RunError(f"{entry}: is a link out of the run folder; remove it, or put a copy in its place")

    def exists(self) -> bool:
        """Whether the folder holds a run, finished or not."""
        return self.recipe_file.is_file() and self.info_file.is_file()

    # -------------------------------------------------------------------------------------------- the contents

    @cached_property
    def recipe(self) -> Recipe:
        """The resolved recipe of the run."""
        try:
            return load_recipe(self.recipe_file)
        except RecipeError as error:
            raise RunError(
                f"{self.path}: its recipe is not one of this version of r2kit: {error.problems[0]}"
            ) from None

    @property
    def own_recipe(self) -> Recipe:
        """The resolved recipe with the run's own copy of the channel table in place of the file that it names."""
        recipe = self.recipe
        if recipe.model.structure is None or not self.structure_file.is_file():
            return recipe
        model = recipe.model.model_copy(update={"structure": str(self.structure_file)})
        return recipe.model_copy(update={"model": model})

    @cached_property
    def preprocess(self) -> Preprocess:
        """Bands, statistics, size and class names of the run."""
        from r2kit.data.preprocess import Preprocess

        return Preprocess.load(self.preprocess_file)

    @property
    def info(self) -> dict[str, Any]:
        """The contents of run.json."""
        try:
            info = json.loads(self.info_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{self.info_file}: cannot be read: {error}") from None
        try:
            _Facts.model_validate(info)
        except ValidationError as error:
            first = error.errors()[0]
            at = ".".join(map(str, first["loc"]))
            raise RunError(f"{self.info_file}: holds no record of a run: {at and at + ': '}{first['msg']}") from None
        return dict(info)

    @property
    def epochs_trained(self) -> int:
        """Epochs that were trained, which are fewer than the recipe's where something ended them early."""
        if not self.metrics_csv.is_file():
            return self.recipe.train.epochs
        return len(self.read_table(self.metrics_csv))

    def write_info(self, **facts: Any) -> None:
        """Add facts to run.json."""
        known = self.info if self.info_file.is_file() else {}
        write_atomic(self.info_file, json.dumps({**known, **facts}, indent=2) + "\n")

    def read_table(self, file: Path, columns: list[str] | None = None) -> pd.DataFrame:
        """Return a table of the run, Parquet or CSV.

        Args:
            file: One of the run's files.
            columns: Those to read; None reads all.

        Raises:
            RunError: If the file is missing, damaged, or lacks a column.
        """
        import pandas as pd

        try:
            if file.suffix == ".csv":
                return pd.read_csv(file, usecols=columns)
            return pd.read_parquet(file, columns=columns)
        except Exception as error:  # the parsers raise several unrelated classes
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise RunError(f"{file}: cannot be read as a table of a run: {reason}") from None

    def model(self) -> nn.Module:
        """Return the trained network on the CPU, in evaluation mode.

        Raises:
            RunError: If the stored weights do not fit the stored recipe.
        """
        from r2kit.models import model_from_run

        return model_from_run(self)

    def datamodule(self) -> DataModule:
        """Return the data of the run, with its own preprocessing and split.

        Raises:
            DataError: If the data is not where it was, or an image of the split is gone.
        """
        from r2kit.data.datamodule import DataModule

        recipe = self.recipe
        return DataModule(
            recipe.data,
            recipe.augment,
            seed=recipe.seed,
            batch_size=recipe.train.pass_size,
            preprocess=self.preprocess,
            split_file=self.split_file,
            target=recipe.target,
            opened=self.opened,
        )


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that a reader, or a run that is killed, sees the old text or the new one, never a part.

    Raises:
        RunError: If it cannot be written, on a full disk for example; the old text is still there.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from None


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that decide a result."""
    found = {}
    for package in _RECORDED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # running from a checkout that is not installed
            import r2kit

            found[package] = r2kit.__version__ if package == "r2kit" else "not installed"
    return found


def unknown_kind(run: Run, command: str) -> RunError:
    """Return the error of a command that does not know the kind of task of a run."""
    return RunError(f"{run.path}: r2kit {command} does not know runs of {run.recipe.task.kind}")


def next_free(folder: Path, name: str) -> Path:
    """Return folder/name-n, n one above the highest that exists."""
    taken = [0]
    if folder.is_dir():
        for entry in folder.iterdir():
            match = re.fullmatch(re.escape(name) + r"-(\d+)", entry.name)
            if match:
                taken.append(int(match.group(1)))
    return folder / f"{name}-{max(taken) + 1}"


def _new_folder(name: str) -> Path:
    """Make runs/name-n with the first free n; a run that starts at the same moment gets the next one."""
    while True:
        path = next_free(Path("runs"), name)
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise RunError(f"{path}: cannot be written: {error.strerror or error}; give --out") from None
        return path


def _only_begun(path: Path) -> bool:
    """Whether a folder holds nothing but what a run that was killed at its very start leaves behind."""
    if not path.is_dir():
        return False
    names = {entry.name for entry in path.iterdir() if not entry.name.endswith(".part")}
    inside = [entry for name in ("checkpoints", "plots") if (path / name).is_dir() for entry in (path / name).iterdir()]
    return names <= {".lock", "recipe.yaml", "checkpoints", "plots"} and not inside


def _near_run(path: Path) -> str:
    """Return a hint at the runs beside a path that does not exist."""
    from r2kit.errors import did_you_mean

    if not path.parent.is_dir():
        return ""
    runs = [entry.name for entry in path.parent.iterdir() if Run(entry).exists()]
    return did_you_mean(path.name, runs)


def _git_commit() -> str | None:
    """Return the commit of the current folder, with ``+`` when files differ from it; None outside a repository."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
