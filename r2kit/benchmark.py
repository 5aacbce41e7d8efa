"""How fast a network runs on this machine, measured."""

from __future__ import annotations

import copy
import statistics
import time

import torch
from torch import nn

from r2kit.models import memory_format


def measure_throughput(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    batch_size: int,
    *,
    training: bool,
    device: torch.device | str = "cpu",
    channels_last: bool = True,
    rounds: int = 3,
    warmup: int = 1,
) -> float:
    """Return images per second, the median over a few batches of random images.

    The measurement runs on a copy: weights, batch statistics and random state of the caller stay as they are.

    Args:
        model: (B, C, H, W) -> (B, K).
        image_shape: (C, H, W).
        batch_size: B.
        training: Time forward, loss and backward; else the forward pass in inference mode.
        device: Where to run.
        channels_last: Layout of the images in memory.
        rounds: Batches timed.
        warmup: Batches before, not timed.
    """
    device = torch.device(device)
    layout = memory_format(channels_last)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        clone = copy.deepcopy(model).to(device).to(memory_format=layout).train(training)
        image = torch.randn(batch_size, *image_shape, device=device).contiguous(memory_format=layout)
        seconds = []
        for index in range(warmup + rounds):
            _wait(device)
            start = time.perf_counter()
            if training:
                clone.zero_grad(set_to_none=True)
                clone(image).float().logsumexp(1).mean().backward()
            else:
                with torch.inference_mode():
                    clone(image)
            _wait(device)
            if index >= warmup:
                seconds.append(time.perf_counter() - start)
    return batch_size / statistics.median(seconds)


def _wait(device: torch.device) -> None:
    """Wait for the device: a GPU returns before it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
