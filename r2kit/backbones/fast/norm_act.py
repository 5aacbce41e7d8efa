"""Kernel: an activation and a BatchNorm, in either order, with what stands around them, over channels-last rows.

Forward, over the rows (pixels) and channels of a convolution's output x::

    act_first:  y = act(x) * a + b          (Res2NetPlus)
    otherwise:  y = act(x * a + b + res)    (ResNet; `res` is the shortcut of a block)
    y2 = y + add                            (the next split of a Res2 unit)

with a = weight / sqrt(var + eps), b = bias - mean * a. It takes one pass for the statistics and one for the output; an
activation that stands first is left by the one where the other finds it, in the output's place. Backward keeps x alone,
where the plain modules keep the input of the normalisation and the input of the activation. With m what is normalised
(act(x) or x), d the gradient at the normalisation's output, n the rows, all sums over rows::

    dbias = sum d;  dweight = sum d (m - mean) / std
    dm = a (d - dbias / n - (m - mean) / std * dweight / n);  dx = dm * act'(x)  or  dm

again one pass for the sums and one for dx. Mish costs one exponential and one division: with e = exp(z) and
n = e (e + 2), tanh(softplus(z)) = ((1 + e)^2 - 1) / ((1 + e)^2 + 1) = n / (n + 2), and its derivative is
4 e (e + 1) / (n + 2)^2.

Reference: `plain`, the same in torch's operators. Benchmark: ``python -m r2kit.backbones.fast.norm_act``.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from r2kit.backbones.fast import lanes, memory, native

SOURCE = (
    lanes.VECTORS
    + r"""
struct Args {
  int64_t rows, chans, threads;
  int64_t act, act_first, batch;     // batch: statistics are those of the batch
  double beta, eps, momentum;
  const void *x; int64_t ldx;        // (rows, chans) convolution output
  const void *res; int64_t ldres;    // residual added in front of the activation, or null
  const void *add; int64_t ldadd;    // forward: y2 = y + add; backward: the gradient is dy + add
  const void *dy; int64_t lddy;
  void *y; int64_t ldy;              // forward: output; backward: gradient of x
  void *y2; int64_t ldy2;            // forward: y + add; backward: gradient of the residual
  void *mean, *var;                  // (chans) statistics of the batch (biased), written by forward
  const void *weight, *bias;         // (chans) or null
  void *running_mean, *running_var;  // (chans) or null
  void *dweight, *dbias;             // (chans)
};

// Sums over rows, per channel: floats over at most BLOCK rows, doubles over blocks, threads in their order.
constexpr int64_t BLOCK = 64;

template <class T> static inline int64_t slots(int64_t c) { return (c + width<T> - 1) / width<T>; }
// First channel of a slot: the last one overlaps the one before it rather than reaching over the row's end.
template <class T> static inline int64_t first(int64_t slot, int64_t c) {
  int64_t at = slot * width<T>;
  return at + width<T> <= c || c < width<T> ? at : c - width<T>;
}

// What a row function works with, by value: through references it would be read again for every vector.
template <class T> struct Rows {
  const T *x, *res, *add, *dy; T *y, *y2;
  int64_t ldx, ldres, ldadd, lddy, ldy, ldy2, chans;
  T beta;
  const T *scale, *shift, *mean, *offset, *factor;
  Rows(const Args& a)
      : x((const T*)a.x), res((const T*)a.res), add((const T*)a.add), dy((const T*)a.dy), y((T*)a.y), y2((T*)a.y2),
        ldx(a.ldx), ldres(a.ldres), ldadd(a.ldadd), lddy(a.lddy), ldy(a.ldy), ldy2(a.ldy2), chans(a.chans),
        beta(T(a.beta)), scale(nullptr), shift(nullptr), mean(nullptr), offset(nullptr), factor(nullptr) {}
};

// WIDE: a row has at least one vector.
template <class T, bool WIDE> static inline Vec<T> get(const T* p, int64_t chans) {
  return load(p, WIDE ? width<T> : chans);
}
template <class T, bool WIDE> static inline void put(T* p, Vec<T> v, int64_t chans) {
  store(p, v, WIDE ? width<T> : chans);
}

