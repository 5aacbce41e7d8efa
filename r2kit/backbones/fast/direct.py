"""Kernel: a convolution as a sum over its taps, and the gradient of its input, over channels-last rows.

Each pixel written is a sum over taps of the row that a tap reads times that tap's matrix. Forward, pixel (h, w) reads
with tap (i, j) the row (h s - pad + i, w s - pad + j) with a stride of s. For the gradient of the input it reads, of
the rows of dy, ((h + pad - i) / s, (w + pad - j) / s) where that is whole: of 3 x 3 taps and a stride of two one, two
or four, the same ones for all pixels whose h and w leave the same remainders. Those are a class; forward there is one
class with every tap. The weights are packed into panels; a tile of the product takes rows of one class and runs over
its taps without a copy of what they read: in place of a pixel beyond the image stands a row of zeros. The sums of a
block of rows go, one whole row after the other, through `Finish` to where they belong; sums that are wanted as they are
go there from the tile, or are added to what is there.

What it is used for: strided convolutions, and 1x1 convolutions, which are products of matrices, of up to `widest`
channels: where a library's packing of both sides costs more than it gives.

Only for one group and dilation 1. Reference: torch's `conv2d` and `convolution_backward`. Benchmark:
``python -m r2kit.backbones.fast.direct``.
"""

from __future__ import annotations

import ctypes
import sys
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
  int64_t batch, height, width, chans, ldx;            // x: rows (batch, height, width) of `chans`
  int64_t out_height, out_width, out_chans;
  int64_t taps_h, taps_w, stride_h, stride_w, pad_h, pad_w;
  int64_t back;                                        // whether x is dy, and what is written the input's gradient
  int64_t adds;                                        // whether the sums, as they are, are added to finish.y
  int64_t w_h, w_w, w_c, w_k;     // weight of tap (i, j) from c to k: w[i w_h + j w_w + c w_c + k w_k]
  int64_t threads;
  const void *x, *w;
  Finish finish;
};
constexpr int64_t SUMS = 32 * 1024;  // values that the sums of a block of rows may take
constexpr int64_t MOST = 16 * MR;   // rows of a block

// The pixels whose coordinates leave one pair of remainders, and the taps that they read with.
struct Class {
  int64_t step_h, step_w, first_h, first_w, tall, across;
  std::vector<int64_t> taps;

  Class(const Args& a, int64_t h, int64_t w)
      : step_h(a.back ? a.stride_h : 1), step_w(a.back ? a.stride_w : 1), first_h(h), first_w(w) {
    tall = (a.out_height - h + step_h - 1) / step_h;
    across = (a.out_width - w + step_w - 1) / step_w;
    for (int64_t tap = 0; tap < a.taps_h * a.taps_w; tap++)
      if (!a.back || ((h + a.pad_h - tap / a.taps_w) % a.stride_h == 0 &&
                      (w + a.pad_w - tap % a.taps_w) % a.stride_w == 0))
        taps.push_back(tap);
  }
};

// Write or add the sums of a tile where they belong, channels `from` and on of the output's rows `row`.
template <class T> static void place(const Args& a, const T* const* at, const int64_t* where, int64_t segments,
                                     const T* b, const int64_t* row, int64_t rows, int64_t from) {
  constexpr int64_t W = panel<T>;
  const int64_t chans = std::min(W, a.out_chans - from);
  T* to[MR];
  for (int64_t i = 0; i < rows; i++) to[i] = (T*)a.finish.y + row[i] * a.finish.ldy + from;
  if (chans % width<T> == 0) {
    tile_to_of<T>(rows, chans, a.adds)(at, where, segments, a.chans, b, to);
    return;
  }
  T part[MR * W];
  tile_of<T>(rows, chans)(at, where, segments, a.chans, b, part, W);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < chans; j++) to[i][j] = a.adds ? to[i][j] + part[i * W + j] : part[i * W + j];
}

