"""The processes of one run: who they are, what the first one tells the others, and when they part.

Lightning starts the others itself on one machine; torchrun and SLURM start all of them, on any number of machines.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment

from r2kit.errors import RecipeError, RunError
from r2kit.recipe.train import TrainSpec

_FACTS = "R2KIT_RUN"  # what the first process tells those that it starts


def first_process() -> bool:
    """Whether this is the process that writes files: the only one, or rank zero."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", "0")))
    return rank == "0"


def launcher() -> ClusterEnvironment | None:
    """Return Lightning's word for what started the processes of this run; None where Lightning starts them."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if SLURMEnvironment.detect():
        # Lightning would save a file of its own and requeue the job; here the run saves itself and exits with 143.
        return SLURMEnvironment(auto_requeue=False)
    return None


def layout(spec: TrainSpec, on_gpu: bool) -> tuple[int, int]:
    """Return the devices of a machine, and the machines.

    Args:
        spec: The recipe's `train` section.
        on_gpu: Whether the devices are GPUs.

    Raises:
        RecipeError: If the recipe asks for other devices than torchrun or SLURM started processes for.
    """
    environment = launcher()
    if environment is None:
        wanted = spec.devices if spec.devices != "auto" else (torch.cuda.device_count() if on_gpu else 1)
        return wanted, 1
    world = environment.world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", world)))
    if spec.devices not in ("auto", local):
        raise RecipeError(
            f"train.devices: {spec.devices} asked for, but {local} process(es) were started on this machine; leave it "
            "at auto, or start as many"
        )
    return local, world // local


def meet() -> None:
    """Connect the processes that torchrun or SLURM started, so that they can agree before training."""
    environment = launcher()
    if environment is None or environment.world_size() == 1 or torch.distributed.is_initialized():
        return
    os.environ["MASTER_ADDR"] = environment.main_address
    os.environ["MASTER_PORT"] = str(environment.main_port)
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(environment.local_rank())
        backend = "cpu:gloo,cuda:nccl"
    torch.distributed.init_process_group(backend, rank=environment.global_rank(), world_size=environment.world_size())


def share(facts: dict[str, Any]) -> dict[str, Any]:
    """Return what the first process gives, in every process.

    Args:
        facts: Plain values; those of other processes do not count.
    """
    if first_process():
        os.environ[_FACTS] = json.dumps(facts)  # for processes that Lightning starts later
    elif not torch.distributed.is_initialized():
        told: dict[str, Any] = json.loads(os.environ[_FACTS])
        return told
    if torch.distributed.is_initialized():
        box: list[Any] = [facts]
        try:
            torch.distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        except RuntimeError:
            raise RunError("the first process of the run ended before training; it says why") from None
        shared: dict[str, Any] = box[0]
        return shared
    return facts


def part() -> None:
    """Forget the other processes; what follows training is the first one's alone."""
    os.environ.pop(_FACTS, None)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
