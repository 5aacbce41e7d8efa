"""C++ that Winograd's kernels share: the matrices of minimal filtering for a 3x3 convolution, and what they act on.

A square of M x M outputs needs a square d of N x N of the input, N = M + 2, and, done directly, 9 M M products for each
pair of an input and an output channel. The outputs are also A^T ((G g G^T) * (B^T d B)) A, with g the kernel and *
element by element: N N products, and for the rest additions and multiplications by constants, which grow with the
channels and not with their square. Summed over input channels the products are N N matrix products, one for each place.

Along one side that is a product of polynomials by their values at N - 1 points and at infinity. M = 2 takes the points
0, 1 and -1, and 16 products in place of 36::

    B^T = 1  0 -1  0     G =  1    0    0      A^T = 1  1  1  0
          0  1  1  0         1/2  1/2  1/2           0  1 -1 -1
          0 -1  1  0         1/2 -1/2  1/2
          0  1  0 -1          0    0    1

M = 4 takes the points 0, a and -a, b and -b, and 36 products in place of 144::

    B^T = a2b2   0   -s2    0  1  0     row of G at a point p:  (1, p, p p) / product of p - q over the other points q
           0  -a b2  -b2    a  1  0     its last row:           (0, 0, 1)
           0   a b2  -b2   -a  1  0
           0  -a2 b  -a2    b  1  0     column of A^T at p:     (1, p, p p, p p p)
           0   a2 b  -a2   -b  1  0     its last column:        (0, 0, 0, 1)
           0   a2b2   0   -s2  0  1     with a2 = a a, b2 = b b, a2b2 = a2 b2, s2 = a2 + b2

with a = 5/8 and b = 3/2: exact in binary, and with less growth of the values than 1 and 2. In exact arithmetic all are
equal to the direct sum. In float32 the root mean square of the error, over that of the output, was 1.9 to 5.3e-7 with
M = 2 and 5.5e-7 to 1.6e-6 with M = 4, where torch's direct sum had 2.6 to 7.2e-7 (26 to 208 channels, AMD EPYC with
AVX-512).

Sources: Lavin and Gray 2015, arXiv:1509.09308, sec. 4; for the points Barabasz et al. 2018, arXiv:1803.10986.
"""

from __future__ import annotations

import ctypes
import math

from torch import Tensor

from r2kit.backbones.fast.tile import TILES