template <class T> static void run(const Args& a) {
  const int64_t W = panel<T>, panels = (a.out_chans + W - 1) / W, taps = a.taps_h * a.taps_w;
  const Ready<T> ready(a.finish, a.out_chans);
  const std::vector<T> zeros(a.chans, T(0));
  std::vector<Class> classes;
  for (int64_t h = 0; h < (a.back ? std::min(a.stride_h, a.out_height) : 1); h++)
    for (int64_t w = 0; w < (a.back ? std::min(a.stride_w, a.out_width) : 1); w++) classes.emplace_back(a, h, w);
  const bool as_they_are = a.finish.order == 0 && !a.finish.offset && !a.finish.y2;
  // Threads share the rows, or the columns where there are few rows.
  const bool by_rows = a.batch * a.out_height * a.out_width >= 1024;
#pragma omp parallel num_threads(a.threads)
  {
    const int64_t n = omp_get_num_threads(), t = omp_get_thread_num();
    const int64_t first = by_rows ? 0 : panels * t / n, last = by_rows ? panels : panels * (t + 1) / n;
    const int64_t wide = (last - first) * W, chans = std::min(a.out_chans - first * W, wide);
    const int64_t step = taps * a.chans * W;
    const int64_t fits = as_they_are ? MOST : SUMS / std::max(wide, W) / MR * MR;
    const int64_t block = std::min(MOST, std::max(MR, fits));
    T *b = kept<T, 0>((last - first) * step + 4 * W), *sums = kept<T, 1>(block * wide);
    std::vector<int64_t> where(taps);
    std::vector<const T*> at(block * taps);
    for (int64_t k = 0; k < wide; k += 4)
      for (int64_t tap = 0; tap < taps; tap++)
        for (int64_t c = 0; c < a.chans; c += 4) {
          typename Four<T>::V four[4];
          const T* w = (const T*)a.w + tap / a.taps_w * a.w_h + tap % a.taps_w * a.w_w + c * a.w_c;
          fetch<T>(w + (first * W + k) * a.w_k, a.w_c, a.w_k, a.chans - c, chans - k, four);
          for (int64_t i = 0; i < 4 && c + i < a.chans; i++)
            memcpy(b + k / W * step + (tap * a.chans + c + i) * W + k % W, &four[i], sizeof(four[i]));
        }
    for (const Class& part : classes) {
      const int64_t total = a.batch * part.tall * part.across, segments = int64_t(part.taps.size());
      const int64_t groups = (total + MR - 1) / MR;
      const int64_t from = by_rows ? groups * t / n * MR : 0;
      const int64_t to = by_rows ? std::min(total, groups * (t + 1) / n * MR) : total;
      for (int64_t q = 0; q < segments; q++) where[q] = part.taps[q] * a.chans * W;
      if (a.adds && segments == 0) continue;
      for (int64_t r0 = from; r0 < to && wide; r0 += block) {
        const int64_t count = std::min(block, to - r0);
        int64_t row[MOST];
        for (int64_t i = 0; i < count; i++) {
          const int64_t r = r0 + i, image = r / (part.tall * part.across);
          const int64_t h = r / part.across % part.tall * part.step_h + part.first_h;
          const int64_t w = r % part.across * part.step_w + part.first_w;
          row[i] = (image * a.out_height + h) * a.out_width + w;
          for (int64_t q = 0; q < segments; q++) {
            const int64_t ti = part.taps[q] / a.taps_w, tj = part.taps[q] % a.taps_w;
            const int64_t y = a.back ? (h + a.pad_h - ti) / a.stride_h : h * a.stride_h - a.pad_h + ti;
            const int64_t x = a.back ? (w + a.pad_w - tj) / a.stride_w : w * a.stride_w - a.pad_w + tj;
            const bool above = a.back && (h + a.pad_h < ti || w + a.pad_w < tj);  // division would round to zero
            const bool inside = !above && y >= 0 && y < a.height && x >= 0 && x < a.width;
            at[(i / MR * segments + q) * MR + i % MR] =
                inside ? (const T*)a.x + ((image * a.height + y) * a.width + x) * a.ldx : zeros.data();
          }
        }
        if (as_they_are) {
          for (int64_t p = 0; p < last - first; p++)
            for (int64_t i = 0; i < count; i += MR)
              place<T>(a, at.data() + i * segments, where.data(), segments, b + p * step, row + i,
                       std::min(MR, count - i), (first + p) * W);
          continue;
        }
        for (int64_t p = 0; p < last - first; p++)
          for (int64_t i = 0; i < count; i += MR) {
            const auto sum = tile_of<T>(std::min(MR, count - i), chans - p * W);
            sum(at.data() + i * segments, where.data(), segments, a.chans, b + p * step, sums + i * wide + p * W, wide);
          }
        for (int64_t i = 0; i < count; i++) ready.write(sums + i * wide, row[i], first * W, chans);
      }
    }
  }
}
extern "C" void direct_float(const Args* a) { run<float>(*a); }
extern "C" void direct_double(const Args* a) { run<double>(*a); }
"""
)


def widest(count: int) -> int:
    """Return the most input channels of a 1x1 convolution that this kernel is used for.

    With vectors of 64 bytes it gains at every width (AMD EPYC, Zen 4). With 32 it loses above, where a panel of weights
    is too large for the first cache, and earlier where few rows share the packing of the weights (Zen 3).

    Args:
        count: Pixels written, of all images.
    """
    if native.has_wide_vectors():
        return sys.maxsize
    return 512 if count >= 1024 else 256


class _Args(ctypes.Structure):
    """The struct of the same name in the source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "chans", "ldx")),
        *((name, ctypes.c_int64) for name in ("out_height", "out_width", "out_chans")),
        *(
            (name, ctypes.c_int64)
            for name in ("taps_h", "taps_w", "stride_h", "stride_w", "pad_h", "pad_w", "back", "adds")
        ),
        *((name, ctypes.c_int64) for name in ("w_h", "w_w", "w_c", "w_k", "threads")),
        ("x", ctypes.c_void_p),
        ("w", ctypes.c_void_p),
        ("finish", FinishArgs),
    )


