"""Kernel: a 3x3 convolution with stride 1 by Winograd's minimal filtering, over channels-last rows.

The derivation is in `squares`: outputs in squares of 2 x 2 or 4 x 4, with 16 or 36 products for each pair of channels
in place of 36 or 144.

The gradient of the input is the same convolution with the kernel turned by 180 degrees and its channels exchanged.

Only for one group, stride and dilation 1, and at least a vector of channels. Reference: torch's `conv2d`. Benchmark:
``python -m r2kit.backbones.fast.winograd``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from r2kit.backbones.fast import native
from r2kit.backbones.fast.squares import SQUARES, Images, square_side
from r2kit.backbones.fast.stopwatch import milliseconds
from r2kit.backbones.fast.tile import FinishArgs, finish

SOURCE = (
    SQUARES
    + r"""
struct Args {
  Images in;
  int64_t out_chans, w_h, w_w, w_c, w_k;        // weight of tap (i, j) from c to k: w[i w_h + j w_w + c w_c + k w_k]
  int64_t threads, side;                        // side: M, 2 or 4
  const void* w;
  Finish finish;
};
constexpr int64_t ROOM = 48 * 1024;  // values that the transformed squares of a block may take, in and out
constexpr int64_t FEW = 64;          // squares; up to these many the kernel is what takes the room

// Pack the transformed kernel of channels c .. c + 3 to k .. k + 3: u + place * step is a panel's row of channel c.
template <class T, int M> static void transform_kernel(const Args& a, int64_t c, int64_t k, T* u, int64_t step) {
  using F = typename Four<T>::V;
  constexpr int N = M + 2;
  F g[3][3][4];
  const int64_t count = std::min<int64_t>(4, a.in.chans - c), wide = std::min<int64_t>(4, a.out_chans - k);
  const T* w = (const T*)a.w + c * a.w_c + k * a.w_k;
  for (int i = 0; i < 3; i++)
    for (int j = 0; j < 3; j++) fetch<T>(w + i * a.w_h + j * a.w_w, a.w_c, a.w_k, count, wide, g[i][j]);
  for (int64_t l = 0; l < count; l++) {
    F t[3][N], s[N];
    for (int j = 0; j < 3; j++) Line<M>::template kernel<T>(g[0][j][l], g[1][j][l], g[2][j][l], t[j]);
#pragma GCC unroll 6
    for (int i = 0; i < N; i++) {
      Line<M>::template kernel<T>(t[0][i], t[1][i], t[2][i], s);
      for (int j = 0; j < N; j++) memcpy(u + (i * N + j) * step + l * panel<T>, &s[j], sizeof(F));
    }
  }
}

// m[place * step_m + s * ldm] = one panel of the products of `count` squares with a panel of the kernel.
template <class T> static void multiply(int64_t places, int64_t count, int64_t chans, const T* v, int64_t step_v,
                                        const T* u, int64_t step_u, T* m, int64_t step_m, int64_t ldm,
                                        int64_t out_chans) {
  const int64_t start = 0;
  for (int64_t place = 0; place < places; place++)
    for (int64_t s = 0; s < count; s += MR) {
      const int64_t rows = std::min(MR, count - s);
      const T* at[MR];
      for (int64_t i = 0; i < rows; i++) at[i] = v + place * step_v + (s + i) * chans;
      tile_of<T>(rows, out_chans)(at, &start, 1, chans, u + place * step_u, m + place * step_m + s * ldm, ldm);
    }
}

// Many squares: each thread takes blocks of them through all panels of a kernel that is transformed once.
template <class T, int M> static void by_squares(const Args& a, const Squares<T, M>& squares, const Ready<T>& ready) {
  constexpr int64_t W = panel<T>, PLACES = (M + 2) * (M + 2);
  const int64_t panels = (a.out_chans + W - 1) / W, wide = panels * W;
  const int64_t fits = ROOM / (PLACES * (a.in.chans + wide)) / MR * MR, block = std::max<int64_t>(2 * MR, fits);
  const int64_t step_u = apart<T>(panels * a.in.chans * W), step_v = apart<T>(block * a.in.chans);
  const int64_t step_m = apart<T>(block * wide);
  T* u = kept<T, 0>(PLACES * step_u);
#pragma omp parallel num_threads(a.threads)
  {
    const int64_t n = omp_get_num_threads(), t = omp_get_thread_num(), quads = wide / 4;
    for (int64_t k = quads * t / n * 4; k < quads * (t + 1) / n * 4; k += 4)
      for (int64_t c = 0; c < a.in.chans; c += 4)
        transform_kernel<T, M>(a, c, k, u + (k / W * a.in.chans + c) * W + k % W, step_u);
    T *v = kept<T, 1>(PLACES * step_v), *m = kept<T, 2>(PLACES * step_m), *out = kept<T, 3>(M * M * wide);
#pragma omp barrier
    for (int64_t s0 = squares.count * t / n, end = squares.count * (t + 1) / n; s0 < end; s0 += block) {
      const int64_t count = std::min(block, end - s0);
      for (int64_t s = 0; s < count; s++) squares.read(s0 + s, v + s * a.in.chans, step_v);
      for (int64_t p = 0; p < panels; p++)
        multiply<T>(PLACES, count, a.in.chans, v, step_v, u + p * a.in.chans * W, step_u, m + p * W, step_m, wide,
                    a.out_chans - p * W);
      for (int64_t s = 0; s < count; s++)
        squares.write(s0 + s, m + s * wide, step_m, 0, a.out_chans, ready, out);
    }
  }
}

