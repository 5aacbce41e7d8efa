"""Kernel: the gradient of a 3x3 convolution's weights by Winograd's minimal filtering, over channels-last rows.

With the matrices of `squares` for 4 x 4 outputs, the sum of dy * y over a square is, place by place, the sum of
(A dy A^T) * (G g G^T) * (B^T d B). Its derivative by the kernel g is::

    dg = G^T M G,    M = sum over squares of (A dy A^T) * (B^T d B)

for each pair of an output and an input channel: 36 products a square in place of 144. At each of the 36 places M is a
product of two matrices whose common side is the squares. The threads transform a block of squares together, then each
takes places; so the sums do not depend on the number of threads. Rounding is up to about twice that of the direct sum.

Only for one group, stride and dilation 1, and at least a vector of channels on both sides. Reference: torch's own
`convolution_backward`. Benchmark: ``python -m r2kit.backbones.fast.winograd_grad``.
"""

from __future__ import annotations

import ctypes
from functools import partial

import torch
from torch import Tensor

from r2kit.backbones.fast import memory, native
from r2kit.backbones.fast import weight_grad as direct
from r2kit.backbones.fast.squares import SQUARES, Images, pixel_step
from r2kit.backbones.fast.stopwatch import milliseconds

SOURCE = (
    SQUARES
    + r"""
constexpr int M = 4, N = 6, PLACES = 36;
constexpr int64_t BLOCK = 64;  // squares of a block: a place's are 32 kB at 64 channels on both sides, a first cache

// Rows of A times d, and G^T times m, along one side.
template <class T, class V> static inline void spread(const V* d, V* t) {
  using L = Line<4>;
  V even_a = d[0] + d[2] * T(L::A2), odd_a = d[1] * T(L::A) + d[3] * T(L::A3);
  V even_b = d[0] + d[2] * T(L::B2), odd_b = d[1] * T(L::B) + d[3] * T(L::B3);
  t[0] = d[0], t[5] = d[3];
  t[1] = even_a + odd_a, t[2] = even_a - odd_a, t[3] = even_b + odd_b, t[4] = even_b - odd_b;
}
template <class T, class V> static inline void gather(const V* m, V* g) {
  using L = Line<4>;
  V sum_a = (m[1] + m[2]) * T(L::AT_A), less_a = (m[1] - m[2]) * T(L::AT_A);
  V sum_b = (m[3] + m[4]) * T(L::AT_B), less_b = (m[3] - m[4]) * T(L::AT_B);
  g[0] = m[0] * T(L::NONE) + sum_a + sum_b;
  g[1] = less_a * T(L::A) + less_b * T(L::B);
  g[2] = sum_a * T(L::A2) + sum_b * T(L::B2) + m[5];
}

struct Args {
  Images in;
  int64_t out_chans, lddy, threads;  // dy: rows (batch, out_height, out_width) of `out_chans`
  const void* dy;
  void* dw;                          // (out_chans, 3, 3, chans)
};

// z[place * step + k] of the gradients of one square; zeros beyond the image.
template <class T> static void read_grad(const Args& a, const Squares<T, M>& squares, int64_t s, const T* zeros, T* z,
                                         int64_t step) {
  using V = Vec<T>;
  const int64_t image = s / (squares.tall * squares.across), h = s / squares.across % squares.tall * M;
  const int64_t w = s % squares.across * M;
  const T* from[M * M];
  for (int i = 0; i < M * M; i++) {
    const int64_t y = h + i / M, x = w + i % M;
    const bool inside = y < a.in.out_height && x < a.in.out_width;
    from[i] = inside ? (const T*)a.dy + ((image * a.in.out_height + y) * a.in.out_width + x) * a.lddy : zeros;
  }
  for (int64_t at = 0; at < a.out_chans; at += width<T>) {
    const int64_t k = std::min(at, a.out_chans - width<T>);  // the last vector reaches back
    V t[N][M];
#pragma GCC unroll 4
    for (int j = 0; j < M; j++) {
      V d[M], c[N];
#pragma GCC unroll 4
      for (int i = 0; i < M; i++) memcpy(&d[i], from[i * M + j] + k, BYTES);
      spread<T>(d, c);
#pragma GCC unroll 6
      for (int i = 0; i < N; i++) t[i][j] = c[i];
    }
#pragma GCC unroll 6
    for (int i = 0; i < N; i++) {
      V c[N];
      spread<T>(t[i], c);
#pragma GCC unroll 6
      for (int j = 0; j < N; j++) memcpy(z + (i * N + j) * step + k, &c[j], BYTES);
    }
  }
}

// m (R rows, C vectors) = or += sum over `count` squares of z[s * ldz + row] v[s * ldv + column].
template <class T, int R, int C> static void outer(const T* z, int64_t ldz, const T* v, int64_t ldv, int64_t count,
                                                   T* m, bool fresh) {
  Vec<T> sum[R][C] = {};
  for (int64_t s = 0; s < count; s++) {
    Vec<T> x[C];
#pragma GCC unroll 2
    for (int j = 0; j < C; j++) memcpy(&x[j], v + s * ldv + j * width<T>, BYTES);
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 2
      for (int j = 0; j < C; j++) sum[i][j] += x[j] * z[s * ldz + i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; i++)
#pragma GCC unroll 2
    for (int j = 0; j < C; j++) {
      T* to = m + i * ldv + j * width<T>;
      Vec<T> old = {};  // sums of blocks round less than one long sum
      if (!fresh) memcpy(&old, to, BYTES);
      old += sum[i][j];
      memcpy(to, &old, BYTES);
    }
}
template <class T> using Outer = void (*)(const T*, int64_t, const T*, int64_t, int64_t, T*, bool);
template <class T, int C, int... R> static Outer<T> outer_of(int64_t rows, std::integer_sequence<int, R...>) {
  static const Outer<T> found[MR] = {outer<T, R + 1, C>...};
  return found[rows - 1];
}

template <class T> static void run(const Args& a) {
  using V = Vec<T>;
  using All = std::make_integer_sequence<int, int(MR)>;
  const Squares<T, M> squares(a.in);
  const std::vector<T> zeros(a.out_chans, T(0));
  const int64_t L = width<T>, K = a.out_chans, C = (a.in.chans + L - 1) / L * L, parts = (K + MR - 1) / MR;
  const int64_t block = std::min(BLOCK, squares.count);
  const int64_t step_v = apart<T>(block * C), step_z = apart<T>(block * K), step_m = apart<T>(K * C);
  T *v = kept<T, 0>(PLACES * step_v), *z = kept<T, 1>(PLACES * step_z), *m = kept<T, 2>(PLACES * step_m);
#pragma omp parallel num_threads(a.threads)
  {
    const int64_t n = omp_get_num_threads(), t = omp_get_thread_num();
    for (int64_t s0 = 0; s0 < squares.count; s0 += block) {
      const int64_t count = std::min(block, squares.count - s0);
      for (int64_t s = count * t / n; s < count * (t + 1) / n; s++) {
        squares.read(s0 + s, v + s * C, step_v);
        read_grad<T>(a, squares, s0 + s, zeros.data(), z + s * K, step_z);
      }
#pragma omp barrier
      for (int64_t place = PLACES * t / n; place < PLACES * (t + 1) / n; place++)
        for (int64_t part = 0; part < parts; part++) {
          const int64_t k = K * part / parts, rows = K * (part + 1) / parts - k;
          const T* zs = z + place * step_z + k;
          for (int64_t c = 0; c < C; c += 2 * L) {
            const auto sum = c + L < C ? outer_of<T, 2>(rows, All()) : outer_of<T, 1>(rows, All());
            sum(zs, K, v + place * step_v + c, C, count, m + place * step_m + k * C + c, s0 == 0);
          }
        }
#pragma omp barrier
    }
    for (int64_t k = K * t / n; k < K * (t + 1) / n; k++)
      for (int64_t at = 0; at < a.in.chans; at += L) {
        const int64_t c = std::min(at, a.in.chans - L);
        V r[3][N];
#pragma GCC unroll 6
        for (int j = 0; j < N; j++) {
          V d[N], o[3];
#pragma GCC unroll 6
          for (int i = 0; i < N; i++) memcpy(&d[i], m + (i * N + j) * step_m + k * C + c, BYTES);
          gather<T>(d, o);
          for (int i = 0; i < 3; i++) r[i][j] = o[i];
        }
        for (int i = 0; i < 3; i++) {
          V o[3];
          gather<T>(r[i], o);
          for (int j = 0; j < 3; j++) memcpy((T*)a.dw + (k * 9 + i * 3 + j) * a.in.chans + c, &o[j], BYTES);
        }
      }
  }
}
extern "C" void winograd_grad_float(const Args* a) { run<float>(*a); }
extern "C" void winograd_grad_double(const Args* a) { run<double>(*a); }
"""
)

