"""Kernel: a 1x1 convolution of many channels, a product of matrices, without packing its weights.

A row of the output is y[r, k] = sum over c of x[r, c] w[k, c]. Both sides lie in memory with the common side innermost,
and a tile of the product wants one of them turned, so that a vector holds what belongs to one c. Elsewhere
(`direct`) that is the weights; where there are more of them than rows, and they are read from afar, it is less work to
turn the rows: a block of them is packed into panels, a panel's row holding one channel of as many pixels as two vectors
do, and the weights are read as they lie, a single value at a time, each once for a block of rows.

The common side is cut into pieces, so that a panel stays in the first cache while a group of tiles passes over it, and
their sums wait in the second. They come out with the pixels innermost, and are turned back on their way to `Finish`.
Each thread takes blocks of rows, or, where those are few, a part of the output channels of all rows.

Only for one group, stride 1 and weights whose input channels are innermost. Reference: a matrix product of torch's.
Benchmark: ``python -m r2kit.backbones.fast.product``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from r2kit.backbones.fast import native
from r2kit.backbones.fast.squares import pixel_step
from r2kit.backbones.fast.stopwatch import milliseconds
from r2kit.backbones.fast.tile import TILES, FinishArgs, finish

SOURCE = (
    TILES
    + r"""
struct Args {
  int64_t rows, chans, ldx, out_chans, ldw, threads;
  const void *x, *w;                 // (rows, chans), (out_chans, chans)
  Finish finish;
};
constexpr int64_t ROWS = 128;        // of a block
constexpr int64_t PIECE = 512;       // of the common side: a panel of floats is a first cache (32 kB) with AVX2
constexpr int64_t GROUP = 16;        // tiles whose sums wait together

// Panels of rows first .. last: b[panel][c][pixel], zeros behind the last row.
template <class T> static void pack(const Args& a, int64_t first, int64_t last, T* b) {
  constexpr int64_t W = panel<T>;
  for (int64_t r = first; r < last; r += W, b += a.chans * W)
    for (int64_t i = 0; i < W; i += 4)
      for (int64_t c = 0; c < a.chans; c += 4) {
        typename Four<T>::V four[4];
        fetch<T>((const T*)a.x + (r + i) * a.ldx + c, 1, a.ldx, a.chans - c, last - r - i, four);
        for (int64_t l = 0; l < 4 && c + l < a.chans; l++) memcpy(b + (c + l) * W + i, &four[l], sizeof(four[l]));
      }
}

// Finish channels from .. to of rows first .. last, packed in b.
template <class T> static void multiply(const Args& a, const Ready<T>& ready, int64_t first, int64_t last, int64_t from,
                                        int64_t to, const T* b) {
  constexpr int64_t W = panel<T>, L = width<T>;
  const int64_t panels = (last - first + W - 1) / W, zero = 0, pieces = (a.chans + PIECE - 1) / PIECE;
  T *sums = kept<T, 1>(GROUP * MR * ROWS + MR * W), *row = kept<T, 2>(GROUP * MR * W), *part = sums + GROUP * MR * ROWS;
  for (int64_t k0 = from; k0 < to; k0 += GROUP * MR) {
    const int64_t chans = std::min(GROUP * MR, to - k0);
    for (int64_t piece = 0; piece < pieces; piece++) {
      const int64_t c = a.chans * piece / pieces, count = a.chans * (piece + 1) / pieces - c;
      for (int64_t p = 0; p < panels; p++)
        for (int64_t k = 0; k < chans; k += MR) {
          const int64_t tall = std::min(MR, chans - k);
          const T* at[MR];
          for (int64_t i = 0; i < tall; i++) at[i] = (const T*)a.w + (k0 + k + i) * a.ldw + c;
          T* to_sums = sums + (p * GROUP * MR + k) * W;
          tile_of<T>(tall, W)(at, &zero, 1, count, b + (p * a.chans + c) * W, c ? part : to_sums, W);
          if (c)
            for (int64_t i = 0; i < tall * W; i += L) store(to_sums + i, load(to_sums + i, L) + load(part + i, L), L);
        }
    }
    for (int64_t p = 0; p < panels; p++) {
      const T* from_sums = sums + p * GROUP * MR * W;
      const int64_t pixels = std::min(W, last - first - p * W);
      for (int64_t k = 0; k < chans; k += 4)
        for (int64_t i = 0; i < pixels; i += 4) {
          typename Four<T>::V four[4];
          fetch<T>(from_sums + k * W + i, 1, W, 4, chans - k, four);
          for (int64_t l = 0; l < 4; l++) memcpy(row + (i + l) * GROUP * MR + k, &four[l], sizeof(four[l]));
        }
      for (int64_t i = 0; i < pixels; i++) ready.write(row + i * GROUP * MR, first + p * W + i, k0, chans);
    }
  }
}