SQUARES = (
    TILES
    + r"""
struct Images {
  int64_t batch, height, width, chans, ldx;     // x: rows (batch, height, width) of `chans`
  int64_t out_height, out_width, pad_h, pad_w;
  const void* x;
};

// The three matrices along one side. V: a vector of T.
template <int M> struct Line;
template <> struct Line<2> {
  template <class T, class V> static inline void kernel(const V& g0, const V& g1, const V& g2, V* t) {
    V ends = (g0 + g2) * T(0.5), middle = g1 * T(0.5);
    t[0] = g0, t[1] = ends + middle, t[2] = ends - middle, t[3] = g2;
  }
  template <class T, class V> static inline void in(const V* d, V* t) {
    t[0] = d[0] - d[2], t[1] = d[1] + d[2], t[2] = d[2] - d[1], t[3] = d[1] - d[3];
  }
  template <class T, class V> static inline void out(const V* m, V* y) {
    y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] - m[3];
  }
};
template <> struct Line<4> {
  static constexpr double A = 0.625, B = 1.5, A2 = A * A, B2 = B * B, A3 = A2 * A, B3 = B2 * B;
  static constexpr double NONE = 1 / (A2 * B2), AT_A = 1 / (2 * A2 * (A2 - B2)), AT_B = 1 / (2 * B2 * (B2 - A2));
  template <class T, class V> static inline void kernel(const V& g0, const V& g1, const V& g2, V* t) {
    V even_a = g0 * T(AT_A) + g2 * T(A2 * AT_A), odd_a = g1 * T(A * AT_A);
    V even_b = g0 * T(AT_B) + g2 * T(B2 * AT_B), odd_b = g1 * T(B * AT_B);
    t[0] = g0 * T(NONE), t[5] = g2;
    t[1] = even_a + odd_a, t[2] = even_a - odd_a, t[3] = even_b + odd_b, t[4] = even_b - odd_b;
  }
  template <class T, class V> static inline void in(const V* d, V* t) {
    V even_a = d[4] - d[2] * T(B2), odd_a = (d[3] - d[1] * T(B2)) * T(A);
    V even_b = d[4] - d[2] * T(A2), odd_b = (d[3] - d[1] * T(A2)) * T(B);
    t[0] = d[0] * T(A2 * B2) - d[2] * T(A2 + B2) + d[4], t[5] = d[1] * T(A2 * B2) - d[3] * T(A2 + B2) + d[5];
    t[1] = even_a + odd_a, t[2] = even_a - odd_a, t[3] = even_b + odd_b, t[4] = even_b - odd_b;
  }
  template <class T, class V> static inline void out(const V* m, V* y) {
    V sum_a = m[1] + m[2], less_a = m[1] - m[2], sum_b = m[3] + m[4], less_b = m[3] - m[4];
    y[0] = m[0] + sum_a + sum_b, y[1] = less_a * T(A) + less_b * T(B);
    y[2] = sum_a * T(A2) + sum_b * T(B2), y[3] = less_a * T(A3) + less_b * T(B3) + m[5];
  }
};

// Distance of two places: an odd number of the cache's lines, so that one square's do not fall on each other.
template <class T> static int64_t apart(int64_t count) {
  const int64_t line = 64 / sizeof(T);
  return ((count + line - 1) / line | 1) * line;
}

// The squares of all images, one after another.
template <class T, int M> struct Squares {
  static constexpr int N = M + 2;
  const Images a;
  const int64_t tall, across, count;
  const std::vector<T> zeros;

  explicit Squares(const Images& images)
      : a(images), tall((images.out_height + M - 1) / M), across((images.out_width + M - 1) / M),
        count(images.batch * tall * across), zeros(images.chans, T(0)) {}

  // v[place * step + c] of square s.
  void read(int64_t s, T* v, int64_t step) const {
    using V = Vec<T>;
    const int64_t image = s / (tall * across), h = s / across % tall * M, w = s % across * M;
    const T* from[N * N];
    for (int i = 0; i < N * N; i++) {
      const int64_t y = h + i / N - a.pad_h, x = w + i % N - a.pad_w;
      const bool inside = y >= 0 && y < a.height && x >= 0 && x < a.width;
      from[i] = inside ? (const T*)a.x + ((image * a.height + y) * a.width + x) * a.ldx : zeros.data();
    }
    const int64_t L = width<T>;
    for (int64_t at = 0; at < a.chans; at += L) {
      const int64_t c = std::min(at, a.chans - L);  // the last vector reaches back
      V t[N][N];
#pragma GCC unroll 6
      for (int j = 0; j < N; j++) {
        V d[N];
#pragma GCC unroll 6
        for (int i = 0; i < N; i++) memcpy(&d[i], from[i * N + j] + c, BYTES);
        V s[N];
        Line<M>::template in<T>(d, s);
#pragma GCC unroll 6
        for (int i = 0; i < N; i++) t[i][j] = s[i];
      }
#pragma GCC unroll 6
      for (int i = 0; i < N; i++) {
        V s[N];
        Line<M>::template in<T>(t[i], s);
#pragma GCC unroll 6
        for (int j = 0; j < N; j++) memcpy(v + (i * N + j) * step + c, &s[j], BYTES);
      }
    }
  }

  // Hand `chans` channels from `first` on of square s to `ready`; m[place * step + k] are whole vectors of sums.
  void write(int64_t s, const T* m, int64_t step, int64_t first, int64_t chans, const Ready<T>& ready, T* out) const {
    using V = Vec<T>;
    const int64_t image = s / (tall * across), h = s / across % tall * M, w = s % across * M;
    const int64_t wide = (chans + width<T> - 1) / width<T> * width<T>;
    for (int64_t k = 0; k < wide; k += width<T>) {
      V t[M][N];
#pragma GCC unroll 6
      for (int j = 0; j < N; j++) {
        V d[N], s[M];
#pragma GCC unroll 6
        for (int i = 0; i < N; i++) memcpy(&d[i], m + (i * N + j) * step + k, BYTES);
        Line<M>::template out<T>(d, s);
#pragma GCC unroll 4
        for (int i = 0; i < M; i++) t[i][j] = s[i];
      }
#pragma GCC unroll 4
      for (int i = 0; i < M; i++) {
        V s[M];
        Line<M>::template out<T>(t[i], s);
#pragma GCC unroll 4
        for (int j = 0; j < M; j++) memcpy(out + (i * M + j) * wide + k, &s[j], BYTES);
      }
    }
    for (int64_t i = 0; i < M && h + i < a.out_height; i++)
      for (int64_t j = 0; j < M && w + j < a.out_width; j++)
        ready.write(out + (i * M + j) * wide, (image * a.out_height + h + i) * a.out_width + w + j, first, chans);
  }
};

"""
)

NARROWEST = 16  # lanes of the widest vector: the fewest channels


class Images(ctypes.Structure):
    """The struct of the same name in the source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "chans", "ldx")),
        *((name, ctypes.c_int64) for name in ("out_height", "out_width", "pad_h", "pad_w")),
        ("x", ctypes.c_void_p),
    )

    @classmethod
    def of(cls, x: Tensor, out_size: tuple[int, int], pad: tuple[int, int]) -> Images:
        """Return what a kernel reads.

        Args:
            x: (B, C, H, W), channels-last; may be some channels of a wider tensor. At least `NARROWEST` channels.
            out_size: Height and width of the output.
            pad: Zeros above and left of the image; below and right there are as many as the output needs.
        """
        return cls(x.shape[0], x.shape[2], x.shape[3], x.shape[1], pixel_step(x), *out_size, *pad, x.data_ptr())


def pixel_step(x: Tensor) -> int:
    """Return how far apart two pixels of channels-last memory are, in values."""
    return x.permute(0, 2, 3, 1).flatten(0, 2).stride(0)


def count(side: int, out_size: tuple[int, int]) -> int:
    """Return how many squares of `side` x `side` outputs an image has.

    Args:
        side: M.
        out_size: Height and width of the output.
    """
    return math.prod(-(-size // side) for size in out_size)


def square_side(out_size: tuple[int, int]) -> int:
    """Return M, 2 or 4, with fewer products; of equals the smaller, which rounds less.

    Args:
        out_size: Height and width of the output.
    """
    return min((2, 4), key=lambda m: (count(m, out_size) * (m + 2) ** 2, m))