template <class T, class F> static void sum_rows(const Args& a, double* out1, double* out2, F row_sums) {
  const int64_t S = slots<T>(a.chans), L = width<T>, n = a.threads;
  std::vector<double> total(size_t(n) * 2 * S * L, 0.0);
#pragma omp parallel num_threads(n)
  {
    int64_t t = omp_get_thread_num(), from = a.rows * t / n, to = a.rows * (t + 1) / n;
    Room<T> part(2 * S * L);
    double* mine = total.data() + size_t(t) * 2 * S * L;
    for (int64_t r = from; r < to; r += BLOCK) {
      std::fill(part.data(), part.data() + 2 * S * L, T(0));
      row_sums(r, r + BLOCK < to ? r + BLOCK : to, part.data(), part.data() + S * L);
      for (int64_t i = 0; i < 2 * S * L; i++) mine[i] += part[i];
    }
  }
  int64_t lanes = a.chans < L ? a.chans : L;
  for (int64_t s = 0; s < S; s++)
    for (int64_t l = 0; l < lanes; l++) {
      double one = 0, two = 0;
      for (int64_t t = 0; t < n; t++) {
        one += total[size_t(t) * 2 * S * L + s * L + l];
        two += total[size_t(t) * 2 * S * L + (S + s) * L + l];
      }
      out1[first<T>(s, a.chans) + l] = one;
      out2[first<T>(s, a.chans) + l] = two;
    }
}

template <class T> struct Coefficients {
  Room<T> scale, shift, mean, rstd;
  Coefficients(const Args& a) : scale(a.chans), shift(a.chans), mean(a.chans), rstd(a.chans) {
    for (int64_t c = 0; c < a.chans; c++) {
      double m = ((const T*)(a.batch ? a.mean : a.running_mean))[c];
      double v = ((const T*)(a.batch ? a.var : a.running_var))[c];
      double r = 1.0 / std::sqrt(v + a.eps), w = a.weight ? ((const T*)a.weight)[c] : 1.0;
      mean[c] = T(m);
      rstd[c] = T(r);
      scale[c] = T(w * r);
      shift[c] = T((a.bias ? ((const T*)a.bias)[c] : 0.0) - m * w * r);
    }
  }
};

// Add rows from .. to, to two sums; `terms(r, c, k, one, two)` gives what a vector adds, with what `known(c, s)` gives.
// Of short rows some after the others, G vectors side by side, so that their sums and what is known of them stay in
// registers meanwhile; long ones whole, one after the other, as memory likes them.
constexpr int64_t TALL = 16, SHORT = 8;  // rows; vectors of a row
template <class T, int G, class K, class F>
static inline void add_some(int64_t from, int64_t to, int64_t chans, int64_t slot, T* sum, T* other, K known, F terms) {
  constexpr int64_t L = width<T>;
  decltype(known(int64_t(0), int64_t(0))) k[G];
  int64_t c[G];
  Vec<T> one[G], two[G];
#pragma GCC unroll 4
  for (int j = 0; j < G; j++) {
    c[j] = first<T>(slot + j, chans);
    k[j] = known(c[j], slot + j);
    one[j] = load(sum + (slot + j) * L, L);
    two[j] = load(other + (slot + j) * L, L);
  }
  for (int64_t r = from; r < to; r++)
#pragma GCC unroll 4
    for (int j = 0; j < G; j++) {
      Vec<T> more, also;
      terms(r, c[j], k[j], more, also);
      one[j] += more;
      two[j] += also;
    }
#pragma GCC unroll 4
  for (int j = 0; j < G; j++) {
    store(sum + (slot + j) * L, one[j], L);
    store(other + (slot + j) * L, two[j], L);
  }
}
template <class T, int A, class K, class F>
static inline void add_up(int64_t from, int64_t to, int64_t chans, T* sum, T* other, K known, F terms) {
  constexpr int G = BYTES < 64 || A == MISH ? 2 : 4;
  const int64_t S = slots<T>(chans), L = width<T>;
  if (S > SHORT) {
    for (int64_t r = from; r < to; r++)
      for (int64_t s = 0; s < S; s++) {
        const int64_t c = first<T>(s, chans);
        Vec<T> one, two;
        terms(r, c, known(c, s), one, two);
        store(sum + s * L, load(sum + s * L, L) + one, L);
        store(other + s * L, load(other + s * L, L) + two, L);
      }
    return;
  }
  for (int64_t r = from; r < to; r += TALL) {
    const int64_t end = r + TALL < to ? r + TALL : to;
    int64_t s = 0;
    for (; s + G <= S; s += G) add_some<T, G>(r, end, chans, s, sum, other, known, terms);
    for (; s < S; s++) add_some<T, 1>(r, end, chans, s, sum, other, known, terms);
  }
}