def convolve(
    x: Tensor,
    weight: Tensor,
    out_size: tuple[int, int],
    stride: tuple[int, int],
    pad: tuple[int, int],
    end: FinishArgs,
    *,
    back: bool = False,
    adds: bool = False,
) -> None:
    """Do what `end` says with the sums of a convolution, or with the gradient of its input.

    Args:
        x: (B, C, H, W), channels-last; may be some channels of a wider tensor. With `back` the gradient of the output.
        weight: (K, C, I, J); with `back` (C, K, I, J).
        out_size: Height and width of what is written.
        stride: Of the convolution.
        pad: Zeros above and left of the convolution's input.
        end: Where to write; its rows are (B * OH * OW, K).
        back: Whether the gradient of the input is wanted.
        adds: Whether the sums are added to what stands there; only where `end` leaves them as they are.
    """
    w_k, w_c, w_h, w_w = weight.stride()
    chans_out = weight.shape[0]
    if back:
        w_k, w_c, chans_out = w_c, w_k, weight.shape[1]
    args = _Args(
        *(x.shape[0], x.shape[2], x.shape[3], x.shape[1], pixel_step(x), *out_size, chans_out),
        *(weight.shape[2], weight.shape[3], *stride, *pad, int(back), int(adds)),
        *(w_h, w_w, w_c, w_k, native.threads(), x.data_ptr(), weight.data_ptr(), end),
    )
    native.call(SOURCE, "direct", x.dtype, args)


def main(batch: int = 32, rounds: int = 10) -> None:
    """Print milliseconds of the kernel and of torch's operators for layers of Res2Net-50 at 64 px, medians."""
    for chans, out_chans, side, kernel, step in (
        *((64, 256, 16, 1, 1), (104, 256, 16, 1, 1), (256, 104, 16, 1, 1), (208, 512, 8, 1, 1)),
        *((52, 52, 16, 3, 2), (104, 104, 8, 3, 2), (208, 208, 4, 3, 2)),
    ):
        x = torch.randn(batch, chans, side, side).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(out_chans, chans, kernel, kernel).contiguous(memory_format=torch.channels_last)
        stride, pad = (step, step), (kernel // 2, kernel // 2)
        dy = torch.conv2d(x, weight, None, stride, pad)
        y, dx = torch.empty(dy.numel() // out_chans, out_chans), torch.empty(x.numel() // chans, chans)
        size, made = (side, side), (dy.shape[2], dy.shape[3])
        forms: dict[str, Callable[[], object]] = {
            "kernel": partial(convolve, x, weight, made, stride, pad, finish(y)),
            "plain": partial(torch.conv2d, x, weight, None, stride, pad),
            "kernel, input": partial(convolve, dy, weight, size, stride, pad, finish(dx), back=True),
            "plain, input": partial(
                torch.ops.aten.convolution_backward,
                *(dy, x, weight, None, stride, pad, (1, 1), False, (0, 0), 1, (True, False, False)),
            ),
        }
        what = f"{kernel}x{kernel}, {chans} -> {out_chans}, {side} x {side}, stride {step}, batch {batch}"
        print(f"{what}, {torch.get_num_threads()} threads, ms: {milliseconds(forms, rounds)}")


if __name__ == "__main__":
    main()
