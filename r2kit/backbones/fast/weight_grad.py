"""Kernel: the gradient of a convolution's weights, over channels-last rows.

With x the rows (pixels) that went in and dy the gradient of the rows that came out, each tap (i, j) of the kernel has::

    dw[:, i, j, :] = sum over pixels p of  dy[p]^T x[p * stride - pad + (i, j) * dilation]

a product of two matrices whose common side is the pixels. One list of pairs of rows for each tap says which rows meet.
Pixels outside the image are simply not in the list: on small maps that is a good part of the work. Some pixels after
the others, two vectors of x are copied side by side, and so are the channels of dy that a tile takes: as they lie,
rows a power of two apart fall on each other in the first cache. A tile of the result stays in registers meanwhile. A
thread owns its tiles, so the sums do not depend on the order of threads. x may be some channels of a wider tensor, as
the splits of a Res2 unit are.

Only for float32, one group and at least `squares.NARROWEST` input channels. Reference: torch's own
`convolution_backward`. Benchmark: ``python -m r2kit.backbones.fast.weight_grad``.
"""

from __future__ import annotations

import ctypes
from functools import partial

import torch
from torch import Tensor

from r2kit.backbones.fast import lanes, memory, native
from r2kit.backbones.fast.squares import pixel_step
from r2kit.backbones.fast.stopwatch import milliseconds