template <class T, int A, bool WIDE>
__attribute__((noinline)) static void moments(const Rows<T> k, const T* origin, int64_t from, int64_t to, T* sum,
                                              T* square) {
  add_up<T, A>(from, to, k.chans, sum, square,
    [=](int64_t, int64_t s) { return load(origin + s * width<T>, width<T>); },
    [=](int64_t r, int64_t c, const Vec<T>& origin, Vec<T>& one, Vec<T>& two) {
      one = act<A, T>(get<T, WIDE>(k.x + r * k.ldx + c, k.chans), k.beta);
      if (A != IDENTITY && k.y) put<T, WIDE>(k.y + r * k.ldy + c, one, k.chans);
      one -= origin;
      two = one * one;
    });
}

// The activations stay in `k.y`, if there is one.
template <class T, int A, bool WIDE> static void statistics(const Args& a, const Rows<T>& k) {
  const int64_t S = slots<T>(a.chans), L = width<T>, N = WIDE ? L : a.chans;
  Room<T> origin(S * L);  // sums of differences from one value lose nothing to a large mean
  for (int64_t s = 0; s < S; s++) store(&origin[s * L], act<A, T>(load(k.x + first<T>(s, a.chans), N), k.beta), L);
  std::vector<double> one(a.chans), two(a.chans);
  sum_rows<T>(a, one.data(), two.data(), [&](int64_t from, int64_t to, T* sum, T* square) {
    moments<T, A, WIDE>(k, origin.data(), from, to, sum, square);
  });
  for (int64_t s = 0; s < S; s++)
    for (int64_t l = 0; l < N; l++) {
      int64_t c = first<T>(s, a.chans) + l;
      double n = double(a.rows), d = one[c] / n, v = two[c] / n - d * d;
      double m = origin[s * L + l] + d;
      v = v > 0 ? v : (v == v ? 0 : v);
      ((T*)a.mean)[c] = T(m);
      ((T*)a.var)[c] = T(v);
    }
  if (a.running_mean)
    for (int64_t c = 0; c < a.chans; c++) {
      T *rm = (T*)a.running_mean + c, *rv = (T*)a.running_var + c;
      double n = double(a.rows);
      *rm = T((1 - a.momentum) * *rm + a.momentum * ((const T*)a.mean)[c]);
      *rv = T((1 - a.momentum) * *rv + a.momentum * ((const T*)a.var)[c] * (n / (n - 1)));
    }
}

// One row after the other; the last slot of a row is read before anything of the row is written, so that the output
// may be one of the inputs although slots overlap.
template <class T, bool WIDE, class Read, class Write>
static inline void each_row(int64_t from, int64_t to, int64_t chans, Read read, Write write) {
  const int64_t L = width<T>, whole = WIDE ? chans / L * L : 0, tail = WIDE ? chans - L : 0;
  for (int64_t r = from; r < to; r++) {
    auto last = read(r, tail);
    for (int64_t c = 0; c < whole; c += L) write(r, c, read(r, c));
    if (whole < chans) write(r, tail, last);
  }
}
template <class F> static void share_rows(const Args& a, F some) {
#pragma omp parallel num_threads(a.threads)
  {
    const int64_t t = omp_get_thread_num(), n = a.threads;
    some(a.rows * t / n, a.rows * (t + 1) / n);
  }
}