FEWEST = 16  # squares; with fewer, what is done for each pair of channels outweighs what is spared in each square


class _Args(ctypes.Structure):
    """The struct of the same name in the source."""

    _fields_ = (
        ("in", Images),
        *((name, ctypes.c_int64) for name in ("out_chans", "lddy", "threads")),
        *((name, ctypes.c_void_p) for name in ("dy", "dw")),
    )


def weight_grad(x: Tensor, dy: Tensor, pad: tuple[int, int]) -> Tensor:
    """Return the gradient of the weights of a 3x3 convolution, (K, C, 3, 3) in channels-last memory.

    Args:
        x: (B, C, H, W), channels-last; may be some channels of a wider tensor. At least `squares.NARROWEST` channels.
        dy: (B, K, OH, OW), likewise.
        pad: Zeros above and left of the image.
    """
    size, chans = (dy.shape[2], dy.shape[3]), dy.shape[1]
    dw = memory.empty(x, (chans, x.shape[1], 3, 3))
    images = Images.of(x, size, pad)
    args = _Args(images, chans, pixel_step(dy), native.threads(), dy.data_ptr(), dw.data_ptr())
    native.call(SOURCE, "winograd_grad", x.dtype, args)
    return dw


def main(batch: int = 32, rounds: int = 10) -> None:
    """Print milliseconds of the kernel, the direct one and torch's for layers of Res2Net-50 at 64 px, medians."""
    for chans, side in ((26, 16), (52, 8), (104, 4), (64, 32)):
        x = torch.randn(batch, chans, side, side).contiguous(memory_format=torch.channels_last)
        dy = torch.randn_like(x)
        forms = {
            "kernel": partial(weight_grad, x, dy, (1, 1)),
            "direct": partial(direct.weight_grad, x, dy, (3, 3), 1, 1, 1),
            "plain": partial(direct.plain, x, dy, (3, 3), 1, 1, 1),
        }
        line = milliseconds(forms, rounds)
        print(f"{chans} channels, {side} x {side}, batch {batch}, {torch.get_num_threads()} threads, ms: {line}")


if __name__ == "__main__":
    main()
