"""Kernel: a 3x3 convolution with stride 1 by Winograd's minimal filtering, over channels-last rows.

Four outputs (a square of 2 x 2) need a 4 x 4 square d of the input and, done directly, 36 products for each pair of an
input and an output channel. With

    B^T = 1  0 -1  0     G =  1    0    0      A^T = 1  1  1  0
          0  1  1  0         1/2  1/2  1/2           0  1 -1 -1
          0 -1  1  0         1/2 -1/2  1/2
          0  1  0 -1          0    0    1

the same four are A^T ((G g G^T) * (B^T d B)) A, with * element by element: 16 products in place of 36, and for the rest
additions, which grow with the channels and not with their square. Summed over input channels the products are 16 matrix
products, one for each place of the 4 x 4 square. The constants are halves and ones, so that rounding stays near that of
the direct sum; in exact arithmetic the two are equal.

The gradient of the input is the same convolution with the kernel turned by 180 degrees and its channels exchanged.

Only for one group, stride and dilation 1, and at least a vector of channels. Source: Lavin and Gray 2015,
arXiv:1509.09308, sec. 4.1. Reference: torch's `conv2d`. Benchmark: ``python -m r2kit.backbones.fast.winograd``.
"""

from __future__ import annotations

import ctypes
import statistics
import time

import torch
from torch import Tensor

from r2kit.backbones.fast import native
from r2kit.backbones.fast.tile import TILES, FinishArgs, finish