template <class T, int A, bool FIRST, bool WIDE>
__attribute__((noinline)) static void write_rows(const Rows<T> k, int64_t from, int64_t to) {
  using V = Vec<T>;
  struct In { V x, res, add; };
  each_row<T, WIDE>(from, to, k.chans,
    [=](int64_t r, int64_t c) {
      In v{get<T, WIDE>(k.x + r * k.ldx + c, k.chans), V{}, V{}};
      if (!FIRST && k.res) v.res = get<T, WIDE>(k.res + r * k.ldres + c, k.chans);
      if (k.add) v.add = get<T, WIDE>(k.add + r * k.ldadd + c, k.chans);
      return v;
    },
    [=](int64_t r, int64_t c, const In& v) {
      V scale = get<T, WIDE>(k.scale + c, k.chans), shift = get<T, WIDE>(k.shift + c, k.chans);
      V y = FIRST ? act<A, T>(v.x, k.beta) * scale + shift : act<A, T>(v.x * scale + shift + v.res, k.beta);
      if (k.y) put<T, WIDE>(k.y + r * k.ldy + c, y, k.chans);
      if (k.y2) put<T, WIDE>(k.y2 + r * k.ldy2 + c, y + v.add, k.chans);
    });
}

template <class T, int A, bool FIRST, bool WIDE> static void forward(const Args& a) {
  Rows<T> k(a), active(a);  // active: y holds, or shall hold, the activations
  if (!k.y) active.y = k.y2, active.ldy = k.ldy2;
  // Slots overlap, so that over x itself an activation would be that of an activation.
  if (!FIRST || A == IDENTITY || active.y == k.x) active.y = nullptr;
  if (a.batch) statistics<T, FIRST ? A : IDENTITY, WIDE>(a, active);
  const Coefficients<T> found(a);
  k.scale = found.scale.data();
  k.shift = found.shift.data();
  const bool known = a.batch && active.y;
  if (known) k.x = active.y, k.ldx = active.ldy;
  share_rows(a, [&](int64_t from, int64_t to) {
    (known ? write_rows<T, IDENTITY, FIRST, WIDE> : write_rows<T, A, FIRST, WIDE>)(k, from, to);
  });
}

template <class T, bool WIDE> static inline Vec<T> gradient(const Rows<T>& k, int64_t r, int64_t c) {
  Vec<T> d = get<T, WIDE>(k.dy + r * k.lddy + c, k.chans);
  return k.add ? d + get<T, WIDE>(k.add + r * k.ldadd + c, k.chans) : d;
}

// Sums of the gradient in front of the normalisation's output, and of its product with the centred input.
template <class T, int A, bool FIRST, bool WIDE>
__attribute__((noinline)) static void products(const Rows<T> k, int64_t from, int64_t to, T* sum, T* product) {
  struct Known { Vec<T> mean, scale, shift; };
  add_up<T, A>(from, to, k.chans, sum, product,
    [=](int64_t c, int64_t) {
      auto of = [=](const T* p) { return get<T, WIDE>(p + c, k.chans); };
      return Known{of(k.mean), of(k.scale), of(k.shift)};
    },
    [=](int64_t r, int64_t c, const Known& known, Vec<T>& one, Vec<T>& two) {
      const Vec<T> x = get<T, WIDE>(k.x + r * k.ldx + c, k.chans);
      one = gradient<T, WIDE>(k, r, c);
      if (FIRST) {
        two = one * (act<A, T>(x, k.beta) - known.mean);
      } else {
        Vec<T> u = x * known.scale + known.shift, value;
        if (k.res) u += get<T, WIDE>(k.res + r * k.ldres + c, k.chans);
        one *= slope<A, T>(u, k.beta, value);
        two = one * (x - known.mean);
      }
      if (k.y2) put<T, WIDE>(k.y2 + r * k.ldy2 + c, one, k.chans);
    });
}