template <class T> static void run(const Args& a) {
  constexpr int64_t W = panel<T>;
  const Ready<T> ready(a.finish, a.out_chans);
  const int64_t blocks = (a.rows + ROWS - 1) / ROWS;
  const bool shared = blocks % a.threads != 0 && blocks < 4 * a.threads;
  T* all = shared ? kept<T, 0>((a.rows + W - 1) / W * W * a.chans) : nullptr;
#pragma omp parallel num_threads(a.threads)
  {
    const int64_t n = omp_get_num_threads(), t = omp_get_thread_num();
    if (shared) {
      const int64_t panels = (a.rows + W - 1) / W, p = panels * t / n, end = panels * (t + 1) / n;
      pack<T>(a, p * W, std::min(a.rows, end * W), all + p * W * a.chans);
#pragma omp barrier
      const int64_t groups = (a.out_chans + MR - 1) / MR;
      const int64_t from = groups * t / n * MR, to = std::min(a.out_chans, groups * (t + 1) / n * MR);
      for (int64_t r = 0; r < a.rows; r += ROWS)
        multiply<T>(a, ready, r, std::min(a.rows, r + ROWS), from, to, all + r * a.chans);
    } else {
      T* mine = kept<T, 0>(ROWS * a.chans);
      for (int64_t block = blocks * t / n; block < blocks * (t + 1) / n; block++) {
        const int64_t first = block * ROWS, last = std::min(a.rows, first + ROWS);
        pack<T>(a, first, last, mine);
        multiply<T>(a, ready, first, last, 0, a.out_chans, mine);
      }
    }
  }
}
extern "C" void product_float(const Args* a) { run<float>(*a); }
extern "C" void product_double(const Args* a) { run<double>(*a); }
"""
)


class _Args(ctypes.Structure):
    """The struct of the same name in the source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "chans", "ldx", "out_chans", "ldw", "threads")),
        ("x", ctypes.c_void_p),
        ("w", ctypes.c_void_p),
        ("finish", FinishArgs),
    )


def convolve(x: Tensor, weight: Tensor, end: FinishArgs) -> None:
    """Do what `end` says with the sums of a 1x1 convolution.

    Args:
        x: (B, C, H, W), channels-last; may be some channels of a wider tensor.
        weight: (K, C, 1, 1), the input channels of an output channel side by side.
        end: Where to write; its rows are (B * H * W, K).
    """
    batch, chans, height, width = x.shape
    args = _Args(
        *(batch * height * width, chans, pixel_step(x), weight.shape[0], weight.stride(0), native.threads()),
        *(x.data_ptr(), weight.data_ptr(), end),
    )
    native.call(SOURCE, "product", x.dtype, args)


def main(batch: int = 32, rounds: int = 10) -> None:
    """Print milliseconds of the kernel and of torch's operator for the layers of Res2Net-50 at 64 px, medians."""
    for chans, out_chans, side in ((416, 1024, 4), (1024, 416, 4), (832, 2048, 2), (2048, 832, 2)):
        x = torch.randn(batch, chans, side, side).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(out_chans, chans, 1, 1)
        matrix, y = x.permute(0, 2, 3, 1).reshape(-1, chans), torch.empty(batch * side * side, out_chans)
        forms: dict[str, Callable[[], object]] = {
            "kernel": partial(convolve, x, weight, finish(y)),
            "plain": partial(torch.mm, matrix, weight.flatten(1).t(), out=y),
        }
        what = f"{chans} -> {out_chans}, {side} x {side}, batch {batch}"
        print(f"{what}, {torch.get_num_threads()} threads, ms: {milliseconds(forms, rounds)}")


if __name__ == "__main__":
    main()