// Few squares and a large kernel: each thread takes panels of it through all squares, which are transformed once.
template <class T, int M> static void by_panels(const Args& a, const Squares<T, M>& squares, const Ready<T>& ready) {
  constexpr int64_t W = panel<T>, PLACES = (M + 2) * (M + 2);
  const int64_t panels = (a.out_chans + W - 1) / W, step_v = apart<T>(squares.count * a.in.chans);
  const int64_t step_u = apart<T>(a.in.chans * W), step_m = apart<T>(squares.count * W);
  T* v = kept<T, 1>(PLACES * step_v);
#pragma omp parallel num_threads(a.threads)
  {
    const int64_t n = omp_get_num_threads(), t = omp_get_thread_num();
    T *u = kept<T, 0>(PLACES * step_u), *m = kept<T, 2>(PLACES * step_m), *out = kept<T, 3>(M * M * W);
    for (int64_t s = squares.count * t / n; s < squares.count * (t + 1) / n; s++)
      squares.read(s, v + s * a.in.chans, step_v);
#pragma omp barrier
    for (int64_t p = panels * t / n; p < panels * (t + 1) / n; p++) {
      const int64_t chans = std::min(W, a.out_chans - p * W);
      for (int64_t k = 0; k < W; k += 4)
        for (int64_t c = 0; c < a.in.chans; c += 4) transform_kernel<T, M>(a, c, p * W + k, u + c * W + k, step_u);
      multiply<T>(PLACES, squares.count, a.in.chans, v, step_v, u, step_u, m, step_m, W, chans);
      for (int64_t s = 0; s < squares.count; s++)
        squares.write(s, m + s * W, step_m, p * W, chans, ready, out);
    }
  }
}

template <class T, int M> static void run(const Args& a) {
  const Squares<T, M> squares(a.in);
  const Ready<T> ready(a.finish, a.out_chans);
  const bool few = squares.count <= FEW && a.out_chans >= 3 * a.threads * panel<T>;
  (few ? by_panels<T, M> : by_squares<T, M>)(a, squares, ready);
}
extern "C" void winograd_float(const Args* a) { (a->side == 4 ? run<float, 4> : run<float, 2>)(*a); }
extern "C" void winograd_double(const Args* a) { (a->side == 4 ? run<double, 4> : run<double, 2>)(*a); }
"""
)


class _Args(ctypes.Structure):
    """The struct of the same name in the source."""

    _fields_ = (
        ("in", Images),
        *((name, ctypes.c_int64) for name in ("out_chans", "w_h", "w_w", "w_c", "w_k", "threads", "side")),
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
        x: (B, C, H, W), channels-last; may be some channels of a wider tensor. At least `squares.NARROWEST` channels.
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
    images = Images.of(x, out_size, pad)
    args = _Args(images, chans_out, w_h, w_w, w_c, w_k, native.threads(), square_side(out_size), start, end)
    native.call(SOURCE, "winograd", x.dtype, args)


def main(batch: int = 32, rounds: int = 10) -> None:
    """Print milliseconds of the kernel and of torch's operator for the layers of Res2Net-50 at 64 px, medians."""
    for chans, side in ((26, 16), (52, 8), (104, 4), (208, 2), (64, 32)):
        x = torch.randn(batch, chans, side, side).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(chans, chans, 3, 3).contiguous(memory_format=torch.channels_last)
        y = torch.empty(batch * side * side, chans)
        forms: dict[str, Callable[[], object]] = {
            "kernel": partial(convolve, x, weight, (side, side), (1, 1), finish(y)),
            "plain": partial(torch.conv2d, x, weight, None, 1, 1),
        }
        line = milliseconds(forms, rounds)
        print(f"{chans} channels, {side} x {side}, batch {batch}, {torch.get_num_threads()} threads, ms: {line}")


if __name__ == "__main__":
    main()
