// Sixteen fp32 values at a time, by the compiler's vector extension, which it splits or not as the
// instruction set allows; what the extension does not have (fused products, look-ups, exp) is here.
#pragma once

#include <cstdint>
#include <cstring>

#include "vec.h"

namespace lutserve {

using F32 = float __attribute__((vector_size(64)));
using I32 = int32_t __attribute__((vector_size(64)));

template <class To, class From>
inline To cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline F32 load_f32(const float* p) {
  F32 x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

inline void store_f32(float* p, const F32& x) {
  std::memcpy(p, &x, sizeof(x));
}

inline F32 spread(float x) {
  return F32{} + x;
}

// a * b + c, in one rounding where the instruction set has that.
inline F32 fma(const F32& a, const F32& b, const F32& c) {
#if defined(__AVX512F__)
  return F32(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__AVX2__) && defined(__FMA__)
  const auto x = cast<Float16>(a), y = cast<Float16>(b), z = cast<Float16>(c);
  return cast<F32>(Float16{_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high)});
#else
  return a * b + c;
#endif
}

// a where the mask is all ones, b where it is 0. (`mask ? a : b` goes lane by lane where the compiler has to
// split the vectors.)
inline F32 choose(const I32& mask, const F32& a, const F32& b) {
  return cast<F32>((mask & cast<I32>(a)) | (~mask & cast<I32>(b)));
}

// The larger; b where either is NaN.
inline F32 larger(const F32& a, const F32& b) {
#if defined(__AVX512F__)
  return F32(_mm512_max_ps(__m512(a), __m512(b)));
#elif defined(__AVX2__)
  const auto x = cast<Float16>(a), y = cast<Float16>(b);
  return cast<F32>(Float16{_mm256_max_ps(x.low, y.low), _mm256_max_ps(x.high, y.high)});
#else
  return choose(a > b, a, b);
#endif
}

// Folds the lanes by halves: lane i and i + 8, then i + 4, ...; the same order for every instruction set.
template <class Fold>
inline float folded(F32 x, Fold fold) {
  for (int half = int(kLanes) / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x[i] = fold(x[i], x[i + half]);
  }
  return x[0];
}

inline float sum_of(const F32& x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(__m512(x));
#else
  return folded(x, [](float a, float b) { return a + b; });
#endif
}

// x without NaN.
inline float largest_of(const F32& x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(__m512(x));
#else
  return folded(x, [](float a, float b) { return a > b ? a : b; });
#endif
}

// All ones in the lanes from begin to end - 1.
inline I32 lanes(int64_t begin, int64_t end) {
  constexpr I32 kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const auto clip = [](int64_t i) { return int32_t(i < 0 ? 0 : i > kLanes ? kLanes : i); };
  return (kLane >= clip(begin)) & (kLane < clip(end));
}

// exp(x) for x <= 0, within 2 units in the last place; 0 below -87.3 (where results are subnormal), NaN for NaN.
inline F32 exp_negative(const F32& x) {
  constexpr float kLog2e = 1.44269504f, kMagic = 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
  const F32 shifted = fma(x, spread(kLog2e), spread(kMagic));
  const F32 n = shifted - kMagic;
  const F32 r = fma(n, spread(2.12194440e-4f), fma(n, spread(-0.693359375f), x));
  F32 p = spread(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = fma(p, r, spread(c));
  }
  p = fma(p * r, r, r) + 1.0f;
  const I32 scaled = cast<I32>(p) + (cast<I32>(shifted) << 23);
  return choose(x < -87.3f, F32{}, cast<F32>(scaled));
}

}  // namespace lutserve
