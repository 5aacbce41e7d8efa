"""The GPU kernels through Triton's interpreter, on a CPU: run by `test_kernels.py` in a process of its own.

Triton reads TRITON_INTERPRET when it is imported. Prints "same" if every output and gradient is that of the plain
modules.
"""

import copy
import sys

import torch
from torch import nn

from r2kit.backbones._res2 import Res2Block
from r2kit.backbones.fast import functions, norm_act, norm_act_gpu, optimize_with_reason
from r2kit.backbones.fast.norm_act import Norm

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2}
CASES = [  # type, activation, activation first, residual, rows, channels, statistics of the batch
    (torch.float64, "mish", True, False, 600, 26, True),
    (torch.float64, "mish", False, True, 67, 5, True),
    (torch.float32, "mish", True, False, 7, 3, False),
    (torch.float32, "relu", False, True, 70, 130, True),
    (torch.float32, "identity", False, False, 9, 8, True),
    (torch.bfloat16, "mish", True, False, 70, 26, True),
    (torch.bfloat16, "relu", False, True, 33, 5, False),
]


def near(found, wanted, tolerance):
    difference = (found.double() - wanted.detach()).abs().max()
    assert difference <= tolerance * wanted.abs().max().clamp(min=1e-9), (difference, tolerance)


def check_kernel(dtype, act, act_first, residual, count, chans, batch):
    kind = norm_act.sums_dtype(torch.empty(0, dtype=dtype))
    x = (torch.randn(count, chans + 4, dtype=dtype) * 3 + 2)[:, 2 : 2 + chans]
    weight, bias, mean = torch.randn(3, chans, dtype=kind)
    var = torch.rand(chans, dtype=kind) + 0.5
    res = torch.randn(count, chans, dtype=dtype) if residual else None
    dy, more = torch.randn(2, count, chans, dtype=dtype)
    leaves = [t if t is None else t.double().clone().requires_grad_() for t in (x, weight, bias, res)]
    theirs = Norm(act, 1.5, act_first, batch, 1e-5, 0.1, *leaves[1:3], mean.double().clone(), var.double().clone())
    expected = norm_act.plain(leaves[0], theirs, leaves[3])
    expected.backward(dy.double() + more.double())

    norm = Norm(act, 1.5, act_first, batch, 1e-5, 0.1, weight, bias, mean, var)
    stats = torch.empty(2, chans, dtype=kind) if batch else None
    y, y2, dres = (torch.empty(count, chans, dtype=dtype) for _ in range(3))
    norm_act_gpu.forward(x, norm, stats, y, res=res, add=more, y2=y2)
    dx = dy.clone()  # the gradient may be written over what it is made from
    sums = torch.empty(2, chans, dtype=kind)
    given = {"add": more, "res": res, "dres": dres if residual else None, "sums": sums}
    found = norm_act_gpu.backward(x, norm, stats, dx, dx, **given)
    pairs = [(y, expected), (y2, expected + more.double()), (dx, leaves[0].grad)]
    pairs += [
        (found[0], leaves[1].grad),
        (found[1], leaves[2].grad),
        (sums[0], leaves[1].grad),
        (sums[1], leaves[2].grad),
    ]
    pairs += [(mean, theirs.running_mean), (var, theirs.running_var)]
    if residual:
        pairs.append((dres, leaves[3].grad))
    for ours, wanted in pairs:
        near(ours, wanted, TOLERANCE[dtype])


def check_large_mean():
    x = torch.randn(700, 3) * 0.1 + 1000
    stats = torch.empty(2, 3)
    norm = Norm("identity", 1.0, False, True, 1e-5, 0.1, None, None, None, None)
    norm_act_gpu.forward(x, norm, stats, torch.empty_like(x))
    near(stats[1], x.double().var(0, correction=0), 1e-4)


def check_unit():
    """A whole unit, its kernels exchanged for those of the GPU."""
    plain = Res2Block(64, 16, base_width=64, scale=2, order="act_norm", act_layer=nn.Mish).double()
    fast = copy.deepcopy(plain)
    assert optimize_with_reason(fast).startswith("on: ")
    functions.norm_act.forward, functions.norm_act.backward = norm_act_gpu.forward, norm_act_gpu.backward
    found = []
    for net in (plain, fast):
        x = torch.linspace(-2, 2, 2 * 64 * 9, dtype=torch.float64).reshape(2, 64, 3, 3).sin().requires_grad_()
        out = net(x)
        (out * out.detach().cos()).sum().backward()
        found.append([out, x.grad, *(p.grad for p in net.parameters()), *net.buffers()])
    largest = max(float(t.detach().abs().max()) for t in found[0])
    for wanted, ours in zip(*found, strict=True):
        assert (ours - wanted).abs().max() <= 1e-10 * largest


if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert norm_act_gpu.refusal(torch.device("cpu")) is None
    for case in CASES:
        check_kernel(*case)
    check_large_mean()
    check_unit()
    print("same")
    sys.exit(0)
