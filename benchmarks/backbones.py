"""Speed and memory of the fast form against timm's own networks and the published Res2NetPlus, on this machine's CPU.

    python benchmarks/backbones.py --size 64 --batch 32 --json backbones-64.json
    python benchmarks/backbones.py --size 224 --batch 8 --json backbones-224.json

In each round every network does one step, one after the other, so that a machine whose speed drifts slows them alike; a
ratio is the median over the rounds. Before anything is timed the fast form's outputs are checked against those of the
plain modules. `res2netplus50_res2fg` with torch's own Mish stands for the published Res2NetPlus file: it computes the
same, without the in-place addition. The time outside convolutions of the fast form is what is left of a step when its
convolutions (forward and each gradient) are timed one by one, within a unit nothing but their kernels; that of the
plain form is from torch's profiler.
Peak memory is that of a process that does three training steps and nothing else: how far its resident set grew beyond
what it was with the network built.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import profile

import r2kit
from r2kit.backbones.fast import native, norm_act, optimize_with_reason, window
from r2kit.backbones.fast.convolution import Conv
from r2kit.benchmark import check_same, interleaved, ratio

FAST = " (fast)"
NETWORKS = ("resnet50d", "res2netplus50", "res2netplus50_res2fg", "res2net50_26w_4s")
OPTIMIZED = ("res2netplus50", "res2net50_26w_4s")
# what, training, faster, slower: the rows of the table
ROWS = (
    ("training: res2netplus50 plain / timm resnet50d", True, "res2netplus50", "resnet50d"),
    ("training: res2netplus50 fast / timm resnet50d", True, "res2netplus50" + FAST, "resnet50d"),
    ("training: res2net50_26w_4s fast / timm's own", True, "res2net50_26w_4s" + FAST, "res2net50_26w_4s"),
    ("training: res2netplus50 fast / published Res2NetPlus", True, "res2netplus50" + FAST, "res2netplus50_res2fg"),
    ("inference: res2netplus50 plain / timm resnet50d", False, "res2netplus50", "resnet50d"),
    ("inference: res2netplus50 fast / timm resnet50d", False, "res2netplus50" + FAST, "resnet50d"),
    ("inference: res2net50_26w_4s fast / timm's own", False, "res2net50_26w_4s" + FAST, "res2net50_26w_4s"),
)


def build(name: str) -> nn.Module:
    net = r2kit.create_model(name.removesuffix(FAST)).to(memory_format=torch.channels_last)
    if name.endswith(FAST):
        optimize_with_reason(net)
    return net


def step(net: nn.Module, image: Tensor) -> None:
    net.zero_grad(set_to_none=True)
    net(image).logsumexp(1).mean().backward()


def outside_convolutions_fast(net: nn.Module, image: Tensor, rounds: int) -> float:
    """Share of a training step, with a clock around every convolution and every kernel of one; the median."""
    spent, inside = 0.0, False
    names = ("forward", "input_grad", "weight_grad")
    originals = {name: getattr(Conv, name) for name in names}
    find = native.function_of

    def clocked(function):
        def call(*args, **kwargs):
            nonlocal spent, inside
            if inside:
                return function(*args, **kwargs)
            inside, start = True, time.perf_counter()
            found = function(*args, **kwargs)
            spent, inside = spent + time.perf_counter() - start, False
            return found

        return call

    def clocked_kernel(source, name, dtype):
        function = find(source, name, dtype)
        return function if source in (norm_act.SOURCE, window.SOURCE) else clocked(function)

    shares = []
    try:
        for name, function in originals.items():
            setattr(Conv, name, clocked(function))
        native.function_of = clocked_kernel
        net = copy.deepcopy(net)  # what the units of the other one call has been written down
        for _ in range(rounds + 3):
            spent, start = 0.0, time.perf_counter()
            step(net, image)
            shares.append(1 - spent / (time.perf_counter() - start))
    finally:
        native.function_of = find
        for name, function in originals.items():
            setattr(Conv, name, function)
    return statistics.median(shares[3:])


def outside_convolutions_plain(net: nn.Module, image: Tensor) -> float:
    step(net, image)
    with profile() as found:
        step(net, image)
    times = {event.key: event.self_cpu_time_total for event in found.key_averages()}
    convolutions = ("aten::mkldnn_convolution", "aten::convolution_backward")
    return 1 - sum(times[name] for name in convolutions) / sum(times.values())


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_resident() -> int:
    """Bytes of this process in memory at its largest. Not `ru_maxrss`, which begins with the peak of the parent."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def peak_memory(name: str, size: int, batch: int) -> float:
    """Bytes by which the resident set of a fresh process grows in three training steps."""
    command = [sys.executable, __file__, "--peak", name, "--size", str(size), "--batch", str(batch)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", help="file to write")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.manual_seed(0)
    image = torch.randn(given.batch, 3, given.size, given.size).contiguous(memory_format=torch.channels_last)
    if given.peak:
        net = build(given.peak).train()
        before = resident()
        for _ in range(3):
            step(net, image)
        print(peak_resident() - before)
        return

    nets = {name: build(name) for name in NETWORKS}
    differences = {}
    for name in OPTIMIZED:
        fast = copy.deepcopy(nets[name])
        print(f"{name}: {optimize_with_reason(fast)}")
        differences[name] = check_same(nets[name].eval(), fast.eval(), image[:4])
        nets[name + FAST] = fast
    seconds = {}
    for training in (True, False):
        for net in nets.values():
            net.train(training)
        seconds[training] = interleaved(nets, image, training=training, rounds=given.rounds, warmup=3)
    rows = {what: ratio(seconds[training], a, b) for what, training, a, b in ROWS}
    for net in nets.values():
        net.train()
    fast_name = "res2netplus50" + FAST
    rows["outside convolutions: res2netplus50 plain"] = outside_convolutions_plain(nets["res2netplus50"], image)
    rows["outside convolutions: res2netplus50 fast"] = outside_convolutions_fast(nets[fast_name], image, given.rounds)
    peaks = {name: peak_memory(name, given.size, given.batch) for name in ("res2netplus50", fast_name)}
    rows["peak training memory: res2netplus50 fast / plain"] = peaks[fast_name] / peaks["res2netplus50"]

    threads = torch.get_num_threads()
    print(f"{given.size} px, batch {given.batch}, channels-last, {threads} CPU threads, torch {torch.__version__}")
    print(f"| what | measured (median of {given.rounds}) |\n|---|---|")
    for what, value in rows.items():
        print(f"| {what} | {value:.2f} |")
    if given.json:
        record = {
            "settings": {key: value for key, value in vars(given).items() if key not in ("json", "peak")},
            "machine": platform.processor() or platform.machine(),
            "threads": threads,
            "torch": torch.__version__,
            "rows": rows,
            "largest_difference_of_an_output": differences,
            "peak_bytes": peaks,
            "seconds": {"training": seconds[True], "inference": seconds[False]},
        }
        Path(given.json).write_text(json.dumps(record, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