template <class T, int A, bool FIRST, bool WIDE>
__attribute__((noinline)) static void write_gradient(const Rows<T> k, int64_t from, int64_t to) {
  using V = Vec<T>;
  struct In { V x, d; };
  each_row<T, WIDE>(from, to, k.chans,
    [=](int64_t r, int64_t c) {
      V x = get<T, WIDE>(k.x + r * k.ldx + c, k.chans);
      return In{x, k.y2 ? get<T, WIDE>(k.y2 + r * k.ldy2 + c, k.chans) : gradient<T, WIDE>(k, r, c)};
    },
    [=](int64_t r, int64_t c, const In& v) {
      auto of = [=](const T* p) { return get<T, WIDE>(p + c, k.chans); };
      V scale = of(k.scale), value, d = v.d, dx;
      if (FIRST) {
        V rise = slope<A, T>(v.x, k.beta, value);
        dx = scale * (d - of(k.offset) - (value - of(k.mean)) * of(k.factor)) * rise;
      } else {
        if (!k.y2) d *= slope<A, T>(v.x * scale + of(k.shift), k.beta, value);
        dx = scale * (d - of(k.offset) - (v.x - of(k.mean)) * of(k.factor));
      }
      put<T, WIDE>(k.y + r * k.ldy + c, dx, k.chans);
    });
}

template <class T, int A, bool FIRST, bool WIDE> static void backward(const Args& a) {
  const Coefficients<T> found(a);
  Room<T> offset(a.chans), factor(a.chans);
  std::vector<double> one(a.chans), two(a.chans);
  Rows<T> k(a);
  k.scale = found.scale.data();
  k.shift = found.shift.data();
  k.mean = found.mean.data();
  k.offset = offset.data();
  k.factor = factor.data();
  if (a.batch || a.dweight || a.y2)
    sum_rows<T>(a, one.data(), two.data(), [&](int64_t from, int64_t to, T* sum, T* product) {
      products<T, A, FIRST, WIDE>(k, from, to, sum, product);
    });
  for (int64_t c = 0; c < a.chans; c++) {
    double n = double(a.rows), r = found.rstd[c];
    if (a.dweight) ((T*)a.dweight)[c] = T(two[c] * r);
    if (a.dbias) ((T*)a.dbias)[c] = T(one[c]);
    offset[c] = a.batch ? T(one[c] / n) : T(0);
    factor[c] = a.batch ? T(two[c] * r * r / n) : T(0);
  }
  if (a.y) share_rows(a, [&](int64_t from, int64_t to) { write_gradient<T, A, FIRST, WIDE>(k, from, to); });
}

template <class T> static void dispatch(const Args& a, bool back) {
  const bool wide = a.chans >= width<T>;
#define CASE(A, FIRST, WIDE) \
  if (a.act == A && bool(a.act_first) == FIRST && wide == WIDE) \
    back ? backward<T, A, FIRST, WIDE>(a) : forward<T, A, FIRST, WIDE>(a);
#define CASES(A) CASE(A, false, false) CASE(A, false, true) CASE(A, true, false) CASE(A, true, true)
  CASES(IDENTITY) CASES(RELU) CASES(MISH)
#undef CASES
#undef CASE
}
extern "C" void norm_act_float(const Args* a, int back) { dispatch<float>(*a, back); }
extern "C" void norm_act_double(const Args* a, int back) { dispatch<double>(*a, back); }
"""
)


ACTS = {"identity": 0, "relu": 1, "mish": 2}


class _Args(ctypes.Structure):
    """The struct of the same name in the source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "chans", "threads", "act", "act_first", "batch")),
        *((name, ctypes.c_double) for name in ("beta", "eps", "momentum")),
        *(
            field
            for name in ("x", "res", "add", "dy", "y", "y2")
            for field in ((name, ctypes.c_void_p), (f"ld{name}", ctypes.c_int64))
        ),
        *((name, ctypes.c_void_p) for name in ("mean", "var", "weight", "bias", "running_mean", "running_var")),
        *((name, ctypes.c_void_p) for name in ("dweight", "dbias")),
    )


