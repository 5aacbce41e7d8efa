"""C++ that the kernels of convolutions share: a tile of a matrix product, and what becomes of a convolution's sums.

A tile is up to six rows times a panel of two vectors of columns, held in registers: twelve sums hide the latency of
the multiply-adds, and each step of the common side loads two vectors and six single values. `Finish` writes a row of
sums as it is, or with the BatchNorm (of fixed statistics) and the activation behind the convolution::

    act first:  y = act(sum + bias) * scale + shift
    otherwise:  y = act((sum + bias) * scale + shift + res)
    y2 = y + add                                               (the next split of a Res2 unit)

so that a network at inference reads and writes each map once.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from r2kit.backbones.fast import lanes
from r2kit.backbones.fast.norm_act import ACTS, Norm

TILES = (
    lanes.VECTORS
    + r"""
#include <algorithm>
#include <memory>

constexpr int64_t MR = 6, NR = 2;  // rows and vectors of a tile
template <class T> constexpr int64_t panel = NR * width<T>;

// y (M rows, one panel) = or += sum over segments of rows at[segment][i] times `count` packed rows, b + where[segment].
template <class T, int M> static void tile(const T* const* at, const int64_t* where, int64_t segments, int64_t count,
                                           const T* b, T* y, int64_t ldy, bool fresh) {
  constexpr int64_t L = width<T>;
  Vec<T> sum[M][NR];
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 2
    for (int j = 0; j < NR; j++) {
      sum[i][j] = Vec<T>{};
      if (!fresh) memcpy(&sum[i][j], y + i * ldy + j * L, BYTES);
    }
  for (int64_t s = 0; s < segments; s++) {
    const T* p[M];
    for (int i = 0; i < M; i++) p[i] = at[s * MR + i];
    const T* bs = b + where[s];
    for (int64_t k = 0; k < count; k++) {
      Vec<T> v[NR];
#pragma GCC unroll 2
      for (int j = 0; j < NR; j++) memcpy(&v[j], bs + (k * NR + j) * L, BYTES);
#pragma GCC unroll 8
      for (int i = 0; i < M; i++)
#pragma GCC unroll 2
        for (int j = 0; j < NR; j++) sum[i][j] += v[j] * p[i][k];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 2
    for (int j = 0; j < NR; j++) memcpy(y + i * ldy + j * L, &sum[i][j], BYTES);
}
template <class T> using Tile = void (*)(const T* const*, const int64_t*, int64_t, int64_t, const T*, T*, int64_t,
                                         bool);
template <class T> static Tile<T> tile_of(int64_t rows) {
  static const Tile<T> found[MR] = {tile<T, 1>, tile<T, 2>, tile<T, 3>, tile<T, 4>, tile<T, 5>, tile<T, 6>};
  return found[rows - 1];
}

// 4 x 4 values with rows and columns exchanged.
template <class V> static inline void turn(V (&r)[4]) {
  V a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), b = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
  V c = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5), d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
  r[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
  r[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
  r[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
  r[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
}
typedef float F4 __attribute__((vector_size(16)));
typedef double D4 __attribute__((vector_size(32)));
template <class T> struct Four;
template <> struct Four<float> { using V = F4; };
template <> struct Four<double> { using V = D4; };

// out[k] = w[k * w_k + (0 .. 3) * w_n] for four k; zeros from `count` and `wide` on.
template <class T> static inline void fetch(const T* w, int64_t w_k, int64_t w_n, int64_t count, int64_t wide,
                                            typename Four<T>::V (&out)[4]) {
  if (count >= 4 && wide >= 4 && (w_k == 1 || w_n == 1)) {
    for (int i = 0; i < 4; i++) memcpy(&out[i], w + i * (w_n == 1 ? w_k : w_n), sizeof(out[i]));
    if (w_n != 1) turn(out);
    return;
  }
  for (int64_t k = 0; k < 4; k++)
    for (int64_t n = 0; n < 4; n++) out[k][n] = k < count && n < wide ? w[k * w_k + n * w_n] : T(0);
}

struct Finish {
  int64_t act, order;                // order: 0 sums as they are, 1 activation first, 2 activation last
  double beta;
  const void *bias, *scale, *shift;  // (chans) or null
  const void *res; int64_t ldres;
  const void *add; int64_t ldadd;
  void *y; int64_t ldy;              // or null, if there is y2
  void *y2; int64_t ldy2;            // or null
};
template <class T, int A, int ORDER> static void finish_row(const Finish& f, const T* sum, int64_t row, int64_t from,
                                                            int64_t count) {
  const T beta = T(f.beta);
  const int64_t n = std::min(width<T>, count), last = count - n;  // the last vector reaches back
  for (int64_t at = 0; at < count; at += width<T>) {
    const int64_t i = std::min(at, last), c = from + i;
    Vec<T> v = load(sum + i, n);
    if (f.bias) v += load((const T*)f.bias + c, n);
    if (ORDER == 1) v = act<A, T>(v, beta) * load((const T*)f.scale + c, n) + load((const T*)f.shift + c, n);
    if (ORDER == 2) {
      v = v * load((const T*)f.scale + c, n) + load((const T*)f.shift + c, n);
      if (f.res) v += load((const T*)f.res + row * f.ldres + c, n);
      v = act<A, T>(v, beta);
    }
    if (f.y) store((T*)f.y + row * f.ldy + c, v, n);
    if (f.y2) store((T*)f.y2 + row * f.ldy2 + c, v + load((const T*)f.add + row * f.ldadd + c, n), n);
  }
}
template <class T> using FinishRow = void (*)(const Finish&, const T*, int64_t, int64_t, int64_t);
template <class T> static FinishRow<T> finish_of(const Finish& f) {
  static const FinishRow<T> found[3][2] = {
    {finish_row<T, IDENTITY, 1>, finish_row<T, IDENTITY, 2>}, {finish_row<T, RELU, 1>, finish_row<T, RELU, 2>},
    {finish_row<T, MISH, 1>, finish_row<T, MISH, 2>}};
  return f.order == 0 ? finish_row<T, IDENTITY, 0> : found[f.act][f.order - 1];
}
"""
)


class FinishArgs(ctypes.Structure):
    """The struct `Finish` of the source."""

    keep: tuple[Tensor | None, ...]  # what it points at and nobody else may hold

    _fields_ = (
        ("act", ctypes.c_int64),
        ("order", ctypes.c_int64),
        ("beta", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("bias", "scale", "shift")),
        *(
            field
            for name in ("res", "add", "y", "y2")
            for field in ((name, ctypes.c_void_p), (f"ld{name}", ctypes.c_int64))
        ),
    )


def finish(
    y: Tensor | None,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    *,
    res: Tensor | None = None,
    add: Tensor | None = None,
    y2: Tensor | None = None,
) -> FinishArgs:
    """Return what is to become of the sums of a convolution. What is written must not overlap with what is read.

    Args:
        y: (R, C), written; or None if there is `y2`.
        bias: (C,), added to the sums.
        norm: With fixed statistics; None leaves the sums as they are.
        res: (R, C), added in front of the activation; only where that stands last.
        add: (R, C), with `y2`.
        y2: (R, C), ``y + add`` is written.
    """
    args = FinishArgs(beta=1.0)
    args.keep = (bias,)
    args.bias = None if bias is None else bias.data_ptr()
    if norm is not None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = torch.rsqrt(norm.running_var.double() + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = -norm.running_mean * scale
        if norm.bias is not None:
            shift = shift + norm.bias
        scale, shift = (t.detach().to(norm.running_mean.dtype) for t in (scale, shift))
        args.act, args.order, args.beta = ACTS[norm.act], 1 if norm.act_first else 2, norm.beta
        args.scale, args.shift = scale.data_ptr(), shift.data_ptr()
        args.keep = (bias, scale, shift)
    for name, tensor in (("res", res), ("add", add), ("y", y), ("y2", y2)):
        if tensor is not None:
            setattr(args, name, tensor.data_ptr())
            setattr(args, f"ld{name}", tensor.stride(0))
    return args
