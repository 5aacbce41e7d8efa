"""C++ that the kernels share: vectors as wide as the processor's, part of one too, and the activations."""

VECTORS = r"""
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#include <omp.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif

typedef float VF __attribute__((vector_size(BYTES)));
typedef double VD __attribute__((vector_size(BYTES)));
typedef int32_t VI __attribute__((vector_size(BYTES)));
template <class T> struct Lanes;
template <> struct Lanes<float> { using V = VF; };
template <> struct Lanes<double> { using V = VD; };
template <class T> using Vec = typename Lanes<T>::V;
template <class T> constexpr int64_t width = BYTES / sizeof(T);

// Values that begin with a line of the cache: a vector that lies across two costs twice, and more where it was written.
template <class T> struct Room {
  std::vector<T> all;
  T* start;
  explicit Room(int64_t count, T value = T(0)) : all(size_t(count) + 64 / sizeof(T), value) {
    start = (T*)((uintptr_t(all.data()) + 63) / 64 * 64);
  }
  Room(const Room&) = delete;
  T* data() { return start; }
  const T* data() const { return start; }
  T& operator[](int64_t i) { return start[i]; }
  const T& operator[](int64_t i) const { return start[i]; }
};

// n lanes of a row; n < width only where the row itself is shorter than a vector.
template <class T> static inline Vec<T> load(const T* p, int64_t n) {
  Vec<T> v = {};
  if (n == width<T>) memcpy(&v, p, BYTES);
  else for (int64_t i = 0; i < n; i++) v[i] = p[i];
  return v;
}
template <class T> static inline void store(T* p, Vec<T> v, int64_t n) {
  if (n == width<T>) memcpy(p, &v, BYTES);
  else for (int64_t i = 0; i < n; i++) p[i] = v[i];
}

// e^x for x in [-87, 20]: 2^k times a polynomial on [-ln2/2, ln2/2], whose terms after 1 + r are fitted for the least
// largest relative error (3.1e-9) and summed in pairs, so that fewer wait for one another. With rounding 1.2e-7 (two
// units in the last place), to 3.6e-7 at -87: k ln2 is taken away in one step where a multiply-add does not round it.
static inline VF exponential(VF x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  VF shifted = x * 1.44269504088896341f + magic;
  VF k = shifted - magic;
#if defined(__FMA__)
  VF r = x - k * 0.693147180559945309f;
#else
  VF r = x - k * 0.693359375f;
  r = r + k * 2.12194440e-4f;
#endif
  VF square = r * r;
  VF high = square * 1.3814318646e-3f + (r * 8.3688512740e-3f + 4.1668401125e-2f);
  VF p = (high * square + (r * 1.6666519522e-1f + 4.9999993373e-1f)) * square + (r + 1.0f);
  VI bits, ki;
  memcpy(&bits, &p, BYTES);
  memcpy(&ki, &shifted, BYTES);
  bits += ki << 23;  // the low bits of `shifted` are k
  memcpy(&p, &bits, BYTES);
  return p;
}
static inline VD exponential(VD x) {
  VD y;
  for (int i = 0; i < width<double>; i++) y[i] = std::exp(x[i]);
  return y;
}

enum { IDENTITY = 0, RELU = 1, MISH = 2 };

// x between -87 and 20; NaN stays NaN. GCC makes two instructions of each comparison and choice where one will do.
#if defined(__AVX512F__)
static inline VF clamped(VF x) { return _mm512_max_ps(VF{} - 87.0f, _mm512_min_ps(VF{} + 20.0f, x)); }
#elif defined(__AVX__)
static inline VF clamped(VF x) { return _mm256_max_ps(VF{} - 87.0f, _mm256_min_ps(VF{} + 20.0f, x)); }
#else
static inline VF clamped(VF x) {
  x = x > 20.0f ? VF{} + 20.0f : x;
  return x < -87.0f ? VF{} - 87.0f : x;
}
#endif
static inline VD clamped(VD x) {
  x = x > 20.0 ? VD{} + 20.0 : x;
  return x < -87.0 ? VD{} - 87.0 : x;
}

// tanh(softplus(z)) = n / (n + 2), n = e^z (e^z + 2). Above 20 it is 1 to the last bit.
template <int A, class T> static inline Vec<T> act(Vec<T> x, T beta) {
  using V = Vec<T>;
  if (A == RELU) return x < T(0) ? V{} : x;  // NaN stays NaN
  if (A != MISH) return x;
  V e = exponential(clamped(x * beta));
  V n = e * (e + T(2));
  return x * (n / (n + T(2)));
}
// Its derivative n/d + z 4 e (e + 1) / d^2, d = n + 2; optionally the value too.
template <int A, class T> static inline Vec<T> slope(Vec<T> x, T beta, Vec<T>& value) {
  using V = Vec<T>;
  if (A == RELU) { value = x < T(0) ? V{} : x; return x > T(0) ? V{} + T(1) : V{}; }
  if (A != MISH) { value = x; return V{} + T(1); }
  V z = clamped(x * beta);
  V e = exponential(z);
  V m = e * e + e, n = m + e;
  V r = T(1) / (n + T(2));
  V t = n * r;
  value = x * t;
  return t + (z * T(4)) * m * (r * r);
}
"""
