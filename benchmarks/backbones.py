"""Speed of backbones against a baseline, in one interleaved run: medians of images per second and of the ratio.

    python benchmarks/backbones.py res2net50d res2netplus50 --against resnet50d --size 64 --batch 32

In each round every network does one step, one after the other, so that a machine whose speed drifts slows them alike;
the ratio is taken round by round.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time

import torch
from torch import Tensor, nn

import r2kit


def step(model: nn.Module, image: Tensor, training: bool) -> float:
    """Return the seconds of one training step without optimiser, or of one forward pass in inference mode."""
    if image.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    if training:
        model.zero_grad(set_to_none=True)
        model(image).float().logsumexp(1).mean().backward()
    else:
        with torch.inference_mode():
            model(image)
    if image.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--against", default="resnet50d")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--inference", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="file to write")
    given = parser.parse_args()

    names = [given.against, *(name for name in given.models if name != given.against)]
    torch.manual_seed(0)
    layout = torch.channels_last
    nets = {name: r2kit.create_model(name).to(given.device, memory_format=layout) for name in names}
    for net in nets.values():
        net.train(not given.inference)
    image = torch.randn(given.batch, 3, given.size, given.size, device=given.device).contiguous(memory_format=layout)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(given.warmup + given.rounds):
        for name, net in nets.items():
            found = step(net, image, training=not given.inference)
            if round_ >= given.warmup:
                seconds[name].append(found)

    device = (
        torch.cuda.get_device_name() if given.device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    )
    what = "inference" if given.inference else "training step"
    print(f"{what}, {given.size} px, batch {given.batch}, channels-last, {device}, torch {torch.__version__}")
    print(f"| network | img/s (median of {given.rounds}) | against {given.against} |\n|---|---|---|")
    rows = []
    for name in names:
        rate = given.batch / statistics.median(seconds[name])
        ratio = statistics.median(b / a for a, b in zip(seconds[name], seconds[given.against], strict=True))
        rows.append({"name": name, "images_per_second": rate, "ratio": ratio, "seconds": seconds[name]})
        print(f"| `{name}` | {rate:.1f} | {ratio:.2f} |")
    if given.json:
        record = {"what": what, "settings": vars(given), "device": device, "machine": platform.machine(), "rows": rows}
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=2)


if __name__ == "__main__":
    main()
