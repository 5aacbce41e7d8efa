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

from torch import Tensor

from r2kit.backbones.fast import lanes
from r2kit.backbones.fast.norm_act import ACTS, Norm, start

TILES = (
    lanes.VECTORS
    + r"""
#include <algorithm>
#include <memory>
#include <utility>

#if defined(__AVX512F__)
constexpr int64_t MR = 8, NR = 2;  // rows and vectors of a tile
#else
constexpr int64_t MR = 6, NR = 2;
#endif
template <class T> constexpr int64_t panel = NR * width<T>;

// sum (M rows, N vectors) = sum over segments of rows at[segment][i] times `count` packed rows, b + where[segment].
template <class T, int M, int N> static inline void sum_up(const T* const* at, const int64_t* where, int64_t segments,
                                                           int64_t count, const T* b, Vec<T> (&sum)[M][N]) {
  constexpr int64_t L = width<T>;
  for (int64_t s = 0; s < segments; s++) {
    const T* p[M];
    for (int i = 0; i < M; i++) p[i] = at[s * MR + i];
    const T* bs = b + where[s];
    for (int64_t k = 0; k < count; k++) {
      Vec<T> v[N];
#pragma GCC unroll 2
      for (int j = 0; j < N; j++) memcpy(&v[j], bs + (k * NR + j) * L, BYTES);
#pragma GCC unroll 16
      for (int i = 0; i < M; i++)
#pragma GCC unroll 2
        for (int j = 0; j < N; j++) sum[i][j] += v[j] * p[i][k];
    }
  }
}
// The sums go to rows `ldy` apart, or each to its own place, where they are added to what is there if ADD.
template <class T, int M, int N> static void tile(const T* const* at, const int64_t* where, int64_t segments,
                                                  int64_t count, const T* b, T* y, int64_t ldy) {
  Vec<T> sum[M][N] = {};
  sum_up<T, M, N>(at, where, segments, count, b, sum);
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
#pragma GCC unroll 2
    for (int j = 0; j < N; j++) memcpy(y + i * ldy + j * width<T>, &sum[i][j], BYTES);
}
template <class T, int M, int N, bool ADD> static void tile_to(const T* const* at, const int64_t* where,
                                                               int64_t segments, int64_t count, const T* b,
                                                               T* const* y) {
  Vec<T> sum[M][N] = {};
  sum_up<T, M, N>(at, where, segments, count, b, sum);
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
#pragma GCC unroll 2
    for (int j = 0; j < N; j++) {
      T* to = y[i] + j * width<T>;
      if (ADD) {
        Vec<T> old;
        memcpy(&old, to, BYTES);
        sum[i][j] += old;
      }
      memcpy(to, &sum[i][j], BYTES);
    }
}
template <class T> using Tile = void (*)(const T* const*, const int64_t*, int64_t, int64_t, const T*, T*, int64_t);
template <class T> using TileTo = void (*)(const T* const*, const int64_t*, int64_t, int64_t, const T*, T* const*);
template <class T, int N, int... M> static Tile<T> pick(int64_t rows, std::integer_sequence<int, M...>) {
  static const Tile<T> found[MR] = {tile<T, M + 1, N>...};
  return found[rows - 1];
}
template <class T, int N, bool ADD, int... M> static TileTo<T> pick_to(int64_t rows, std::integer_sequence<int, M...>) {
  static const TileTo<T> found[MR] = {tile_to<T, M + 1, N, ADD>...};
  return found[rows - 1];
}
// The tile of `rows` rows that ends where `chans` channels end.
using AllRows = std::make_integer_sequence<int, int(MR)>;
template <class T> static Tile<T> tile_of(int64_t rows, int64_t chans) {
  return chans > width<T> ? pick<T, 2>(rows, AllRows()) : pick<T, 1>(rows, AllRows());
}
template <class T> static TileTo<T> tile_to_of(int64_t rows, int64_t chans, bool add) {
  if (chans > width<T>) return add ? pick_to<T, 2, true>(rows, AllRows()) : pick_to<T, 2, false>(rows, AllRows());
  return add ? pick_to<T, 1, true>(rows, AllRows()) : pick_to<T, 1, false>(rows, AllRows());
}

typedef float F4 __attribute__((vector_size(16)));
typedef double D4 __attribute__((vector_size(32)));
typedef int32_t I4 __attribute__((vector_size(16)));
typedef int64_t L4 __attribute__((vector_size(32)));
template <class T> struct Four;
template <> struct Four<float> { using V = F4; using Index = I4; };
template <> struct Four<double> { using V = D4; using Index = L4; };

#if defined(__clang__)
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // GCC knows the other name from 12 on
#define PICK(a, b, ...) __builtin_shuffle(a, b, typename Four<T>::Index{__VA_ARGS__})
#endif
// 4 x 4 values with rows and columns exchanged.
template <class T> static inline void turn(typename Four<T>::V (&r)[4]) {
  auto a = PICK(r[0], r[1], 0, 4, 1, 5), b = PICK(r[0], r[1], 2, 6, 3, 7);
  auto c = PICK(r[2], r[3], 0, 4, 1, 5), d = PICK(r[2], r[3], 2, 6, 3, 7);
  r[0] = PICK(a, c, 0, 1, 4, 5);
  r[1] = PICK(a, c, 2, 3, 6, 7);
  r[2] = PICK(b, d, 0, 1, 4, 5);
  r[3] = PICK(b, d, 2, 3, 6, 7);
}

// out[k] = w[k * w_k + (0 .. 3) * w_n] for four k; zeros from `count` and `wide` on.
template <class T> static inline void fetch(const T* w, int64_t w_k, int64_t w_n, int64_t count, int64_t wide,
                                            typename Four<T>::V (&out)[4]) {
  if (count >= 4 && wide >= 4 && (w_k == 1 || w_n == 1)) {
    for (int i = 0; i < 4; i++) memcpy(&out[i], w + i * (w_n == 1 ? w_k : w_n), sizeof(out[i]));
    if (w_n != 1) turn<T>(out);
    return;
  }
  for (int64_t k = 0; k < 4; k++)
    for (int64_t n = 0; n < 4; n++) out[k][n] = k < count && n < wide ? w[k * w_k + n * w_n] : T(0);
}

struct Finish {
  int64_t act, order;                // order: 0 sums as they are, 1 activation first, 2 activation last
  double beta, eps;
  const void *offset;                // (chans), bias of the convolution, or null
  const void *mean, *var;            // (chans)
  const void *weight, *bias;         // (chans) or null
  const void *res; int64_t ldres;
  const void *add; int64_t ldadd;
  void *y; int64_t ldy;              // or null, if there is y2
  void *y2; int64_t ldy2;            // or null
};
template <class T> struct Ready {
  const Finish& f;
  Room<T> offset, scale, shift;
  void (Ready::*row)(const T*, int64_t, int64_t, int64_t) const;

  Ready(const Finish& finish, int64_t chans) : f(finish), offset(chans), scale(chans), shift(chans) {
    for (int64_t c = 0; c < chans; c++) {
      if (f.offset) offset[c] = ((const T*)f.offset)[c];
      if (f.order == 0) continue;
      double m = ((const T*)f.mean)[c], v = ((const T*)f.var)[c];
      double r = (f.weight ? ((const T*)f.weight)[c] : 1.0) / std::sqrt(v + f.eps);
      scale[c] = T(r);
      shift[c] = T((f.bias ? ((const T*)f.bias)[c] : 0.0) - m * r);
    }
    row = f.order == 0 ? &Ready::go<IDENTITY, 0>
          : f.act == MISH ? (f.order == 1 ? &Ready::go<MISH, 1> : &Ready::go<MISH, 2>)
          : f.act == RELU ? (f.order == 1 ? &Ready::go<RELU, 1> : &Ready::go<RELU, 2>)
          : &Ready::go<IDENTITY, 1>;
    if (f.order == 2 && f.act == IDENTITY) row = &Ready::go<IDENTITY, 2>;
  }
  // Channels from .. from + count of one row.
  void write(const T* sum, int64_t at, int64_t from, int64_t count) const { (this->*row)(sum, at, from, count); }

  template <int A, int ORDER> void go(const T* sum, int64_t at, int64_t from, int64_t count) const {
    if (count >= width<T>) rows<A, ORDER, true>(sum, at, from, count);
    else rows<A, ORDER, false>(sum, at, from, count);
  }
  // Everything by value: what is read through a reference would be read again for every vector.
  template <int A, int ORDER, bool WIDE> inline void rows(const T* sum, int64_t at, int64_t from, int64_t count) const {
    const T beta = T(f.beta);
    const T *plus = &offset[from], *times = &scale[from], *then = &shift[from];
    const T* res = f.res ? (const T*)f.res + at * f.ldres + from : nullptr;
    const T* add = f.add ? (const T*)f.add + at * f.ldadd + from : nullptr;
    T* y = f.y ? (T*)f.y + at * f.ldy + from : nullptr;
    T* y2 = f.y2 ? (T*)f.y2 + at * f.ldy2 + from : nullptr;
    const int64_t n = WIDE ? width<T> : count;
    auto vector = [=](int64_t i) {
      Vec<T> v = load(sum + i, n) + load(plus + i, n);
      if (ORDER == 1) v = act<A, T>(v, beta) * load(times + i, n) + load(then + i, n);
      if (ORDER == 2) {
        v = v * load(times + i, n) + load(then + i, n);
        if (res) v += load(res + i, n);
        v = act<A, T>(v, beta);
      }
      if (y) store(y + i, v, n);
      if (y2) store(y2 + i, v + load(add + i, n), n);
    };
    for (int64_t i = 0; i + n <= count; i += n) vector(i);
    if (WIDE && count % n) vector(count - n);  // the last vector reaches back
  }
};

// Room for `count` values, kept by each thread from call to call: new pages cost more than what is computed in them.
// It begins with a line of the cache, so that no vector lies across two.
template <class T, int WHICH> static T* kept(int64_t count) {
  thread_local std::vector<T> room;
  const int64_t more = 64 / sizeof(T);
  if (int64_t(room.size()) < count + more) room.resize(count + more);
  return (T*)((uintptr_t(room.data()) + 63) / 64 * 64);
}
"""
)


class FinishArgs(ctypes.Structure):
    """The struct `Finish` of the source."""

    _fields_ = (
        ("act", ctypes.c_int64),
        ("order", ctypes.c_int64),
        ("beta", ctypes.c_double),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("offset", "mean", "var", "weight", "bias")),
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
    return FinishArgs(
        *((0, 0, 1.0, 0.0) if norm is None else (ACTS[norm.act], 1 if norm.act_first else 2, norm.beta, norm.eps)),
        start(bias),
        *((None,) * 4 if norm is None else map(start, (norm.running_mean, norm.running_var, norm.weight, norm.bias))),
        *(start(res), 0 if res is None else res.stride(0), start(add), 0 if add is None else add.stride(0)),
        *(start(y), 0 if y is None else y.stride(0), start(y2), 0 if y2 is None else y2.stride(0)),
    )
