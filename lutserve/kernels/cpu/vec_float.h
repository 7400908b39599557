// Sums, differences and fp32 loads for the sixteen floats of vec.h, and rows with a ragged end.
#pragma once

#include <algorithm>
#include <cstring>

#include "vec.h"

namespace lutserve {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)

inline Float16 splat(float x) {
  return {_mm512_set1_ps(x)};
}

inline Float16 plus(Float16 a, Float16 b) {
  return {_mm512_add_ps(a.v, b.v)};
}

inline Float16 minus(Float16 a, Float16 b) {
  return {_mm512_sub_ps(a.v, b.v)};
}

inline Float16 load_floats(const float* p) {
  return {_mm512_loadu_ps(p)};
}

inline void store_floats(float* p, Float16 x) {
  _mm512_storeu_ps(p, x.v);
}

// a * b + c, in one rounding where the instruction set has that.
inline Float16 fma(Float16 a, Float16 b, Float16 c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}

#elif defined(__AVX2__)

inline Float16 splat(float x) {
  return {_mm256_set1_ps(x), _mm256_set1_ps(x)};
}

inline Float16 plus(Float16 a, Float16 b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}

inline Float16 minus(Float16 a, Float16 b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}

inline Float16 load_floats(const float* p) {
  return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}

inline void store_floats(float* p, Float16 x) {
  _mm256_storeu_ps(p, x.low);
  _mm256_storeu_ps(p + 8, x.high);
}

inline Float16 fma(Float16 a, Float16 b, Float16 c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

#else

inline Float16 splat(float x) {
  Float16 y;
  for (int i = 0; i < kLanes; ++i) y.lane[i] = x;
  return y;
}

inline Float16 plus(const Float16& a, const Float16& b) {
  Float16 sum;
  for (int i = 0; i < kLanes; ++i) sum.lane[i] = a.lane[i] + b.lane[i];
  return sum;
}

inline Float16 minus(const Float16& a, const Float16& b) {
  Float16 difference;
  for (int i = 0; i < kLanes; ++i) difference.lane[i] = a.lane[i] - b.lane[i];
  return difference;
}

inline Float16 load_floats(const float* p) {
  Float16 x;
  std::memcpy(x.lane, p, sizeof(x.lane));
  return x;
}

inline void store_floats(float* p, const Float16& x) {
  std::memcpy(p, x.lane, sizeof(x.lane));
}

inline Float16 fma(const Float16& a, const Float16& b, const Float16& c) {
  return plus(a * b, c);
}

#endif

// x rounded to T, still as fp32.
template <class T>
Float16 rounded(Float16 x) {
  return widen<T>(narrow<T>(x));
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)

// Without packing. NaNs need no care: those of 16-bit operands have zeros where the carry would start.
template <>
inline Float16 rounded<BFloat16>(Float16 x) {
  const __m512i word = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(word, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  return {_mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(int(0xFFFF0000))))};
}

#endif

// The next sixteen values of a row that has n left; zeros behind its end.
template <class T>
Float16 load_some(const uint16_t* p, int64_t n) {
  if (n >= kLanes) return widen<T>(load(p));
  uint16_t lanes[kLanes] = {};
  std::memcpy(lanes, p, size_t(n) * sizeof(uint16_t));
  return widen<T>(load(lanes));
}

inline Float16 load_some(const float* p, int64_t n) {
  if (n >= kLanes) return load_floats(p);
  float lanes[kLanes] = {};
  std::memcpy(lanes, p, size_t(n) * sizeof(float));
  return load_floats(lanes);
}

template <class T>
void store_some(uint16_t* p, Float16 x, int64_t n) {
  if (n >= kLanes) return store(p, narrow<T>(x));
  uint16_t lanes[kLanes];
  store(lanes, narrow<T>(x));
  std::memcpy(p, lanes, size_t(n) * sizeof(uint16_t));
}

}  // namespace lutserve
