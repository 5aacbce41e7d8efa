"""A fastai `Learner` from a recipe or a run.

With the same seed a learner sees what `r2kit finetune` sees: the same starting weights, the same split, and in its n-th
pass over the training images the same batches, augmented and mixed in the same way, with the recipe's loss. Dropout and
stochastic depth draw the same, too, so that the first loss is the same number. From there on fastai trains in its own
way, and how is said to fastai:

- `learn.fit_one_cycle`, `fine_tune` and their kin say for how long and by which schedule;
- `learn.freeze` what stands still: there are three parameter groups, stem and early stages, the last two stages, head;
- fastai's callbacks the rest: `MixUp`, `CutMix`, `EarlyStoppingCallback`, `SaveModelCallback`, `GradientClip` ...

Of the recipe's `train` part the learner takes `batch_size`, `progressive_size`, `channels_last` and `optimize`, and as
its defaults `lr`, `weight_decay` and the optimiser, which are fastai's own Adam (decoupled decay, so AdamW) or SGD. A
warning names what else the recipe asks for there, and nobody does.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixHandler
from fastai.learner import Learner, ValueMetric
from fastai.optimizer import SGD, Adam
from fastcore.foundation import L
from torch import Tensor, nn

from r2kit.data.datamodule import DataModule
from r2kit.errors import RecipeError
from r2kit.fastai.loaders import KINDS, make_loaders
from r2kit.models import memory_format
from r2kit.parts import Parts
from r2kit.recipe import MultilabelSpec, Recipe, TrainSpec
from r2kit.recipe_file import load_recipe
from r2kit.run import Run
from r2kit.seeding import derive_seed
from r2kit.tasks import TASKS, SteppedTask
from r2kit.tasks.base import Stage
from r2kit.train.prepare import choose_device, open_data, speed_up, start_network

TAKEN = frozenset(
    ("batch_size", "progressive_size", "channels_last", "optimize", "lr", "weight_decay", "optimizer", "momentum")
)
"""Keys of `train` that a learner takes."""
_OF_FIT = frozenset(
    ("epochs", "schedule", "warmup_epochs", "step_epochs", "lr_factor", "plateau_patience", "checkpoint_every")
)
"""Keys of `train` that are arguments of fastai's `fit` and its kin."""


def recipe_learner(
    recipe: str | Path | dict[str, Any] | Recipe, *, overrides: Sequence[str] = (), **options: Any
) -> Learner:
    """Return a fastai learner with the network, data, augmentation and loss of a recipe.

    Args:
        recipe: A file, the name of a packaged recipe, nested plain values, or a `Recipe`.
        overrides: ``key.path=value`` items.
        **options: Passed to fastai's `Learner`, such as `cbs`, `opt_func`, `path` or `metrics`; the metrics are by
            default those that `r2kit finetune` prints.

    Raises:
        RecipeError: If the recipe is wrong, or asks for what a learner cannot do.
        DataError, ModelError: Whatever `r2kit finetune` would raise before training.
    """
    checked = load_recipe(recipe, overrides)
    refuse(checked)
    data = open_data(checked)
    model, _ = start_network(checked, data)
    return _make_learner(checked, data, model, options)


def run_learner(run: str | Path | Run, **options: Any) -> Learner:
    """Return a fastai learner with the trained network of a run, on the run's data and split.

    Args:
        run: A finished run or its folder.
        **options: Passed to fastai's `Learner`.

    Raises:
        RunError: If there is no finished run.
        RecipeError: If it is of a kind that a learner cannot do.
        DataError: If the data is not where it was.
    """
    opened = run if isinstance(run, Run) else Run.open(run)
    before = opened.own_recipe
    start = before.model.model_copy(update={"pretrained": str(opened.path), "warm_start": False})
    recipe = before.model_copy(update={"model": start})
    refuse(recipe)
    data = opened.datamodule()
    data.setup()
    data.size_share = recipe.train.size_share if recipe.train.progressive_size else None
    model = opened.model().to(memory_format=memory_format(recipe.train.channels_last))
    return _make_learner(recipe, data, model, options)


def refuse(recipe: Recipe) -> None:
    """Refuse what a learner cannot do, and warn of what it leaves to fastai.

    Raises:
        RecipeError: If the task is of another kind, or the recipe trains in a way that only our own trainer has.
    """
    kind, instead = recipe.task.kind, "train it with r2kit finetune"
    if kind not in KINDS:
        raise RecipeError(f"task.kind: fastai learners are for {', '.join(KINDS)}, not for {kind}; {instead}")
    if recipe.data.resize == "tile":
        raise RecipeError("data.resize: a fastai learner does not validate in tiles; use squash, crop or pad")
    if recipe.model.warm_start:
        raise RecipeError(
            f"model.warm_start: the activation turns over the whole training, and fastai fits in pieces; {instead}, "
            "and go on from there with run_learner"
        )
    spec = recipe.train
    fields = {name: field.default for name, field in TrainSpec.model_fields.items()}
    left = [name for name, value in fields.items() if getattr(spec, name) != value and name not in TAKEN | _OF_FIT]
    if left:
        warnings.warn(
            f"not used by a fastai learner: {', '.join(f'train.{name}' for name in left)}; fastai has callbacks and "
            "learn.freeze for it",
            stacklevel=3,
        )