SOURCE = (
    lanes.VECTORS
    + r"""
#include <algorithm>
#include <utility>

using V = VF;
constexpr int64_t L = width<float>;
#if defined(__AVX512F__)
constexpr int MR = 8;  // output channels of a tile, by two vectors: there are 32 registers
#else
constexpr int MR = 6;  // 12 sums, 2 vectors and a single value fill 16
#endif
constexpr int64_t CHUNK = 192;     // pixels: a panel of x and a tile's dy lie in the first cache together
constexpr int64_t W = 2 * L;       // a panel

struct Args {
  int64_t batch, height, width, chans, ldx;           // x: rows (batch, height, width) of `chans`
  int64_t out_height, out_width, out_chans, lddy;     // dy: likewise
  int64_t kernel_h, kernel_w, stride, pad, dilation, threads;
  const float *x, *dy;
  float* dw;                                          // (out_chans, kernel_h, kernel_w, chans)
};
struct Pair { int32_t x, dy; };

// dw (M rows of N vectors at `where`) = or += sum over k of dy[k][i] x[k]
template <int M, int N>
static void tile(const float* x, const float* dy, int64_t count, const int64_t* where, const int64_t* skip, bool fresh,
                 float* dw, int64_t lddw) {
  V sum[M][N] = {};
  for (int64_t k = 0; k < count; k++) {
    V v[N];
#pragma GCC unroll 2
    for (int j = 0; j < N; j++) memcpy(&v[j], x + k * W + j * L, BYTES);
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 2
      for (int j = 0; j < N; j++) sum[i][j] += v[j] * dy[k * MR + i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 2
    for (int j = 0; j < N; j++) {
      float* out = dw + i * lddw + where[j];
      if (skip[j] == 0) {
        if (!fresh) {
          V old;
          memcpy(&old, out, BYTES);
          sum[i][j] += old;
        }
        memcpy(out, &sum[i][j], BYTES);
      } else {
        float lanes[L];
        memcpy(lanes, &sum[i][j], BYTES);
        for (int64_t l = skip[j]; l < L; l++) out[l] = fresh ? lanes[l] : out[l] + lanes[l];
      }
    }
}
using Tile = void (*)(const float*, const float*, int64_t, const int64_t*, const int64_t*, bool, float*, int64_t);
template <int N, int... M> static Tile pick(int64_t rows, std::integer_sequence<int, M...>) {
  static const Tile found[MR] = {tile<M + 1, N>...};
  return found[rows - 1];
}

// Channels from .. from + MR of some rows of dy, side by side. The last ones are read from further left, and what is
// too much lands behind what the row before has in use.
static void pack(const float* dy, const Pair* at, int64_t count, int64_t from, int64_t chans, float* out) {
  if (chans < MR) {
    for (int64_t k = 0; k < count; k++)
      for (int64_t i = 0; i < chans; i++) out[k * MR + i] = dy[at[k].dy + i];
    return;
  }
  const int64_t c = std::min(from, chans - MR);
  for (int64_t k = 0; k < count; k++) memcpy(out + k * MR - (from - c), dy + at[k].dy + c, MR * sizeof(float));
}

static inline void fetch(const float* from, const float* to) {
  for (; from < to; from += 16) __builtin_prefetch(from, 0, 2);  // a line of the cache
}

extern "C" void weight_grad_float(const Args* args) {
  using All = std::make_integer_sequence<int, MR>;
  const Args& a = *args;
  const int64_t taps = a.kernel_h * a.kernel_w, pixels = a.out_height * a.out_width;
  const int64_t group = pixels >= CHUNK ? 1 : (CHUNK + pixels - 1) / pixels;
  // For each tap the pairs of rows that meet, of `group` images; `upto[t][g]` of them belong to the first g images.
  std::vector<std::vector<Pair>> pairs(taps);
  std::vector<std::vector<int64_t>> upto(taps, std::vector<int64_t>(1, 0));
  for (int64_t t = 0; t < taps; t++)
    for (int64_t g = 0; g < group; g++) {
      for (int64_t oh = 0; oh < a.out_height; oh++) {
        int64_t h = oh * a.stride - a.pad + t / a.kernel_w * a.dilation;
        if (h < 0 || h >= a.height) continue;
        for (int64_t ow = 0; ow < a.out_width; ow++) {
          int64_t w = ow * a.stride - a.pad + t % a.kernel_w * a.dilation;
          if (w < 0 || w >= a.width) continue;
          pairs[t].push_back({int32_t(((g * a.height + h) * a.width + w) * a.ldx),
                              int32_t(((g * a.out_height + oh) * a.out_width + ow) * a.lddy)});
        }
      }
      upto[t].push_back(int64_t(pairs[t].size()));
    }
  std::vector<int64_t> where, skip;  // the last vector reaches back, and skips what the one before it has
  for (int64_t c = 0; c < a.chans; c += L) {
    where.push_back(c + L <= a.chans ? c : a.chans - L);
    skip.push_back(c - where.back());
  }
  const int64_t vectors = int64_t(where.size()), parts = (a.out_chans + MR - 1) / MR, items = taps * parts;
  // What no pixel meets, as taps beyond a small map, is zero.
  for (int64_t tap = 0; tap < taps; tap++)
    for (int64_t c = 0; pairs[tap].empty() && c < a.out_chans; c++)
      memset(a.dw + (c * taps + tap) * a.chans, 0, sizeof(float) * a.chans);
#pragma omp parallel num_threads(a.threads)
  {
    const int64_t t = omp_get_thread_num(), from = items * t / a.threads, to = items * (t + 1) / a.threads;
    Room<float> packed_x(CHUNK * W), packed_dy(MR + CHUNK * MR * std::min(to - from, parts));
    auto first = [&](int64_t part) { return a.out_chans * part / parts; };
    for (int64_t image = 0; image < a.batch; image += group) {
      const int64_t images = image + group <= a.batch ? group : a.batch - image;
      const float* x = a.x + image * a.height * a.width * a.ldx;
      const float* dy = a.dy + image * pixels * a.lddy;
      for (int64_t tap = from / parts; tap * parts < to; tap++) {
        const int64_t begin = std::max<int64_t>(from - tap * parts, 0), end = std::min(to - tap * parts, parts);
        for (int64_t start = 0; start < upto[tap][images]; start += CHUNK) {
          const Pair* at = pairs[tap].data() + start;
          const int64_t count = std::min(CHUNK, upto[tap][images] - start);
          for (int64_t part = begin; part < end; part++) {
            pack(dy, at, count, first(part), a.out_chans, packed_dy.data() + MR + (part - begin) * CHUNK * MR);
          }
          // While tiles are summed the rows of the next pixels are fetched, some behind each tile.
          const int64_t next = std::min(CHUNK, std::max<int64_t>(0, upto[tap][images] - start - CHUNK));
          const int64_t tiles = (vectors + 1) / 2 * (end - begin);
          int64_t done = 0;
          for (int64_t v = 0; v < vectors; v += 2) {
            const int64_t some = std::min<int64_t>(2, vectors - v);
            for (int64_t k = 0; k < count; k++)
              for (int64_t j = 0; j < some; j++) memcpy(&packed_x[k * W + j * L], x + at[k].x + where[v + j], BYTES);
            for (int64_t part = begin; part < end; part++) {
              const int64_t m = first(part + 1) - first(part);
              const auto sum = some == 2 ? pick<2>(m, All()) : pick<1>(m, All());
              sum(packed_x.data(), packed_dy.data() + MR + (part - begin) * CHUNK * MR, count, &where[v], &skip[v],
                  image == 0 && start == 0, a.dw + (first(part) * taps + tap) * a.chans, taps * a.chans);
              for (int64_t k = next * done / tiles; k < next * (done + 1) / tiles; k++) {
                fetch(x + at[CHUNK + k].x, x + at[CHUNK + k].x + a.chans);
                fetch(dy + at[CHUNK + k].dy + first(begin), dy + at[CHUNK + k].dy + first(end));
              }
              done++;
            }
          }
        }
      }
    }
  }
}
"""
)


