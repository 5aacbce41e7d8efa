"""How fast a network runs on this machine, measured."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from r2kit.backbones import create_model
from r2kit.backbones.fast import is_fast, optimize_with_reason
from r2kit.errors import ModelError
from r2kit.models import memory_format


def measure_throughput(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    batch_size: int,
    *,
    training: bool,
    device: torch.device | str = "cpu",
    channels_last: bool = True,
    loss: Callable[[nn.Module, Tensor], Tensor] | None = None,
    rounds: int = 3,
    warmup: int = 1,
    budget: float = math.inf,
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
        loss: From the network and a batch of images to a loss; None takes one of the outputs (B, K, ...).
        rounds: Batches timed.
        warmup: Batches before, not timed.
        budget: Seconds after which no further batch is timed but the first.
    """
    device = torch.device(device)
    layout = memory_format(channels_last)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        clone = copy.deepcopy(model).to(device).to(memory_format=layout).train(training)
        image = torch.randn(batch_size, *image_shape, device=device).contiguous(memory_format=layout)
        seconds = interleaved(
            {"": clone}, image, training=training, rounds=rounds, warmup=warmup, loss=loss, budget=budget
        )[""]
    return batch_size / statistics.median(seconds)


def interleaved(
    nets: Mapping[str, nn.Module],
    image: Tensor,
    *,
    training: bool,
    rounds: int,
    warmup: int,
    loss: Callable[[nn.Module, Tensor], Tensor] | None = None,
    budget: float = math.inf,
) -> dict[str, list[float]]:
    """Return the seconds of each network's steps, one step of each in every round, so that drift meets all alike.

    Args:
        nets: (B, C, H, W) -> (B, K), in the mode they are to run in.
        image: (B, C, H, W).
        training: Time forward, loss and backward; else the forward pass in inference mode.
        rounds: Steps timed of each network.
        warmup: Rounds before, not timed.
        loss: See `measure_throughput`.
        budget: Seconds after which no further round begins, once one was timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in nets}
    begun = time.perf_counter()
    for index in range(warmup + rounds):
        if index > warmup and time.perf_counter() - begun > budget:
            break
        for name, net in nets.items():
            _wait(image.device)
            start = time.perf_counter()
            if training:
                net.zero_grad(set_to_none=True)
                (_loss(net, image) if loss is None else loss(net, image)).backward()
            else:
                with torch.inference_mode():
                    net(image)
            _wait(image.device)
            if index >= warmup:
                seconds[name].append(time.perf_counter() - start)
        if training:
            for net in nets.values():
                net.zero_grad(set_to_none=True)
    return seconds


@dataclass(frozen=True)
class Speed:
    """One network's speed beside another's, measured in one interleaved run.

    Attributes:
        name: The network, with its form.
        training: Whether a training step without optimiser was timed; else a forward pass.
        images_per_second: Median.
        ratio: Median over the rounds of its speed over that of the network it stands beside.
    """

    name: str
    training: bool
    images_per_second: float
    ratio: float


def compare_speed(
    name: str, against: str, size: tuple[int, int], batch_size: int, *, rounds: int = 10, warmup: int = 2
) -> tuple[list[Speed], str]:
    """Measure a network, plain and fast, beside another, plain, on the CPU with random images.

    Args:
        name: Any backbone that `create_model` knows.
        against: The one it stands beside.
        size: (H, W) of the images.
        batch_size: Images in a step.
        rounds: Steps of each that are timed.
        warmup: Steps of each before, not timed.

    Returns:
        Training and inference of `against`, `name`, and `name` in its fast form; and the line that says what the fast
        form is, or why there is none.

    Raises:
        ModelError: If a name is unknown, or the fast form does not give the outputs of the plain one.
    """
    image = torch.randn(batch_size, 3, *size).contiguous(memory_format=torch.channels_last)
    fast_name = f"{name}, fast form"
    found = []
    nets = {against: create_model(against), name: create_model(name)}
    nets = {key: net.to(memory_format=torch.channels_last).eval() for key, net in nets.items()}
    fast = copy.deepcopy(nets[name])
    why = optimize_with_reason(fast)
    if is_fast(fast):
        check_same(nets[name], fast, image[:2])
        nets[fast_name] = fast
    for training in (True, False):
        for net in nets.values():
            net.train(training)
        seconds = interleaved(nets, image, training=training, rounds=rounds, warmup=warmup)
        found += [
            Speed(key, training, batch_size / statistics.median(seconds[key]), ratio(seconds, key, against))
            for key in nets
        ]
    return found, why


def ratio(seconds: Mapping[str, list[float]], name: str, against: str) -> float:
    """Return how fast `name` is beside `against`, the median over the rounds."""
    return statistics.median(b / a for a, b in zip(seconds[name], seconds[against], strict=True))


def check_same(plain: nn.Module, fast: nn.Module, image: Tensor, tolerance: float = 1e-3) -> float:
    """Return the largest difference of an output over the largest output, in evaluation mode.

    It is that of copies whose norms have weights drawn at random: those that many networks begin with are zero, and
    with them a whole branch would be right whatever it computes.

    Raises:
        ModelError: If it is more than `tolerance`.
    """
    with torch.inference_mode():
        expected, got = _with_all_branches(plain)(image), _with_all_branches(fast)(image)
    difference = float((got - expected).abs().max() / expected.abs().max())
    if not difference <= tolerance:
        raise ModelError(f"the fast form differs from the plain one by {difference:.1e} of the largest output")
    return difference


def _with_all_branches(model: nn.Module) -> nn.Module:
    """Return a copy of a network, in evaluation mode, whose norms let every branch through."""
    model = copy.deepcopy(model).eval()
    draws = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=draws)
            nn.init.uniform_(module.bias, -0.5, 0.5, generator=draws)
    return model


def _loss(model: nn.Module, image: Tensor) -> Tensor:
    """A loss that every output has a part in."""
    return model(image).float().logsumexp(1).mean()


def _wait(device: torch.device) -> None:
    """Wait for the device: a GPU returns before it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