def _make_learner(recipe: Recipe, data: DataModule, model: nn.Module, options: dict[str, Any]) -> Learner:
    """Put a learner together."""
    device, _, _ = choose_device(recipe)
    speed_up(model, recipe.train, device, "32-true")
    # What is frozen is said to fastai; a task that freezes would stand in its way.
    plain = recipe.train.model_copy(update={"freeze": "none", "unfreeze": ()})
    task = cast(SteppedTask, TASKS[recipe.task.kind].from_data(recipe.model_copy(update={"train": plain}), model, data))
    task.to(device)  # the network, and the weights of the classes
    side = RecipeCallback(recipe, data, task)
    spec = recipe.train
    settings: dict[str, Any] = {
        "loss_func": RecipeLoss(task),
        "opt_func": Adam if spec.optimizer == "adamw" else partial(SGD, mom=spec.momentum),
        "wd": spec.weight_decay,
        "splitter": three_parts,
        "metrics": [ValueMetric(partial(side.value, name), name) for name in task.columns if _is_metric(name)],
        "path": Path("."),
        **({} if spec.lr == "auto" else {"lr": spec.lr}),
        **options,
    }
    loaders = make_loaders(data, recipe.task.kind, device, Path(settings["path"]))
    return Learner(loaders, model, **{**settings, "cbs": [side, *L(settings.get("cbs"))]})


def _is_metric(column: str) -> bool:
    return column.startswith("val_") and column != "val_loss"  # fastai shows the loss by itself


def three_parts(model: nn.Module) -> list[list[nn.Parameter]]:
    """Return the parameters in three groups: stem and early stages, the last two stages, head."""
    parts = Parts(model)
    groups: list[list[nn.Parameter]] = [[], [], []]
    for name, parameter in model.named_parameters():
        number = parts.number[name]
        groups[2 if number == parts.head else int(number >= parts.head - 2)].append(parameter)
    return groups


