"""Kernel: the means of 3x3 windows and their gradient, from and to some channels of wider maps; or a copy of them.

The split that a Res2 unit hands on without a convolution is a part of one map and goes to a part of another. torch's
pooling wants both whole, so it takes two copies more. A mean is over all places of a window, zeros beyond the border
among them, as torch's `avg_pool2d` with ``count_include_pad`` has it; a window of one place is a copy. The gradient of
a pixel is the sum over the windows that it lies in, each divided by the places of a window.

Reference: torch's `avg_pool2d`. Benchmark: ``python -m r2kit.backbones.fast.window``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from r2kit.backbones.fast import lanes, native
from r2kit.backbones.fast.squares import pixel_step
from r2kit.backbones.fast.stopwatch import milliseconds

SOURCE = (
    lanes.VECTORS
    + r"""
struct Args {
  int64_t batch, chans, side, stride_h, stride_w;     // side: 1 or 3; the border is side / 2 wide
  int64_t height, width, ldx, out_height, out_width, ldy, threads;
  const void* x;                                      // forward: maps; backward: gradient of the means
  void* y;                                            // forward: means; backward: gradient of the maps
};

// Whether window number `at` of a line has place `i` at pixel `h`, and if so which window that is.
static inline bool covers(int64_t h, int64_t i, int64_t pad, int64_t stride, int64_t most, int64_t& at) {
  const int64_t t = h + pad - i;
  at = t / stride;
  return t >= 0 && t % stride == 0 && at < most;
}

template <class T, bool BACK> static void run(const Args& a) {
  const int64_t tall = BACK ? a.height : a.out_height, across = BACK ? a.width : a.out_width;
  const int64_t read_tall = BACK ? a.out_height : a.height, read_across = BACK ? a.out_width : a.width;
  const int64_t ld_read = BACK ? a.ldy : a.ldx, ld_write = BACK ? a.ldx : a.ldy;
  const int64_t pad = a.side / 2, n = a.chans < width<T> ? a.chans : width<T>;
  const T places = T(a.side * a.side);
#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (int64_t r = 0; r < a.batch * tall * across; r++) {
    const int64_t image = r / (tall * across), h = r / across % tall, w = r % across;
    const T* from[9];
    int64_t count = 0;
    for (int64_t i = 0; i < a.side; i++)
      for (int64_t j = 0; j < a.side; j++) {
        int64_t y = h * a.stride_h - pad + i, x = w * a.stride_w - pad + j;
        const bool inside = BACK ? covers(h, i, pad, a.stride_h, read_tall, y) &&
                                       covers(w, j, pad, a.stride_w, read_across, x)
                                 : y >= 0 && y < read_tall && x >= 0 && x < read_across;
        if (inside) from[count++] = (const T*)a.x + ((image * read_tall + y) * read_across + x) * ld_read;
      }
    T* to = (T*)a.y + r * ld_write;
    for (int64_t c = 0; c < a.chans; c += n) {
      const int64_t at = c + n <= a.chans ? c : a.chans - n;  // the last vector reaches back
      Vec<T> sum = {};
      for (int64_t i = 0; i < count; i++) sum += load(from[i] + at, n);
      store(to + at, sum / places, n);
    }
  }
}
extern "C" void window_float(const Args* a, int back) { back ? run<float, true>(*a) : run<float, false>(*a); }
extern "C" void window_double(const Args* a, int back) { back ? run<double, true>(*a) : run<double, false>(*a); }
"""
)


class _Args(ctypes.Structure):
    """The struct of the same name in the source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "chans", "side", "stride_h", "stride_w")),
        *((name, ctypes.c_int64) for name in ("height", "width", "ldx", "out_height", "out_width", "ldy", "threads")),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
    )


def average(x: Tensor, out: Tensor, side: int, stride: tuple[int, int]) -> None:
    """Write the means of windows.

    Args:
        x: (B, C, H, W) on a CPU, channels-last; may be some channels of a wider tensor.
        out: (B, C, OH, OW), likewise; not where `x` is.
        side: Of a window: 3, with a border of one zero, or 1.
        stride: Step down and to the right.
    """
    _call(x, out, side, stride, read=x, written=out, back=False)


def average_grad(dy: Tensor, out: Tensor, side: int, stride: tuple[int, int]) -> None:
    """Write the gradient of what `average` read.

    Args:
        dy: Gradient of what it wrote.
        out: Like what it read.
        side: As given to `average`.
        stride: As given to `average`.
    """
    _call(out, dy, side, stride, read=dy, written=out, back=True)


def _call(
    maps: Tensor, means: Tensor, side: int, stride: tuple[int, int], *, read: Tensor, written: Tensor, back: bool
) -> None:
    args = _Args(
        *(maps.shape[0], maps.shape[1], side, *stride),
        *(maps.shape[2], maps.shape[3], pixel_step(maps), means.shape[2], means.shape[3], pixel_step(means)),
        *(native.threads(), read.data_ptr(), written.data_ptr()),
    )
    native.call(SOURCE, "window", maps.dtype, args, int(back))


def main(batch: int = 32, rounds: int = 10) -> None:
    """Print milliseconds of the kernel and of torch's operator with its copies, for splits at 64 px, medians."""
    for chans, side, step in ((26, 16, 1), (52, 16, 2), (104, 8, 2), (208, 4, 2)):
        wide = torch.randn(batch, 4 * chans, side, side).contiguous(memory_format=torch.channels_last)
        made = torch.empty(batch, 4 * chans, side // step, side // step).contiguous(memory_format=torch.channels_last)
        x, out = wide[:, 3 * chans :], made[:, 3 * chans :]

        def plain(x: Tensor = x, out: Tensor = out, step: int = step) -> Tensor:
            return out.copy_(avg_pool2d(x, 3, step, 1))

        forms: dict[str, Callable[[], object]] = {"kernel": partial(average, x, out, 3, (step, step)), "plain": plain}
        line = milliseconds(forms, rounds)
        print(f"{chans} channels, {side} x {side}, stride {step}, {torch.get_num_threads()} threads, ms: {line}")


if __name__ == "__main__":
    main()
