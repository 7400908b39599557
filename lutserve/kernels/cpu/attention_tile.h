// The matrix products of attention: a few rows of 16-bit or fp32 values (queries, weights) times columns of
// the KV cache, which both the keys and the values keep in the order that this product reads.
//
// Such a matrix of `depth` rows and `width` columns lies row after row (fp16), or in pairs of rows with the
// two values of a column side by side (bf16): one load brings what one bf16 dot-product instruction takes.
#pragma once

#include <algorithm>
#include <utility>

#include "simd.h"

namespace lutserve {

constexpr int64_t kGroup = kLanes;  // keys that lie together in a block of the cache

// Where row k, column j of a packed matrix lies.
template <class T>
constexpr int64_t packed(int64_t k, int64_t j, int64_t width);

template <>
constexpr int64_t packed<Half>(int64_t k, int64_t j, int64_t width) {
  return k * width + j;
}

template <>
constexpr int64_t packed<BFloat16>(int64_t k, int64_t j, int64_t width) {
  return (k / 2 * width + j) * 2 + k % 2;
}

// The widest vector that the instruction set has, in which sums are kept: sixteen columns are kParts of them.
// (GCC keeps wider ones in memory, for a tenth of the speed.)
#if defined(__AVX512F__)
constexpr int kPart = 16;
#elif defined(__AVX2__)
constexpr int kPart = 8;
#else
constexpr int kPart = 4;
#endif
constexpr int kParts = int(kLanes) / kPart;
using Part = float __attribute__((vector_size(4 * kPart)));

inline Part everywhere(float x) {
  return x - Part{};
}

// a * b + c, in one rounding where the instruction set has that.
inline Part fused(const Part& a, const Part& b, const Part& c) {
#if defined(__AVX512F__)
  return Part(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__AVX2__) && defined(__FMA__)
  return Part(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#else
  return a * b + c;
#endif
}

// The fp16 values of a part.
inline Part load_half(const uint16_t* p) {
#if defined(__AVX512F__)
  return Part(_mm512_cvtph_ps(load(p)));
#elif defined(__AVX2__)
  return Part(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Part x;
  for (int i = 0; i < kPart; ++i) x[i] = float(Half(p[i], Half::from_bits()));
  return x;
#endif
}

// How a product is computed: Left is the type of the rows' values, Right a part of the columns', kDepth the
// rows of the packed matrix that one step takes.
struct HalfProduct {
  using Type = Half;
  using Left = float;
  using Right = Part;
  static constexpr int kDepth = 1;
  static Right load(const uint16_t* p) { return load_half(p); }
  static Right left(const float* p) { return everywhere(*p); }
  static void add(Part& sum, const Right& left, const Right& right) { sum = fused(left, right, sum); }
  static void pack(float* to, const Bits16& bits) { store_f32(to, cast<F32>(widen<Half>(bits))); }
  static void pack(float* to, const F32& x) { store_f32(to, x); }
};

#if defined(__AVX512BF16__)

struct BFloat16Product {
  using Type = BFloat16;
  using Left = uint16_t;
  using Right = __m512bh;
  static constexpr int kDepth = 2;
  static Right load(const uint16_t* p) { return Right(_mm512_loadu_si512(p)); }
  static Right left(const uint16_t* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof(pair));
    return Right(_mm512_set1_epi32(pair));
  }
  static void add(Part& sum, const Right& left, const Right& right) {
    sum = Part(_mm512_dpbf16_ps(__m512(sum), left, right));
  }
  static void pack(uint16_t* to, const Bits16& bits) { store(to, bits); }
  static void pack(uint16_t* to, const F32& x) { store(to, cast<Bits16>(_mm512_cvtneps_pbh(__m512(x)))); }
};

#else

struct BFloat16Product {
  using Type = BFloat16;
  using Left = float;
  using Right = std::pair<Part, Part>;
  static constexpr int kDepth = 2;
  static Right load(const uint16_t* p) {
    int32_t pairs __attribute__((vector_size(4 * kPart)));
    std::memcpy(&pairs, p, sizeof(pairs));
    return {cast<Part>(pairs << 16), cast<Part>(pairs & int32_t(0xFFFF0000))};
  }
  static Right left(const float* p) { return {everywhere(p[0]), everywhere(p[1])}; }
  static void add(Part& sum, const Right& left, const Right& right) {
    sum = fused(left.second, right.second, fused(left.first, right.first, sum));
  }
  static void pack(float* to, const Bits16& bits) { store_f32(to, cast<F32>(widen<BFloat16>(bits))); }
  static void pack(float* to, const F32& x) { pack(to, narrow<BFloat16>(cast<Float16>(x))); }
};

#endif

// The block whose sums fit in registers: rows, and columns in sixteens.
constexpr int kRows = 6;
constexpr int kColumns = kPart == 16 ? 4 : 1;

template <int C>
using Sums = Part[C * kParts];

// sum[r][c] += left[r] @ right[c]. left: rows of `depth` values, stride apart. right[c]: sixteen columns of a
// packed matrix with `width` columns.
template <class P, int R, int C>
__attribute__((always_inline)) inline void multiply(Sums<C> (&sum)[R], const typename P::Left* left, int64_t stride,
                                                    const uint16_t* const (&right)[C], int64_t width,
                                                    int64_t depth) {
  for (int64_t k = 0; k < depth; k += P::kDepth) {
    typename P::Right b[C * kParts];
    for (int c = 0; c < C * kParts; ++c) {
      b[c] = P::load(right[c / kParts] + k * width + c % kParts * kPart * P::kDepth);
    }
    for (int r = 0; r < R; ++r) {
      const typename P::Right a = P::left(left + r * stride + k);
      for (int c = 0; c < C * kParts; ++c) P::add(sum[r][c], a, b[c]);
    }
  }
}

template <int C>
inline void store_sums(float* to, const Sums<C>& sum, float factor) {
  for (int c = 0; c < C * kParts; ++c) {
    const Part x = sum[c] * factor;
    std::memcpy(to + c * kPart, &x, sizeof(x));
  }
}

// Sixteen columns of the sums.
template <int C>
inline F32 sixteen(const Sums<C>& sum, int column) {
  F32 x;
  std::memcpy(&x, sum + column * kParts, sizeof(x));
  return x;
}

template <class Body, int... kN>
inline void with_constant(int64_t n, Body& body, int64_t first, std::integer_sequence<int, kN...>) {
  (void)((n == kN + 1 && (body(std::integral_constant<int, kN + 1>(), first), true)) || ...);
}

// Calls body(integral_constant N, first) for consecutive runs of at most kMost, as even as possible.
template <int kMost, class Body>
inline void in_runs(int64_t count, Body body) {
  int64_t done = 0;
  for (int64_t runs = (count + kMost - 1) / kMost; runs > 0; --runs) {
    const int64_t n = (count - done + runs - 1) / runs;
    with_constant(n, body, done, std::make_integer_sequence<int, kMost>());
    done += n;
  }
}

}  // namespace lutserve