class RecipeLoss:
    """The loss of a recipe as fastai calls it: the recipe's own in training, the plain one in validation.

    Args:
        task: Knows both.
    """

    def __init__(self, task: SteppedTask) -> None:
        self.task = task
        self.reduction: Any = "mean"
        self.y_int = task.recipe.task.kind == "classification"  # MixUp then blends losses instead of labels

    def __call__(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits (B, K, ...)."""
        stage: Stage = "train" if self.task.model.training else "val"
        return self.task.loss(_plain(pred).float(), _plain(target), stage, self.reduction)

    def activation(self, logits: Tensor) -> Tensor:
        """Return probabilities."""
        return logits.sigmoid() if self.task.recipe.task.kind == "multilabel" else logits.softmax(1)

    def decodes(self, probs: Tensor) -> Tensor:
        """Return classes (B, ...), or which labels are given (B, K)."""
        spec = self.task.recipe.task
        return probs >= spec.threshold if isinstance(spec, MultilabelSpec) else probs.argmax(1)


class RecipeCallback(Callback):
    """Does to each batch what the recipe asks for, and keeps what a run folder records; it is `learn.recipe`.

    Args:
        source: The recipe.
        data: Set up.
        task: Measures epochs as `r2kit finetune` does.
    """

    order = -5  # before fastai's own mixing

    def __init__(self, source: Recipe, data: DataModule, task: SteppedTask) -> None:
        self.source, self.data, self.task = source, data, task
        self.passes = 0
        """Whole passes over the training images so far, in all fits."""
        self.steps = 0
        self.rows: list[dict[str, float]] = []
        """What `metrics.csv` holds: a row for each pass."""
        self.fits: list[dict[str, Any]] = []
        """What was asked of fastai, in order."""
        self.seconds = 0.0
        self._values: dict[str, float] = {}
        self._trained: dict[str, float] | None = None
        self._fit: dict[str, Any] | None = None
        self._seen = 0

    def value(self, name: str) -> float:
        """Return a metric of the last validation."""
        return self._values.get(name, float("nan"))

    def before_fit(self) -> None:
        """Refuse what cannot be mixed.

        Raises:
            RecipeError: If the recipe and fastai would both mix the images, or fastai would mix masks.
        """
        self._fit, self._started = None, time.perf_counter()
        mixers = self.learn.cbs.filter(lambda callback: isinstance(callback, MixHandler))
        augment = self.source.augment
        if mixers and augment.mixup + augment.cutmix:
            raise RecipeError(
                f"augment.mixup: the recipe mixes images, and fastai's {type(mixers[0]).__name__} would mix them once "
                "more; leave that out, or give overrides=['augment.mixup=0', 'augment.cutmix=0']"
            )
        if mixers and self.source.task.kind == "segmentation":
            raise RecipeError(
                f"{type(mixers[0]).__name__}: fastai's mixing is for classes of whole images; for masks use "
                "augment.cutmix"
            )

    def before_train(self) -> None:
        """Choose the pass, and what is written down about it."""
        self._mixed = bool(self.learn.cbs.filter(lambda callback: isinstance(callback, MixHandler)))
        self.dls.train.epoch = self.passes
        self.task.train_sums.zero_()
        if self._fit is None and not self._is_trial:
            self._fit = {"epochs": 0, "frozen_groups": int(self.opt.frozen_idx), "lr": 0.0}

    def before_batch(self) -> None:
        """Give the network the images as it gets them from our own trainer."""
        batch = {"image": _plain(self.xb[0])}
        if len(self.yb):
            batch[self.task.target] = _plain(self.yb[0])
        if self.training:
            torch.manual_seed(derive_seed(self.source.seed, self.steps, 0))
            end = self.passes - self.epoch + self.n_epoch
            batch = self.data.vary(batch, self.passes, end, self.iter)
        self.learn.xb = (batch["image"].contiguous(memory_format=self.task.format),)
        if len(self.yb):
            self.learn.yb = (batch[self.task.target],)

    def after_batch(self) -> None:
        """Count a training batch, keep the outputs of one that is validated."""
        if not len(self.yb) or self._is_trial or hasattr(self.learn, "gather_preds"):
            return
        logits, target = _plain(self.pred.detach()).float(), _plain(self.yb[0])
        if not self.training:
            self.task.keep(torch.arange(self._seen, self._seen + len(logits)), logits, target)
            self._seen += len(logits)
            return
        self.task.count(logits, target, _plain(self.loss.detach()))
        self.steps += 1
        assert self._fit is not None
        self._fit["lr"] = max(self._fit["lr"], *(float(hyper["lr"]) for hyper in self.opt.hypers))

    def after_train(self) -> None:
        """Count the pass."""
        if self._is_trial:
            return
        self._trained = self.task.training_metrics()
        if self._mixed:  # by fastai, which does not say whose label an image has
            self._trained = {name: value for name, value in self._trained.items() if name == "train_loss"}
        self.passes += 1
        assert self._fit is not None
        self._fit["epochs"] += 1

    def before_validate(self) -> None:
        """Forget the outputs of the last validation."""
        self.task.on_validation_epoch_start()
        self._seen = 0

    def after_validate(self) -> None:
        """Compute the metrics of the validation images."""
        if self._seen:
            self._values, self._seen = self.task.validation_metrics(), 0

    def after_epoch(self) -> None:
        """Add a row, where the epoch trained."""
        if self._trained is None:
            return
        found = {
            "epoch": self.passes - 1,
            "step": self.steps,
            "lr": max(float(hyper["lr"]) for hyper in self.opt.hypers),
            **self._trained,
            **self._values,
        }
        columns = ("epoch", "step", "lr", *self.task.columns)
        self.rows.append({column: found.get(column, float("nan")) for column in columns})
        self._trained = None

    def after_fit(self) -> None:
        """Write down what the fit was."""
        if self._fit is None:
            return
        self.seconds += time.perf_counter() - self._started
        usual = ("TrainEvalCallback", "Recorder", "CastToTensor", "ProgressCallback", type(self).__name__)
        names = [type(callback).__name__ for callback in self.learn.cbs]
        self._fit["callbacks"] = [name for name in names if name not in usual]
        self._fit["optimizer"] = _name_of(self.learn.opt_func)
        self.fits.append(self._fit)
        self._fit = None

    @property
    def _is_trial(self) -> bool:
        """Whether fastai looks for a learning rate: it takes the weights back afterwards, and so do we the count."""
        return hasattr(self.learn, "lr_finder")


def _plain(tensor: Tensor) -> Tensor:
    """Return a tensor without fastai's type, which slows every operation and has no place in a loss."""
    return tensor.as_subclass(Tensor)


def _name_of(function: Any) -> str:
    """Return the name of an optimiser."""
    inner = function.func if isinstance(function, partial) else function
    return str(getattr(inner, "__name__", type(inner).__name__))
