"""Validates the network of a finished run on a number of processes, and prints the metrics, each with every digit."""

import json
import sys
from dataclasses import replace

import lightning as L

from r2kit.run import Run
from r2kit.tasks import TASKS


def main():
    run, devices = Run.open(sys.argv[1]), int(sys.argv[2])
    data = run.datamodule()
    data.setup()
    rows = data.split.val
    data.split = replace(data.split, val=rows[: len(rows) - (len(rows) % 6 == 0)])  # two or three shards are uneven
    task = TASKS[run.recipe.task.kind].from_data(run.recipe, run.model(), data)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        deterministic=True,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # as in a training
    )
    trainer.validate(task, datamodule=data, verbose=False)
    if trainer.is_global_zero:
        print(
            json.dumps({"images": len(data.split.val), "metrics": {k: repr(v) for k, v in task.epoch_metrics.items()}})
        )


if __name__ == "__main__":
    main()
