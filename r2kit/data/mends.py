"""The command that mends each finding of a check of data, tried on the data before it is printed wherever it can be."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from r2kit.data.files import SEPARATOR
from r2kit.data.findings import CLEAN_FILE, SPLIT_FILE, Finding
from r2kit.data.leaks import without_leaks
from r2kit.data.sources import Source
from r2kit.data.splits import Split, make_split
from r2kit.data.stacks import parts_of
from r2kit.data.stratify import membership
from r2kit.data.table import write_table
from r2kit.errors import DataError, RecipeError
from r2kit.recipe import Recipe
from r2kit.recipe_file import load_recipe

KINDS_OF_SPLIT = ("group", "blocks", "stratified")
"""Ways to divide data anew, the one that keeps most together first."""
_AGAIN = "r2kit data check {data}"
_LOOK = "look at check.html, mend the files by hand, and check again"


@dataclass
class Mender:
    """Turns what mends a finding into a whole command; writes the files that the commands name."""

    source: Source
    recipe: Recipe
    split: Split | None
    out: Path
    """Folder that the files go into."""
    command: str
    """What trains on this data."""
    data: str
    """What stands for this data, with its overrides, on the command lines of `r2kit data`."""
    _files: dict[str, str] = field(default_factory=dict)

    def write_splits(self, findings: list[Finding]) -> None:
        """Write the split without the images that should give way, as far as findings ask for it.

        There is none where a class would be lost.
        """
        leaks = ("data.on_leak=drop", SPLIT_FILE)
        for name, needed, leaving in (("split", leaks, leaks), ("clean", (CLEAN_FILE,), (*leaks, CLEAN_FILE))):
            if self.split is None or not any(finding.change in needed for finding in findings):
                continue
            giving_way = [finding for finding in findings if finding.change in leaving]
            with contextlib.suppress(DataError):
                left = without_leaks(self.split, giving_way, self.source.manifest, self.source.strata)
                write_table(left.table(self.source.manifest), self.out / f"{name}.csv")
                self._files[name] = str(self.out / f"{name}.csv")

    def mended(self, finding: Finding) -> Finding:
        """Return the finding with the command that mends it, or that begins to, in place of the change of the recipe.

        Where nothing but a person can mend it, the command is the check that says whether it is mended.
        """
        change = finding.change
        if change.startswith("r2kit "):
            return dataclasses.replace(finding, change=change.format(data=self.data))
        if change in (SPLIT_FILE, CLEAN_FILE):
            name = {SPLIT_FILE: "split", CLEAN_FILE: "clean"}[change]
            items = [change.format(**self._files)] if name in self._files else self._grouped(finding)
            finding = (
                finding
                if name in self._files or not items
                else dataclasses.replace(
                    finding,
                    mend="keep what is alike in one part (column group of the table); leaving it out loses a class",
                )
            )
        elif change:
            items = shlex.split(change)
        else:
            items = self._without_rare(finding)
            if items:
                finding = dataclasses.replace(finding, mend=f"{finding.mend}, or leave the class out")
        if items:
            return dataclasses.replace(finding, change=self._training(items))
        return dataclasses.replace(finding, mend=f"{finding.mend}; {_LOOK}", change=_AGAIN.format(data=self.data))

    def _training(self, items: list[str]) -> str:
        """The command that trains, with changes in place of what it says of the same keys."""
        keys = {item.partition("=")[0] for item in items}
        kept = [word for word in shlex.split(self.command) if word.partition("=")[0] not in keys]
        return shlex.join([*kept, *items])

    def _without_rare(self, finding: Finding) -> list[str]:
        """Changes that train without the classes of next to no image, on a table written for it; none if impossible."""
        if finding.kind not in ("split", "small classes") or self.source.target not in ("class", "classes"):
            return []
        held = membership(self.source.manifest, len(self.source.classes))
        counts = held.sum(axis=0)
        for fewest in sorted({int(count) + 1 for count in counts}):
            keep = counts >= fewest
            if keep.sum() < 2:
                return []
            rows = np.flatnonzero((held & keep).any(axis=1))
            items = self._table("kept.csv", rows, keep)
            for more in ([], ["data.test_fraction=0"]):
                if items and self._solves(finding, items + more):
                    return items + more
        return []

    def _solves(self, finding: Finding, items: list[str]) -> bool:
        """Whether the data can be divided with some changes, and classes are no longer small if that is the finding."""
        from r2kit.data.sources import open_source

        try:
            other = load_recipe(self.recipe.model_dump(), items)
            source = open_source(other.data, other.target)
            split = make_split(source.manifest, source.strata, other.data, other.seed, source.contents)
        except (DataError, RecipeError):
            return False
        if finding.kind == "split":
            return True
        held = membership(source.manifest, len(source.strata))[split.test if len(split.test) else split.val]
        counts = held.sum(axis=0)
        return bool((counts[counts > 0] >= FEW).all())

    def _grouped(self, finding: Finding) -> list[str]:
        """Changes that keep the images of each pair of a finding in one part, on a table written for it."""
        if self.source.target not in ("class", "classes", "mask") or finding.pairs.shape[1] != 2:
            return []
        count = len(self.source.manifest)
        pairs = (np.ones(len(finding.pairs)), (finding.pairs[:, 0], finding.pairs[:, 1]))
        groups = connected_components(coo_array(pairs, shape=(count, count)), directed=False)[1]
        items = self._table("grouped.csv", np.arange(count), None, groups)
        items += ["data.split=group"] if items else []
        return items if items and self._solves(dataclasses.replace(finding, kind="split"), items) else []

    def _table(
        self, name: str, rows: np.ndarray, classes: np.ndarray | None, groups: np.ndarray | None = None
    ) -> list[str]:
        """Write images as a table; return the changes that use it, none where the images are no files of a table.

        Args:
            name: Of the file.
            rows: Of the manifest.
            classes: (K,) which classes to keep; None for all.
            groups: (N,) what is of one group, in place of the groups that the data has.
        """
        data, manifest = self.recipe.data, self.source.manifest
        if data.resolved_source not in ("folder", "table") or any(parts_of(path) for path in manifest["path"]):
            return []
        held = membership(manifest, len(self.source.strata))
        frame = pd.DataFrame({"path": [str(Path(path).absolute()) for path in manifest["path"]]})
        if self.source.target == "mask":
            frame["mask"] = [str(Path(path).absolute()) for path in manifest["mask"]]
        else:
            kept = held if classes is None else held & classes
            frame["label"] = [SEPARATOR.join(self.source.classes[i] for i in np.flatnonzero(row)) for row in kept]
        for column in ("lon", "lat"):
            frame[column] = manifest[column]
        if groups is None:
            frame["split"], frame["group"] = manifest["split"], manifest["group"]
        else:
            frame["group"] = [f"g{number}" for number in groups]
        write_table(frame.iloc[rows].dropna(axis=1, how="all"), self.out / name)
        changes = [f"data.root={self.out / name}", "data.allow_outside=true"]
        if data.source != "auto":
            changes.append("data.source=table")
        if data.split_file is not None:
            changes.append("data.split_file=null")
        return changes


FEW = 5
"""Images of a class in the part that is reported on below which a warning is given."""


def other_split(source: Source, recipe: Recipe, possible: bool) -> str:
    """Return the first change of the recipe that divides the data without a word, empty if there is none.

    Args:
        source: The images.
        recipe: As they are divided now.
        possible: Take one that divides the data at all.
    """
    now = "" if recipe.data.split_file is None else "data.split_file=null "
    kinds = [f"{now}data.split={kind}" for kind in KINDS_OF_SPLIT]
    smaller = [f"{now}data.block_degrees={recipe.data.block_degrees / by:g}" for by in (2, 4, 8, 16)]
    folded = [f"{kind} data.folds=5" for kind in kinds]
    fewer = [f"{change} data.test_fraction=0" for change in kinds] if possible else []
    anew = [now.strip()] if now else []
    for change in (*anew, *kinds, *smaller, f"{now}data.test_fraction=0.15", *folded, *fewer):
        split = split_with(source, recipe, change)
        if split is not None and (possible or not split.warnings):
            return change
    return ""


def split_with(source: Source, recipe: Recipe, change: str) -> Split | None:
    """Return the split with a change of the recipe; None where the recipe or the data does not allow it."""
    try:
        other = load_recipe(recipe.model_dump(), shlex.split(change))
        return make_split(source.manifest, source.strata, other.data, other.seed, source.contents)
    except (DataError, RecipeError):
        return None


def in_folds(source: Source, recipe: Recipe) -> str:
    """Return the change that lets every image be tested once, with the most folds up to five; empty if there is none.

    With folds already, it is the next fold. What lies near another image, or belongs to a group, is never divided at
    random for it: blocks become smaller instead.
    """
    if recipe.data.folds is not None:
        return f"data.fold={(recipe.data.fold + 1) % recipe.data.folds}"
    now = "" if recipe.data.split_file is None else "data.split_file=null "
    together = bool(source.manifest[["group", "lon"]].notna().to_numpy().any())
    kinds = [f"data.split={kind} " for kind in KINDS_OF_SPLIT if kind != "stratified" or not together]
    smaller = [f"data.split=blocks data.block_degrees={recipe.data.block_degrees / by:g} " for by in (2, 4, 8, 16)]
    for folds in (5, 4, 3, 2):
        for kind in ("", *kinds, *smaller):
            change = f"{now}{kind}data.folds={folds}"
            if split_with(source, recipe, change) is not None:
                return change
    return ""