class Norm(NamedTuple):
    """One BatchNorm and its activation, as the kernel takes them; channels are C.

    Attributes:
        act: A key of `ACTS`.
        beta: Sharpness of Mish.
        act_first: Whether the activation stands in front of the normalisation.
        batch: Whether the statistics are those of the batch; else the running ones.
        eps: Added to the variance.
        momentum: Weight of the batch in the running statistics.
        weight: (C,) or None.
        bias: (C,) or None.
        running_mean: (C,), or None if there are none; moved in place by `forward` with batch statistics.
        running_var: (C,), the same.
    """

    act: str
    beta: float
    act_first: bool
    batch: bool
    eps: float
    momentum: float
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None

    def narrow(self, start: int, length: int) -> Norm:
        """Return the same for some of the channels: each channel stands alone."""

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.narrow(0, start, length)

        return self._replace(
            weight=cut(self.weight),
            bias=cut(self.bias),
            running_mean=cut(self.running_mean),
            running_var=cut(self.running_var),
        )

    def fixed(self, stats: Tensor | None) -> Norm:
        """Return the same with the statistics that `forward` wrote, so that the output can be computed again."""
        return self if stats is None else self._replace(batch=False, running_mean=stats[0], running_var=stats[1])


def sums_dtype(x: Tensor) -> torch.dtype:
    """Return the type of statistics and sums over rows of `x`."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def activation(act: str, like: Tensor, chans: int) -> Norm:
    """Return the activation of `chans` channels alone, as a norm that changes nothing."""
    zeros, ones = like.new_zeros(chans), like.new_ones(chans)
    return Norm(act, 1.0, True, False, 0.0, 0.0, None, None, zeros, ones)


def forward(
    x: Tensor,
    norm: Norm,
    stats: Tensor | None,
    y: Tensor | None,
    *,
    res: Tensor | None = None,
    add: Tensor | None = None,
    y2: Tensor | None = None,
) -> None:
    """Write the output into `y`, and ``y + add`` into `y2`.

    Args:
        x: (R, C), rows of any stride.
        norm: What to compute; its running statistics move.
        stats: (2, C): mean and biased variance of the batch are written here. None without batch statistics.
        y: (R, C); may be `x` or `res`.
        res: (R, C), added in front of the activation; not with `act_first`.
        add: (R, C); with `y2`.
        y2: (R, C).
    """
    if x.is_cuda:
        from r2kit.backbones.fast import norm_act_gpu

        return norm_act_gpu.forward(x, norm, stats, y, res=res, add=add, y2=y2)
    _call(_args(x, norm, stats, res, add, None, y, y2), x.dtype, back=False)


def backward(
    x: Tensor,
    norm: Norm,
    stats: Tensor | None,
    dy: Tensor,
    dx: Tensor,
    *,
    add: Tensor | None = None,
    res: Tensor | None = None,
    dres: Tensor | None = None,
    sums: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write the gradient of x into `dx` and return those of weight and bias, both (C,); of a norm with neither, noise.

    Args:
        x: As given to `forward`.
        norm: As given to `forward`.
        stats: As written by `forward`.
        dy: (R, C), gradient of `y`.
        dx: (R, C); may be `x`, `dy` or `add`.
        add: (R, C): the gradient is ``dy + add``.
        res: As given to `forward`.
        dres: (R, C), needed with `res` and no other tensor than that: its gradient is written here.
        sums: (2, C), room for the two that are returned, or None for new room.
    """
    if x.is_cuda:
        from r2kit.backbones.fast import norm_act_gpu

        return norm_act_gpu.backward(x, norm, stats, dy, dx, add=add, res=res, dres=dres, sums=sums)
    if sums is None:
        sums = memory.small((2, x.shape[1]), x)
    args = _args(x, norm, stats, res, add, dy, dx, dres)
    if norm.weight is not None or norm.bias is not None:
        args.dweight = at = sums.data_ptr()
        args.dbias = at + sums.stride(0) * x.element_size()
    _call(args, x.dtype, back=True)
    dweight, dbias = sums.unbind()
    return dweight, dbias


