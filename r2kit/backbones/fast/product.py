"""Kernel: a 1x1 convolution, over channels-last rows, with what stands behind it.

The product of the rows (pixels) with the weights, tile by tile: the weights are packed into panels, a panel stays in
the first cache while a block of rows passes, and the sums of the block go, one whole row after the other, through
`Finish` to where they belong. A stride only says which rows are read. Up to `widest()` input channels, where a
library's packing of both sides costs more than it gives; above, torch's matrix product is faster.

The gradient of the input is the same product with rows and columns of the weights exchanged.

Reference: torch's `conv2d`. Benchmark: ``python -m r2kit.backbones.fast.product``.
"""

from __future__ import annotations

import ctypes
import functools
import statistics
import sys
import time

import torch
from torch import Tensor

from r2kit.backbones.fast import native
from r2kit.backbones.fast.tile import TILES, FinishArgs, finish

SOURCE = (
    TILES
    + r"""
struct Args {
  int64_t batch, height, width, chans, ldx;            // x: rows (batch, height, width) of `chans`
  int64_t out_height, out_width, out_chans, stride_h, stride_w;
  int64_t w_c, w_k, threads;                           // the weight from c to k: w[c w_c + k w_k]
  const void *x, *w;
  Finish finish;
};
constexpr int64_t SUMS = 8 * 1024;  // values that the sums of a block of rows may take

template <class T> static void run(const Args& a) {
  const int64_t W = panel<T>, panels = (a.out_chans + W - 1) / W, pixels = a.out_height * a.out_width;
  const int64_t total = a.batch * pixels;
  const Ready<T> ready(a.finish, a.out_chans);
  // Threads share the rows, or the columns where there are few rows.
  const bool by_rows = total >= 1024;
#pragma omp parallel num_threads(a.threads)
  {
    const int64_t n = omp_get_num_threads(), t = omp_get_thread_num();
    const int64_t groups = (total + MR - 1) / MR;
    const int64_t from = by_rows ? groups * t / n * MR : 0;
    const int64_t to = by_rows ? std::min(total, groups * (t + 1) / n * MR) : total;
    const int64_t first = by_rows ? 0 : panels * t / n, last = by_rows ? panels : panels * (t + 1) / n;
    const int64_t wide = (last - first) * W, chans = std::min(a.out_chans - first * W, wide), step = a.chans * W;
    const int64_t block = std::min<int64_t>(8 * MR, std::max(MR, SUMS / std::max(wide, W) / MR * MR));
    T *b = kept<T, 0>((last - first) * step + 4 * W), *sums = kept<T, 1>(block * wide);
    for (int64_t k = 0; k < wide; k += 4)
      for (int64_t c = 0; c < a.chans; c += 4) {
        typename Four<T>::V four[4];
        const T* w = (const T*)a.w + c * a.w_c + (first * W + k) * a.w_k;
        fetch<T>(w, a.w_c, a.w_k, a.chans - c, chans - k, four);
        for (int64_t i = 0; i < 4 && c + i < a.chans; i++)
          memcpy(b + k / W * step + (c + i) * W + k % W, &four[i], sizeof(four[i]));
      }
    for (int64_t r0 = from; r0 < to && wide; r0 += block) {
      const int64_t count = std::min(block, to - r0), start = 0;
      const T* at[8 * MR];
      for (int64_t i = 0; i < count; i++) {
        const int64_t r = r0 + i, image = r / pixels, h = r % pixels / a.out_width, w = r % a.out_width;
        at[i] = (const T*)a.x + ((image * a.height + h * a.stride_h) * a.width + w * a.stride_w) * a.ldx;
      }
      for (int64_t p = 0; p < last - first; p++)
        for (int64_t i = 0; i < count; i += MR)
          tile_of<T>(std::min(MR, count - i), chans - p * W)(at + i, &start, 1, a.chans, b + p * step,
                                                             sums + i * wide + p * W, wide, true);
      for (int64_t i = 0; i < count; i++) ready.write(sums + i * wide, r0 + i, first * W, chans);
    }
  }
}
extern "C" void product_float(const Args* a) { run<float>(*a); }
extern "C" void product_double(const Args* a) { run<double>(*a); }
"""
)


@functools.cache
def widest() -> int:
    """Return the most input channels that this kernel is used for.

    With vectors of 32 bytes it loses to MKL's product above; with 64 it gains at every width (AMD EPYC, Zen 4).
    """
    return sys.maxsize if native.has_wide_vectors() else 256


class _Args(ctypes.Structure):
    """The struct of the same name in the source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "chans", "ldx")),
        *((name, ctypes.c_int64) for name in ("out_height", "out_width", "out_chans", "stride_h", "stride_w")),
        *((name, ctypes.c_int64) for name in ("w_c", "w_k", "threads")),
        ("x", ctypes.c_void_p),
        ("w", ctypes.c_void_p),
        ("finish", FinishArgs),
    )


def convolve(
    x: Tensor,
    weight: Tensor,
    out_size: tuple[int, int],
    stride: tuple[int, int],
    end: FinishArgs,
    *,
    turned: bool = False,
) -> None:
    """Do what `end` says with the sums of a 1x1 convolution without padding.

    Args:
        x: (B, C, H, W), channels-last; may be some channels of a wider tensor.
        weight: (K, C, 1, 1); with `turned` (C, K, 1, 1).
        out_size: Height and width of the output.
        stride: Of the pixels that are read.
        end: Where to write; its rows are (B * OH * OW, K).
        turned: Exchange the channels of the weights, as the gradient of the input needs it.
    """
    w_k, w_c, chans_out = weight.stride(0), weight.stride(1), weight.shape[0]
    if turned:
        w_k, w_c, chans_out = w_c, w_k, weight.shape[1]
    args = _Args(
        *(x.shape[0], x.shape[2], x.shape[3], x.shape[1], x.permute(0, 2, 3, 1).flatten(0, 2).stride(0)),
        *(*out_size, chans_out, *stride, w_c, w_k, native.threads(), x.data_ptr(), weight.data_ptr(), end),
    )
    library = native.load(SOURCE)
    (library.product_float if x.dtype == torch.float32 else library.product_double)(ctypes.byref(args))


def main(batch: int = 32, rounds: int = 10) -> None:
    """Print milliseconds of the kernel and of torch's product for the layers of Res2Net-50 at 64 px, medians."""
    for chans, out_chans, side in ((64, 256, 16), (104, 256, 16), (256, 104, 16), (208, 512, 8)):
        x = torch.randn(batch, chans, side, side).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(out_chans, chans, 1, 1)
        y = torch.empty(batch * side * side, out_chans)
        rows = x.permute(0, 2, 3, 1).reshape(-1, chans)
        seconds: dict[str, list[float]] = {"kernel": [], "plain": []}
        for _ in range(rounds + 1):
            start = time.perf_counter()
            convolve(x, weight, (side, side), (1, 1), finish(y))
            after = time.perf_counter()
            torch.mm(rows, weight.flatten(1).t(), out=y)
            seconds["kernel"].append(after - start)
            seconds["plain"].append(time.perf_counter() - after)
        line = ", ".join(f"{name} {statistics.median(found[1:]) * 1e3:.2f}" for name, found in seconds.items())
        print(f"{chans} -> {out_chans}, {side} x {side}, batch {batch}, {torch.get_num_threads()} threads, ms: {line}")


if __name__ == "__main__":
    main()
