"""The training itself: the trainer, what stands around it, and where it goes on."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from r2kit.callbacks import AnnealBeta, Ema, Progress, Recorder
from r2kit.loggers import LogEpochs, make_loggers
from r2kit.run import Run
from r2kit.stopping import Patience, TimeLimit
from r2kit.train.prepare import Job


def fit(job: Job, run: Run, console: Console, *, resume: bool, steps: int | None = None) -> Recorder:
    """Train; on return the run folder holds the best and the last checkpoint."""
    spec = job.recipe.train
    recorder = Recorder(run, console)
    callbacks: list[Callback] = [recorder, Progress(console)]
    if spec.ema:
        callbacks.append(Ema(spec.ema_decay))
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
    on_gpu = job.device.type == "cuda"
    devices = spec.devices if spec.devices != "auto" else (-1 if on_gpu else 1)
    trainer = L.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=devices,
        strategy="ddp" if spec.strategy == "ddp" else "auto",
        precision=job.precision,
        max_epochs=spec.epochs if steps is None else 1,
        limit_train_batches=steps,
        limit_val_batches=None if steps is None else 1,
        callbacks=callbacks,
        logger=make_loggers(spec.loggers, run) or False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        accumulate_grad_batches=job.batch.passes,
        gradient_clip_val=spec.gradient_clip,
        # Some CUDA kernels have no deterministic form; there Lightning warns and goes on.
        deterministic="warn" if on_gpu else True,
        use_distributed_sampler=False,  # the samplers of the DataModule shard themselves
    )
    checkpoint = run.last_checkpoint if resume and run.last_checkpoint.is_file() else None
    trainer.fit(job.task, datamodule=job.data, ckpt_path=checkpoint, weights_only=True)
    return recorder