def _args(
    x: Tensor,
    norm: Norm,
    stats: Tensor | None,
    res: Tensor | None,
    add: Tensor | None,
    dy: Tensor | None,
    y: Tensor | None,
    y2: Tensor | None,
) -> _Args:
    """Return what the kernel takes; built in one call, as fields set by name cost more than small maps."""
    rows, chans = x.shape
    mean = var = None
    if stats is not None:
        mean = stats.data_ptr()
        var = mean + stats.stride(0) * stats.element_size()
    has_running = norm.running_mean is not None and norm.running_var is not None
    return _Args(
        *(rows, chans, native.threads(), ACTS[norm.act], norm.act_first, norm.batch),
        *(norm.beta, norm.eps, norm.momentum, x.data_ptr(), x.stride(0)),
        *(None if res is None else res.data_ptr(), 0 if res is None else res.stride(0)),
        *(None if add is None else add.data_ptr(), 0 if add is None else add.stride(0)),
        *(None if dy is None else dy.data_ptr(), 0 if dy is None else dy.stride(0)),
        *(None if y is None else y.data_ptr(), 0 if y is None else y.stride(0)),
        *(None if y2 is None else y2.data_ptr(), 0 if y2 is None else y2.stride(0)),
        *(mean, var, start(norm.weight), start(norm.bias)),
        *((start(norm.running_mean), start(norm.running_var)) if has_running else ()),
    )


def start(tensor: Tensor | None) -> int | None:
    """Return where a tensor begins in memory, or None for none."""
    return None if tensor is None else tensor.data_ptr()


def _call(args: _Args, dtype: torch.dtype, *, back: bool) -> None:
    native.call(SOURCE, "norm_act", dtype, args, int(back))


# --------------------------------------------------------------------------------------------- reference, benchmark


def plain(x: Tensor, norm: Norm, res: Tensor | None = None) -> Tensor:
    """Compute the output `y` by torch's own operators: what the kernel is compared with."""

    def act(t: Tensor) -> Tensor:
        return {"identity": t, "relu": F.relu(t), "mish": F.mish(t * norm.beta) / norm.beta}[norm.act]

    def bn(t: Tensor) -> Tensor:
        return F.batch_norm(
            t, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.batch, norm.momentum, norm.eps
        )

    if norm.act_first:
        return bn(act(x))
    return act(bn(x) if res is None else bn(x) + res)


def main(rows: int = 8192, chans: int = 104, rounds: int = 10) -> None:
    """Print nanoseconds an element of the kernel and of torch's operators, forward and backward, medians."""
    for act, act_first in (("mish", True), ("mish", False), ("relu", False)):
        ones, zeros = torch.ones(chans), torch.zeros(chans)
        norm = Norm(act, 1.0, act_first, True, 1e-5, 0.1, ones, zeros, zeros.clone(), ones.clone())
        x, dy = torch.randn(rows, chans), torch.randn(rows, chans)
        y, stats = torch.empty_like(x), torch.empty(2, chans)
        leaf = x.clone().requires_grad_()
        seconds: dict[str, list[float]] = {}
        for _ in range(rounds + 1):
            start = time.perf_counter()
            forward(x, norm, stats, y)
            after = time.perf_counter()
            backward(x, norm, stats, dy, y)
            done = time.perf_counter()
            out = plain(leaf, norm)
            plain_after = time.perf_counter()
            out.backward(dy)
            ends = (after - start, done - after, plain_after - done, time.perf_counter() - plain_after)
            for name, value in zip(("forward", "backward", "plain forward", "plain backward"), ends, strict=True):
                seconds.setdefault(name, []).append(value)
        line = ", ".join(f"{k} {statistics.median(v[1:]) / x.numel() * 1e9:.2f}" for k, v in seconds.items())
        print(
            f"{act}, {'act -> BN' if act_first else 'BN -> act'}, {torch.get_num_threads()} threads, ns/element: {line}"
        )


if __name__ == "__main__":
    main()