SOURCE = (
    TILES
    + r"""
struct Args {
  int64_t batch, height, width, chans, ldx;     // x: rows (batch, height, width) of `chans`
  int64_t out_height, out_width, out_chans;
  int64_t pad_h, pad_w, w_h, w_w, w_c, w_k;     // weight of tap (i, j) from c to k: w[i w_h + j w_w + c w_c + k w_k]
  int64_t threads;
  const void *x, *w;
  Finish finish;
};
constexpr int64_t ROOM = 48 * 1024;  // values that the transformed squares of a block may take, in and out

// Pack the transformed kernel of input channels c .. c + 3 and output channels k .. k + 3 into panels, u[place][panel].
template <class T> static void transform_kernel(const Args& a, int64_t c, int64_t k, T* u, int64_t panels) {
  using F = typename Four<T>::V;
  F g[3][3][4];
  const int64_t count = std::min<int64_t>(4, a.chans - c), wide = std::min<int64_t>(4, a.out_chans - k);
  const T* w = (const T*)a.w + c * a.w_c + k * a.w_k;
  for (int i = 0; i < 3; i++)
    for (int j = 0; j < 3; j++) fetch<T>(w + i * a.w_h + j * a.w_w, a.w_c, a.w_k, count, wide, g[i][j]);
  for (int64_t l = 0; l < count; l++) {
    F t[4][3];
    for (int j = 0; j < 3; j++) {
      F g0 = g[0][j][l], g1 = g[1][j][l], g2 = g[2][j][l];
      t[0][j] = g0;
      t[1][j] = (g0 + g1 + g2) * T(0.5);
      t[2][j] = (g0 - g1 + g2) * T(0.5);
      t[3][j] = g2;
    }
    for (int i = 0; i < 4; i++) {
      F s[4] = {t[i][0], (t[i][0] + t[i][1] + t[i][2]) * T(0.5), (t[i][0] - t[i][1] + t[i][2]) * T(0.5), t[i][2]};
      for (int j = 0; j < 4; j++) {
        T* to = u + (((i * 4 + j) * panels + k / panel<T>) * a.chans + c + l) * panel<T> + k % panel<T>;
        memcpy(to, &s[j], sizeof(F));
      }
    }
  }
}

// v[place * step + c] of one square; `from` are its 16 pixels.
template <class T> static void transform_input(const T* const* from, int64_t chans, T* v, int64_t step) {
  using V = Vec<T>;
  const int64_t L = width<T>;
  for (int64_t at = 0; at < chans; at += L) {
    const int64_t c = std::min(at, chans - L);  // the last vector reaches back
    V d[4][4], t[4][4];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) memcpy(&d[i / 4][i % 4], from[i] + c, BYTES);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      t[0][j] = d[0][j] - d[2][j];
      t[1][j] = d[1][j] + d[2][j];
      t[2][j] = d[2][j] - d[1][j];
      t[3][j] = d[1][j] - d[3][j];
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      V s[4] = {t[i][0] - t[i][2], t[i][1] + t[i][2], t[i][2] - t[i][1], t[i][1] - t[i][3]};
      for (int j = 0; j < 4; j++) memcpy(v + (i * 4 + j) * step + c, &s[j], BYTES);
    }
  }
}

// out[pixel][k] of the 2 x 2 pixels of one square, `chans` a whole number of vectors.
template <class T> static void transform_output(const T* m, int64_t step, int64_t chans, T* out) {
  using V = Vec<T>;
  for (int64_t k = 0; k < chans; k += width<T>) {
    V d[4][4], t[2][4];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) memcpy(&d[i / 4][i % 4], m + i * step + k, BYTES);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      t[0][j] = d[0][j] + d[1][j] + d[2][j];
      t[1][j] = d[1][j] - d[2][j] - d[3][j];
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      V s[2] = {t[i][0] + t[i][1] + t[i][2], t[i][1] - t[i][2] - t[i][3]};
      for (int j = 0; j < 2; j++) memcpy(out + (i * 2 + j) * chans + k, &s[j], BYTES);
    }
  }
}

// Distance of two places: an odd number of the cache's lines, so that one square's sixteen do not fall on each other.
template <class T> static int64_t apart(int64_t count) {
  const int64_t line = 64 / sizeof(T);
  return ((count + line - 1) / line | 1) * line;
}

template <class T> static void run(const Args& a) {
  const int64_t W = panel<T>, panels = (a.out_chans + W - 1) / W, wide = panels * W;
  const int64_t tall = (a.out_height + 1) / 2, across = (a.out_width + 1) / 2, squares = a.batch * tall * across;
  const int64_t fits = ROOM / (16 * (a.chans + wide)) / MR * MR, block = std::max<int64_t>(2 * MR, fits);
  const Ready<T> ready(a.finish, a.out_chans);
  const int64_t step_v = apart<T>(block * a.chans), step_m = apart<T>(block * wide);
  std::vector<T> zeros(a.chans, T(0));
  T* u = kept<T, 0>(16 * panels * a.chans * W);
#pragma omp parallel num_threads(a.threads)
  {
    const int64_t n = omp_get_num_threads(), t = omp_get_thread_num();
    const int64_t quads = wide / 4;
    for (int64_t q = quads * t / n; q < quads * (t + 1) / n; q++)
      for (int64_t c = 0; c < a.chans; c += 4) transform_kernel<T>(a, c, q * 4, u, panels);
    T *v = kept<T, 1>(16 * step_v), *m = kept<T, 2>(16 * step_m), *out = kept<T, 3>(4 * wide);
#pragma omp barrier
    for (int64_t s0 = squares * t / n, end = squares * (t + 1) / n; s0 < end; s0 += block) {
      const int64_t count = std::min(block, end - s0);
      for (int64_t s = 0; s < count; s++) {
        const int64_t image = (s0 + s) / (tall * across), h = (s0 + s) / across % tall * 2, w = (s0 + s) % across * 2;
        const T* from[16];
        for (int i = 0; i < 16; i++) {
          const int64_t y = h + i / 4 - a.pad_h, x = w + i % 4 - a.pad_w;
          const bool inside = y >= 0 && y < a.height && x >= 0 && x < a.width;
          from[i] = inside ? (const T*)a.x + ((image * a.height + y) * a.width + x) * a.ldx : zeros.data();
        }
        transform_input<T>(from, a.chans, v + s * a.chans, step_v);
      }
      for (int64_t place = 0; place < 16; place++)
        for (int64_t p = 0; p < panels; p++)
          for (int64_t s = 0; s < count; s += MR) {
            const int64_t rows = std::min(MR, count - s), start = 0;
            const T* at[MR];
            for (int64_t i = 0; i < rows; i++) at[i] = v + place * step_v + (s + i) * a.chans;
            tile_of<T>(rows)(at, &start, 1, a.chans, u + (place * panels + p) * a.chans * W,
                             m + place * step_m + s * wide + p * W, wide, true);
          }
      for (int64_t s = 0; s < count; s++) {
        const int64_t image = (s0 + s) / (tall * across), h = (s0 + s) / across % tall * 2, w = (s0 + s) % across * 2;
        transform_output<T>(m + s * wide, step_m, wide, out);
        for (int64_t i = 0; i < 4; i++)
          if (h + i / 2 < a.out_height && w + i % 2 < a.out_width)
            ready.write(out + i * wide, (image * a.out_height + h + i / 2) * a.out_width + w + i % 2, 0, a.out_chans);
      }
    }
  }
}
extern "C" void winograd_float(const Args* a) { run<float>(*a); }
extern "C" void winograd_double(const Args* a) { run<double>(*a); }
"""
)

