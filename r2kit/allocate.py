"""From a recipe to a ScaleNet's channel table, learned from the recipe's own data.

A seed network as deep as the recipe's ScaleNet, but with every scale of every block equally and abundantly wide, is
trained by the recipe. What its BN scales rank highest within each block, under a budget, is the table. A network of
that table is then trained from random weights by `r2kit finetune` with ``model.structure=FOLDER/structure.json``.

How channels are ranked, and which parts of the method are the authors' and which inferred, is in
`r2kit.backbones.allocation`. The width of the seed network is one of the parts that no source gives: one channel for
each channel of the block's 1x1, at each of the four scales, is what the published tables of ScaleNet-50, 101 and 152
fit, and is the default here; that of the light one fits 0.46.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from r2kit.backbones.allocation import (
    Allocation,
    CostModel,
    even_split,
    plot_shares,
    read_gammas,
    read_structure,
    save_structure,
    seed_structure,
)
from r2kit.backbones.allocation import allocate as keep_best
from r2kit.backbones.scalenet import ScaleBlock, ScaleNet
from r2kit.backbones.scalenet_tables import SCALES, SIDES, Structure, stages_of
from r2kit.console import make_console, quiet_libraries, table
from r2kit.data.sources import open_source
from r2kit.errors import ModelError, RecipeError, RunError, did_you_mean
from r2kit.models import build_model
from r2kit.recipe import Recipe
from r2kit.recipe_file import load_recipe
from r2kit.run import Run, next_free, write_atomic
from r2kit.train import finetune, first_process

SEED_WIDTH = 1.0
"""Channels of each scale of the seed network over the channels of the block's 1x1."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_EXAMPLES = "macs=2.9G (multiply-adds), macs=0.8x (of the recipe's network) or channels=1.0 (of the block's 1x1)"


@dataclass(frozen=True)
class Budget:
    """How much the network may hold; exactly one field is set.

    Attributes:
        macs: Multiply-adds of one image of the recipe's size.
        relative: The same, as a multiple of the recipe's own network.
        channels: Channels of a block over those of its 1x1, all scales together.
    """

    macs: int | None = None
    relative: float | None = None
    channels: float | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``macs=2.9G``, ``macs=0.8x`` or ``channels=1.0``.

        Raises:
            RecipeError: If it is none of these.
        """
        kind, separator, amount = (part.strip() for part in text.partition("="))
        if not separator:
            raise RecipeError(f"--budget: got '{text}', allowed is {_EXAMPLES}")
        if kind not in ("macs", "channels"):
            hint = did_you_mean(kind, ("macs", "channels"))
            raise RecipeError(f"--budget: unknown kind '{kind}'{hint or f'; allowed is {_EXAMPLES}'}")
        match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([a-z]*)", amount.lower())
        unit = match.group(2) if match else ""
        value = float(match.group(1)) if match else 0.0
        if value > 0 and kind == "channels" and unit == "":
            return cls(channels=value)
        if value > 0 and kind == "macs" and unit == "x":
            return cls(relative=value)
        if value > 0 and kind == "macs" and unit in _UNITS:
            if unit == "" and value != int(value):
                raise RecipeError(f"--budget: '{text}' is a part of one multiply-add; did you mean 'macs={value:g}x'?")
            return cls(macs=round(value * _UNITS[unit]))
        form = "a number such as 1.0" if kind == "channels" else "a number and k, M, G or x, such as 2.9G or 0.8x"
        raise RecipeError(f"--budget: got '{text}', allowed after '{kind}=' is {form}")


@dataclass(frozen=True)
class AllocationResult:
    """What `allocate` leaves behind.

    Attributes:
        path: The folder.
        learned: The table under the budget, and what it costs.
        even: The even split of the scales at the same multiply-adds: what the table is to be compared with.
        seed: The finished run of the seed network.
    """

    path: Path
    learned: Allocation
    even: Allocation
    seed: Run

    @property
    def structure_file(self) -> Path:
        """The learned table, in the authors' format, for ``model.structure=``."""
        return _Folder(self.path).structure


def allocate(
    recipe: str | Path | dict[str, Any] | Recipe,
    *,
    budget: str,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    seed_width: float = SEED_WIDTH,
    overwrite: bool = False,
    resume: bool = False,
    quiet: bool = False,
) -> AllocationResult | None:
    """Learn on a recipe's data how many channels each scale of a ScaleNet should have.

    The same recipe, seed and device give the same table.

    Args:
        recipe: As for `finetune`; it names a ScaleNet, and its depth, or that of its own `model.structure`, is kept.
        budget: ``macs=2.9G`` for one image of the recipe's size, ``macs=0.8x`` of the recipe's own network, or
            ``channels=1.0`` of each block's 1x1.
        out: The folder, named exactly; by default ``runs/<name>-allocation-<n>``.
        overrides: ``key.path=value`` items.
        seed_width: Channels of each scale of the seed network over the channels of the block's 1x1.
        overwrite: Replace the allocation that `out` holds.
        resume: Go on with the seed network that `out` holds; a finished one is not trained again, so that another
            budget costs seconds.
        quiet: Print nothing.

    Returns:
        The tables and the seed network's run; None in the helping processes of a training on several devices.

    Raises:
        RecipeError, DataError, ModelError, RunError: Each with one line that says how to mend it. A budget that cannot
            be met is refused before training.
    """
    asked = Budget.parse(budget)
    checked = load_recipe(recipe, overrides)
    _check_recipe(checked)
    if resume and out is None:
        raise RunError("--resume auto needs the folder of the allocation: give --out DIR")
    quiet_libraries()
    console = make_console(quiet=quiet or not first_process())
    folder = _Folder(next_free(Path("runs"), f"{checked.name}-allocation") if out is None else Path(out))
    if first_process():
        folder.check(overwrite=overwrite, resume=resume)

    plan = _Plan.make(checked, asked, seed_width)
    if first_process():
        folder.claim(plan.seed, overwrite=overwrite, resume=resume)
    console.print(
        f"seed network: {len(plan.seed)} blocks, {seed_width:g} of the 1x1's channels at each of the four scales, "
        f"{plan.cost.macs(plan.seed, plan.planes) / 1e9:.3g} GMACs; {checked.model.name} has {plan.named / 1e9:.3g}"
    )
    model = checked.model.model_copy(update={"structure": str(folder.seed_structure)})
    run = finetune(checked.model_copy(update={"model": model}), out=folder.seed_run, resume=resume, quiet=quiet)
    if not first_process():
        return None

    learned = keep_best(read_gammas(run.model()), fraction=plan.channels, macs=plan.macs, cost=plan.cost)
    even = plan.even(macs=learned.macs if plan.macs is None else plan.macs)
    result = AllocationResult(folder.path, learned, even, run)
    save_structure(learned.structure, folder.structure)
    save_structure(even.structure, folder.even_structure)
    figure = plot_shares(learned.structure, f"{checked.name}: channels of each scale, {budget}")
    figure.savefig(folder.plot, dpi=150)
    write_atomic(
        folder.record,
        json.dumps(_record(recipe, overrides, checked, budget, seed_width, plan, result), indent=2) + "\n",
    )
    _print_result(console, result, _next_command(recipe, overrides, result))
    return result


@dataclass(frozen=True)
class _Plan:
    """Everything that is settled before training.

    Attributes:
        blocks: Blocks of each of the four stages.
        planes: Channels of the 1x1 of each of the four stages.
        seed: The seed network's table.
        seed_width: Channels of each scale of the seed network over the planes.
        cost: What multiply-adds are counted for.
        named: Multiply-adds of the recipe's own network.
        macs: The budget in multiply-adds, or None.
        channels: The budget in channels over the planes, or None.
    """

    blocks: tuple[int, ...]
    planes: tuple[int, ...]
    seed: Structure
    seed_width: float
    cost: CostModel
    named: int
    macs: int | None
    channels: float | None

    @classmethod
    def make(cls, recipe: Recipe, budget: Budget, seed_width: float) -> _Plan:
        """Look at the data and the recipe's network, and refuse a budget that cannot be met.

        Raises:
            DataError: If the data cannot be used.
            ModelError: If the network or the budget is impossible.
        """
        source = open_source(recipe.data)
        with torch.device("meta"):
            named = build_model(recipe.model, num_classes=len(source.classes), bands=source.bands)
        assert isinstance(named, ScaleNet)  # the recipe's name was checked
        planes = {block.row[-1]: block.planes for block in named.modules() if isinstance(block, ScaleBlock)}
        wide = tuple(planes[side] for side in SIDES)
        deep = tuple(len(rows) for rows in stages_of(named.structure))
        cost = CostModel((len(source.bands), *recipe.data.size), len(source.classes))
        own = cost.macs(named.structure, wide)
        macs = budget.macs if budget.relative is None else round(budget.relative * own)
        seed = seed_structure(deep, wide, seed_width)
        plan = cls(deep, wide, seed, seed_width, cost, own, macs, budget.channels)
        most = min(sum(row[:-1]) / planes[row[-1]] for row in seed)
        if budget.channels is not None and budget.channels >= most:
            raise ModelError(
                f"--budget: channels={budget.channels:g} leaves nothing to choose, the seed network has {most:g} in a "
                f"block; give less, or a larger --seed-width than {seed_width:g}"
            )
        if macs is not None:
            plan.even(macs=macs)  # has its errors now, not after hours of training
        return plan

    def even(self, *, macs: int) -> Allocation:
        """Return the even split under a number of multiply-adds."""
        return even_split(self.blocks, self.planes, self.seed_width, macs=macs, cost=self.cost)


@dataclass(frozen=True)
class _Folder:
    """The names of what an allocation writes, in one folder."""

    path: Path

    @property
    def structure(self) -> Path:
        """The learned table."""
        return self.path / "structure.json"

    @property
    def even_structure(self) -> Path:
        """The even split at the same multiply-adds."""
        return self.path / "even_structure.json"

    @property
    def seed_structure(self) -> Path:
        """The seed network's table; the first file that is written."""
        return self.path / "seed_structure.json"

    @property
    def seed_run(self) -> Path:
        """The run folder of the seed network."""
        return self.path / "seed"

    @property
    def record(self) -> Path:
        """What was asked and what came out."""
        return self.path / "allocation.json"

    @property
    def plot(self) -> Path:
        """The share of each scale by depth."""
        return self.path / "shares.png"

    def check(self, *, overwrite: bool, resume: bool) -> None:
        """Refuse a folder in use.

        Raises:
            RunError: If the folder holds an allocation and neither word is given, or anything else.
        """
        if self.seed_structure.is_file():
            if not (overwrite or resume):
                raise RunError(f"{self.path}: holds an allocation; give --overwrite, --resume auto, or another --out")
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise RunError(f"{self.path}: exists and holds no allocation; give another --out")

    def claim(self, seed: Structure, *, overwrite: bool, resume: bool) -> None:
        """Make the folder, empty it of an earlier allocation if asked to, and write the seed network's table.

        Raises:
            RunError: If it cannot be written, or the seed network to go on with has another table.
        """
        if resume and self.seed_structure.is_file() and read_structure(self.seed_structure) != seed:
            raise RunError(
                f"{self.path}: its seed network has another depth or width; give the model and --seed-width it was "
                "begun with, --overwrite, or another --out"
            )
        try:
            if overwrite:  # only what an allocation wrote: a person may have put a recipe beside it
                shutil.rmtree(self.seed_run, ignore_errors=True)
                for file in (self.structure, self.even_structure, self.seed_structure, self.record, self.plot):
                    file.unlink(missing_ok=True)
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written: {error.strerror or error}; give another --out") from None
        save_structure(seed, self.seed_structure)


def _check_recipe(recipe: Recipe) -> None:
    """Refuse what would rank channels that were never trained, or that are none.

    Raises:
        RecipeError: With every problem, one line each.
    """
    problems = []
    if not recipe.model.has_channel_table:
        problems.append(
            f"model.name: '{recipe.model.name}' has no channel table; name a ScaleNet, e.g. model.name=scalenet50"
        )
    if recipe.model.pretrained is not False:
        problems.append(
            "model.pretrained: the seed network has a shape of its own and starts from random weights; "
            "set model.pretrained=false"
        )
    if recipe.train.freeze != "none":
        problems.append(
            f"train.freeze: channels are ranked by what training makes of them, and '{recipe.train.freeze}' keeps them "
            "still; set train.freeze=none"
        )
    if problems:
        raise RecipeError(problems)


# --------------------------------------------------------------------------------------- what is written and printed


def _shares(structure: Structure) -> dict[str, float]:
    """Return the share of each scale in all channels."""
    totals = [sum(row[index] for row in structure) for index in range(len(SCALES))]
    return {str(scale): round(total / sum(totals), 4) for scale, total in zip(SCALES, totals, strict=True)}


def _record(
    recipe: str | Path | dict[str, Any] | Recipe,
    overrides: Sequence[str],
    checked: Recipe,
    budget: str,
    seed_width: float,
    plan: _Plan,
    result: AllocationResult,
) -> dict[str, Any]:
    """Return the contents of allocation.json: plain values."""

    def priced(allocation: Allocation) -> dict[str, Any]:
        return {
            "channels_over_planes": allocation.fraction,
            "macs": allocation.macs,
            "params": allocation.params,
            "shares": _shares(allocation.structure),
        }

    return {
        "budget": budget,
        "budget_macs": plan.macs,
        "budget_channels": plan.channels,
        "input_size": list(plan.cost.input_size),
        "num_classes": plan.cost.num_classes,
        "learned": priced(result.learned),
        "even": priced(result.even),
        "model": {"name": checked.model.name, "structure": checked.model.structure, "macs": plan.named},
        "recipe": str(recipe) if isinstance(recipe, str | Path) else checked.name,
        "overrides": list(overrides),
        "seed_run": str(result.seed.path),
        "seed_width": seed_width,
        "planes": list(plan.planes),
    }


def _next_command(
    recipe: str | Path | dict[str, Any] | Recipe, overrides: Sequence[str], result: AllocationResult
) -> str:
    """Return the command that trains the network of the table."""
    if isinstance(recipe, str | Path):
        given = [item for item in overrides if not item.startswith("model.structure=")]
        words = [str(recipe), *given]
    else:
        words = [str(result.seed.recipe_file)]
    return shlex.join(["r2kit", "finetune", *words, f"model.structure={result.structure_file}"])


def _print_result(console: Console, result: AllocationResult, command: str) -> None:
    """Print the shares of each stage, the cost beside the even split's, and what to do next."""
    rows: list[list[object]] = []
    for number, stage in enumerate(stages_of(result.learned.structure), start=1):
        shares = _shares(tuple(stage)).values()
        rows.append([f"stage {number}", len(stage), sum(stage[0][:-1]), *(f"{100 * share:.0f} %" for share in shares)])
    console.print()
    columns = ["", "blocks", "channels of a block", *(f"scale {scale}" for scale in SCALES)]
    console.print(table("channels by scale", columns, rows))
    for name, allocation in (("learned", result.learned), ("even split", result.even)):
        console.print(f"{name}: {allocation.macs / 1e9:.4g} GMACs, {allocation.params:,} parameters")
    console.print(f"allocation: {result.structure_file}, drawn in {_Folder(result.path).plot}")
    console.print("next, train the network from random weights (and, to compare, the even split beside it):")
    console.print(f"  {command}")
