"""From a fastai learner back to a run folder."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from fastai.learner import Learner

from r2kit.backbones.measure import count_macs, count_parameters
from r2kit.backbones.scalenet import ScaleNet
from r2kit.backbones.scalenet_tables import save_structure
from r2kit.backbones.weights import save_weights
from r2kit.callbacks import epochs_csv
from r2kit.errors import RunError
from r2kit.evaluate import evaluate
from r2kit.fastai.bridge import TAKEN, RecipeCallback
from r2kit.recipe import TrainSpec
from r2kit.report import write_report
from r2kit.run import Run, write_atomic
from r2kit.train.prepare import choose_device


def save_run(learn: Learner, out: str | Path | None = None, *, overwrite: bool = False) -> Run:
    """Write the network of a learner as a run folder, evaluate it, and write its report.

    The folder is one that `r2kit evaluate`, `predict`, `explain`, `export`, `report` and `compare` accept; only
    `r2kit reproduce` does not, as what fastai did is not in the recipe. `run.json` lists it under ``fastai``.

    Args:
        learn: From `recipe_learner` or `run_learner`. Its weights are kept as they are now; to keep those of the best
            epoch, train with fastai's `SaveModelCallback`.
        out: The run folder; by default ``runs/<name>-<n>``.
        overwrite: Replace the run that `out` holds.

    Returns:
        The finished run.

    Raises:
        RunError: If the learner was made otherwise, has another model than it was made with, or the folder cannot be
            used.
    """
    side = getattr(learn, "recipe", None)
    if not isinstance(side, RecipeCallback):
        raise RunError(
            "save_run: a run folder holds recipe, split and preprocessing, which only a learner of recipe_learner or "
            "run_learner has; make it with one of these"
        )
    if learn.model is not side.task.model:
        raise RunError("save_run: the learner has another model than that of its recipe; a run folder could not say it")
    data, recipe = side.data, side.source
    if side.passes:
        recipe = recipe.model_copy(update={"train": _as_trained(side)})
    run = Run.create(recipe, out, overwrite=overwrite)
    data.preprocess.save(run.preprocess_file)
    data.split.save(run.split_file, data.source.manifest, data.source.contents)
    model = learn.model
    if isinstance(model, ScaleNet) and recipe.model.structure is not None:
        save_structure(model.structure, run.structure_file)
    if side.rows:
        write_atomic(run.metrics_csv, epochs_csv(side.rows))
    save_weights(model, run.weights_file, {"name": recipe.model.name, "preprocess": data.preprocess.to_dict()})
    was_training, device = model.training, next(model.parameters()).device
    shape = (len(data.preprocess.bands), *recipe.data.size)
    run.write_info(
        device=choose_device(recipe)[1],
        data={
            "source": data.source.name,
            "fingerprint": data.source.fingerprint,
            "image_size": data.original_size,
        },
        split=data.split.kind,
        model={"parameters": count_parameters(model), "macs": count_macs(model.to("cpu"), shape)},
        train_seconds=round(side.seconds, 1),
        fastai={"version": version("fastai"), "fits": side.fits},
    )
    model.to(device).train(was_training)
    with torch.random.fork_rng(devices=[]):  # a session that goes on draws what it would have drawn
        evaluate(run)
        write_report(run)
    run.write_info(state="finished", finished=datetime.now(UTC).isoformat(timespec="seconds"))
    return run


def _as_trained(side: RecipeCallback) -> TrainSpec:
    """Return the `train` part that is true of the run: what the learner took, and what was done; nothing else."""
    spec = side.source.train
    kept = {name: getattr(spec, name) for name in (*TAKEN, "nesterov")}
    # Images that grow need an epoch for each size, also where training ended before.
    epochs = max(side.passes, len(spec.progressive_size) + 1 if spec.progressive_size else 1)
    return TrainSpec.model_validate({**kept, "epochs": epochs, "lr": max(fit["lr"] for fit in side.fits)})