NARROWEST = 16  # lanes of the widest vector


class _Args(ctypes.Structure):
    """The struct of the same name in the source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "chans", "ldx")),
        *((name, ctypes.c_int64) for name in ("out_height", "out_width", "out_chans", "pad_h", "pad_w")),
        *((name, ctypes.c_int64) for name in ("w_h", "w_w", "w_c", "w_k", "threads")),
        ("x", ctypes.c_void_p),
        ("w", ctypes.c_void_p),
        ("finish", FinishArgs),
    )


def convolve(
    x: Tensor,
    weight: Tensor,
    out_size: tuple[int, int],
    pad: tuple[int, int],
    end: FinishArgs,
    *,
    turned: bool = False,
) -> None:
    """Do what `end` says with the sums of a 3x3 convolution.

    Args:
        x: (B, C, H, W), channels-last; may be some channels of a wider tensor. At least `NARROWEST` channels.
        weight: (K, C, 3, 3); with `turned` (C, K, 3, 3).
        out_size: Height and width of the output.
        pad: Zeros above and left of the image; below and right there are as many as the output needs.
        end: Where to write; its rows are (B * OH * OW, K).
        turned: Exchange the channels of the kernel and turn it by 180 degrees, as the gradient of the input needs it.
    """
    w_k, w_c, w_h, w_w = weight.stride()
    start = weight.data_ptr()
    chans_out = weight.shape[0]
    if turned:
        w_k, w_c, chans_out = w_c, w_k, weight.shape[1]
        start += 2 * (w_h + w_w) * weight.element_size()
        w_h, w_w = -w_h, -w_w
    args = _Args(
        *(x.shape[0], x.shape[2], x.shape[3], x.shape[1], x.permute(0, 2, 3, 1).flatten(0, 2).stride(0)),
        *(*out_size, chans_out, *pad, w_h, w_w, w_c, w_k, native.threads(), x.data_ptr(), start, end),
    )
    library = native.load(SOURCE)
    (library.winograd_float if x.dtype == torch.float32 else library.winograd_double)(ctypes.byref(args))


def main(batch: int = 32, rounds: int = 10) -> None:
    """Print milliseconds of the kernel and of torch's operator for the layers of Res2Net-50 at 64 px, medians."""
    for chans, side in ((26, 16), (52, 8), (104, 4), (208, 2), (64, 32)):
        x = torch.randn(batch, chans, side, side).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(chans, chans, 3, 3).contiguous(memory_format=torch.channels_last)
        y = torch.empty(batch * side * side, chans)
        seconds: dict[str, list[float]] = {"kernel": [], "plain": []}
        for _ in range(rounds + 1):
            start = time.perf_counter()
            convolve(x, weight, (side, side), (1, 1), finish(y))
            after = time.perf_counter()
            torch.conv2d(x, weight, None, 1, 1)
            seconds["kernel"].append(after - start)
            seconds["plain"].append(time.perf_counter() - after)
        line = ", ".join(f"{name} {statistics.median(found[1:]) * 1e3:.2f}" for name, found in seconds.items())
        print(f"{chans} channels, {side} x {side}, batch {batch}, {torch.get_num_threads()} threads, ms: {line}")


if __name__ == "__main__":
    main()
