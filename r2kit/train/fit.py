"""The training itself: the trainer, what stands around it, and where it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from timm.layers import convert_sync_batchnorm

from r2kit.callbacks import AnnealBeta, Ema, Progress, Recorder
from r2kit.checkpoint import CheckpointFiles, first_whole
from r2kit.errors import Interrupted, RunError
from r2kit.loggers import LogEpochs, make_loggers
from r2kit.run import Run
from r2kit.stopping import Patience, TimeLimit
from r2kit.train.choices import Batch, choose_sync_batchnorm, is_out_of_memory
from r2kit.train.guard import Guard
from r2kit.train.keep import Keeper
from r2kit.train.prepare import Job
from r2kit.train.ranks import launcher, layout
from r2kit.train.signals import StopSignals
from r2kit.train.watch import Watch


class OutOfMemoryError(RunError):
    """Memory ran out in training.

    Args:
        message: The line for the user, with the ways on.
        where: The epoch and the batch, in words.
        alone: Whether this is the only process of the run.
    """

    def __init__(self, message: str, where: str, *, alone: bool) -> None:
        super().__init__(message)
        self.where = where
        self.alone = alone


def newest_checkpoint(run: Run, console: Console) -> Path | None:
    """Return the newest checkpoint of a run that is whole, None where there is none; name the damaged ones."""
    whole, damaged = first_whole([run.last_checkpoint, run.previous_checkpoint])
    for path in damaged:
        console.print(
            f"note: {path} is damaged: it does not match its checksum; {whole or 'the start'} is used instead"
        )
    return whole


def fit(
    job: Job,
    run: Run,
    console: Console,
    signals: StopSignals,
    *,
    checkpoint: Path | None = None,
    steps: int | None = None,
    extra: Sequence[Callback] = (),
) -> Recorder:
    """Train; on return the run folder holds the best and the last checkpoint.

    Args:
        job: What is trained, on what.
        run: The run folder.
        console: Where the epochs are printed.
        signals: Knows when somebody asks the run to stop.
        checkpoint: Where to go on; None starts.
        steps: End after so many steps and one batch of validation; None trains as the recipe says.
        extra: Callbacks beside our own.

    Raises:
        Interrupted: If somebody asked the run to stop; it is saved.
        OutOfMemoryError: If memory ran out; the first process alone may go on with smaller passes.
        RunError: If the loss is no number any more, or a file cannot be written.
    """
    spec = job.recipe.train
    recorder, guard = Recorder(run, console), Guard(run, spec.max_loss_growth)
    ema = Ema(spec.ema_decay) if spec.ema else None
    callbacks: list[Callback] = [recorder, Progress(console), *extra]
    if ema is not None:
        callbacks.append(ema)
    if job.recipe.model.warm_start:
        callbacks.append(AnnealBeta(job.recipe.model.warm_start_until))
    if spec.time_limit_seconds is not None:
        callbacks.append(TimeLimit(spec.time_limit_seconds, console))
    plateau = spec.plateau_patience if spec.schedule == "plateau" else None
    if plateau is not None or spec.early_stop is not None:
        callbacks.append(Patience(plateau, spec.early_stop, console))
    if spec.loggers:
        callbacks.append(LogEpochs(run))
    if job.compiled:
        job.task.model.compile()
    watch = Watch()
    callbacks += [watch, guard, Keeper(run, recorder, guard, signals, spec, ema)]
    on_gpu = job.device.type == "cuda"
    devices, machines = layout(spec, on_gpu)
    environment = launcher()
    if choose_sync_batchnorm(job.recipe, job.device, devices * machines)[0]:
        convert_sync_batchnorm(job.task.model)  # timm's, which knows norms that hold their activation
    trainer = L.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=devices,
        num_nodes=machines,
        strategy="ddp" if spec.strategy == "ddp" or devices * machines > 1 else "auto",
        plugins=[CheckpointFiles(), *([environment] if environment is not None else [])],
        precision=job.precision,
        max_epochs=spec.epochs if steps is None else 1,
        limit_train_batches=steps,
        limit_val_batches=None if steps is None else 1,
        callbacks=callbacks,
        logger=make_loggers(spec.loggers, run) or False,
        default_root_dir=run.path,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        accumulate_grad_batches=job.batch.passes,
        gradient_clip_val=spec.gradient_clip,
        # Some CUDA kernels have no deterministic form; there Lightning warns and goes on.
        deterministic="warn" if on_gpu else True,
        use_distributed_sampler=False,  # the samplers of the DataModule shard themselves
    )
    # Deterministic torch fills every new tensor with NaN, to show who reads what nobody wrote: 3 % of a step on a CPU.
    memory: Any = torch.utils.deterministic
    filling, memory.fill_uninitialized_memory = memory.fill_uninitialized_memory, False
    try:
        trainer.fit(job.task, datamodule=job.data, ckpt_path=checkpoint, weights_only=True)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or is_out_of_memory(error):
            where = f"epoch {trainer.current_epoch + 1}, batch {trainer.fit_loop.batch_idx + 1}"
            line = _no_memory(where, job.batch, run)
            raise OutOfMemoryError(line, where, alone=trainer.world_size == 1) from None
        lost = watch.said(error) if trainer.world_size > 1 else None
        if lost is not None:
            raise RunError(f"{lost}; what was saved before stays: go on with r2kit resume {run.path}") from None
        if signals.noted is None and "DataLoader worker" in str(error):  # torch adds what became of it
            raise RunError(
                f"{str(error).splitlines()[0].rstrip('. ')}; most often memory is out: go on with r2kit resume "
                f"{run.path}, or start again with fewer data.workers and --overwrite"
            ) from None
        if signals.noted is None:
            raise
        # The loader processes got the signal as well, and were gone before the next batch.
        raise Interrupted(signals.noted, f"go on with r2kit resume {run.path}") from error
    except Interrupted:
        if not trainer.is_global_zero:
            raise SystemExit(0) from None  # the first process says it, and how it ended
        raise
    finally:
        watch.end()
        memory.fill_uninitialized_memory = filling
    return recorder


def _no_memory(where: str, batch: Batch, run: Run) -> str:
    """Say where memory ran out, and the two ways on: the same with more room, or smaller passes from the start."""
    half = batch.halved()
    smaller = "a smaller data.image_size or model.name, and --overwrite"
    if half is not None:
        smaller = f"train.batch_size={half.size} train.accumulate={half.passes} --overwrite"
    kept = "from its last checkpoint " if run.last_checkpoint.is_file() else ""
    return (
        f"{where}: out of memory, though a trial step with {batch.size} images fitted; if something else took the "
        f"memory, free it and go on {kept}with r2kit resume {run.path}; else start again with {smaller}"
    )