class _Args(ctypes.Structure):
    """The struct of the same name in the source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "chans", "ldx")),
        *((name, ctypes.c_int64) for name in ("out_height", "out_width", "out_chans", "lddy")),
        *((name, ctypes.c_int64) for name in ("kernel_h", "kernel_w", "stride", "pad", "dilation", "threads")),
        *((name, ctypes.c_void_p) for name in ("x", "dy", "dw")),
    )


def weight_grad(x: Tensor, dy: Tensor, kernel: tuple[int, int], stride: int, pad: int, dilation: int) -> Tensor:
    """Return the gradient of the weights, (out_chans, chans, *kernel) in channels-last memory.

    Args:
        x: (B, C, H, W) float32, channels-last; may be some channels of a wider tensor.
        dy: (B, K, OH, OW), likewise.
        kernel: Height and width of the kernel.
        stride: In both directions, as the next two.
        pad: Zeros around the image.
        dilation: Distance of the taps.
    """
    dw = memory.empty(x, (dy.shape[1], x.shape[1], *kernel))
    args = _Args(
        *(x.shape[0], x.shape[2], x.shape[3], x.shape[1], pixel_step(x)),
        *(dy.shape[2], dy.shape[3], dy.shape[1], pixel_step(dy)),
        *(*kernel, stride, pad, dilation, native.threads()),
        *(x.data_ptr(), dy.data_ptr(), dw.data_ptr()),
    )
    native.call(SOURCE, "weight_grad", x.dtype, args)
    return dw


def plain(x: Tensor, dy: Tensor, kernel: tuple[int, int], stride: int, pad: int, dilation: int) -> Tensor:
    """Return the same by torch's own operator: what the kernel is compared with."""
    weight = x.new_empty(dy.shape[1], x.shape[1], *kernel)
    mask = (False, True, False)
    grads = torch.ops.aten.convolution_backward(
        dy, x, weight, None, (stride,) * 2, (pad,) * 2, (dilation,) * 2, False, (0, 0), 1, mask
    )
    return grads[1]


def main(batch: int = 32, rounds: int = 10) -> None:
    """Print milliseconds of the kernel and of torch's operator for the layers of Res2Net-50 at 64 px, medians."""
    for chans, side in ((26, 16), (52, 8), (104, 4), (208, 2)):
        x = torch.randn(batch, chans, side, side).contiguous(memory_format=torch.channels_last)
        dy = torch.randn_like(x)
        given = (x, dy, (3, 3), 1, 1, 1)
        forms = {"kernel": partial(weight_grad, *given), "plain": partial(plain, *given)}
        line = milliseconds(forms, rounds)
        print(f"{chans} channels, {side} x {side}, batch {batch}, {torch.get_num_threads()} threads, ms: {line}")


if __name__ == "__main__":
    main()
