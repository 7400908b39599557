// Sixteen 16-bit values at a time, for whatever instruction set this file is compiled for.
//
// Bits16 holds sixteen bit patterns of fp16 (Half) or bf16 (BFloat16), Float16 the same values in fp32.
// widen() is exact; narrow() rounds to nearest even, subnormals included, and keeps NaN a NaN.
// All three versions give the same bits (NaN payloads aside).
#pragma once

#include <cstdint>
#include <cstring>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace lutserve {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int64_t kLanes = 16;

#if defined(__AVX2__)

using Bits16 = __m256i;

inline Bits16 load(const uint16_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

inline void store(uint16_t* p, Bits16 bits) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
}

inline Bits16 from_words(const uint64_t (&w)[4]) {
  return _mm256_setr_epi64x(int64_t(w[0]), int64_t(w[1]), int64_t(w[2]), int64_t(w[3]));
}

#else

struct Bits16 {
  uint16_t lane[kLanes];
};

inline Bits16 load(const uint16_t* p) {
  Bits16 bits;
  std::memcpy(bits.lane, p, sizeof(bits.lane));
  return bits;
}

inline void store(uint16_t* p, const Bits16& bits) {
  std::memcpy(p, bits.lane, sizeof(bits.lane));
}

#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)

struct Float16 {
  __m512 v;
};

inline Float16 operator*(Float16 a, Float16 b) {
  return {_mm512_mul_ps(a.v, b.v)};
}

template <class T>
Float16 widen(Bits16 bits);
template <class T>
Bits16 narrow(Float16 x);

template <>
inline Float16 widen<Half>(Bits16 bits) {
  return {_mm512_cvtph_ps(bits)};
}

template <>
inline Bits16 narrow<Half>(Float16 x) {
  return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

template <>
inline Float16 widen<BFloat16>(Bits16 bits) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}

// In integers, because VCVTNEPS2BF16 flushes subnormals to zero.
template <>
inline Bits16 narrow<BFloat16>(Float16 x) {
  const __m512i word = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(word, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i top = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7FC0));
  return _mm512_cvtepi32_epi16(top);
}

#elif defined(__AVX2__)

struct Float16 {
  __m256 low, high;
};

inline Float16 operator*(Float16 a, Float16 b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}

template <class T>
Float16 widen(Bits16 bits);
template <class T>
Bits16 narrow(Float16 x);

template <>
inline Float16 widen<Half>(Bits16 bits) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(bits)), _mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1))};
}

template <>
inline Bits16 narrow<Half>(Float16 x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return _mm256_set_m128i(_mm256_cvtps_ph(x.high, kNearest), _mm256_cvtps_ph(x.low, kNearest));
}

inline __m256 widen_bf16(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

template <>
inline Float16 widen<BFloat16>(Bits16 bits) {
  return {widen_bf16(_mm256_castsi256_si128(bits)), widen_bf16(_mm256_extracti128_si256(bits, 1))};
}

inline __m256i narrow_bf16(__m256 x) {
  const __m256i word = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(word, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(word, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7FC0), nan);
}

template <>
inline Bits16 narrow<BFloat16>(Float16 x) {
  // Packing works within 128-bit halves, so the four quarters come out as 0 2 1 3.
  const __m256i packed = _mm256_packus_epi32(narrow_bf16(x.low), narrow_bf16(x.high));
  return _mm256_permute4x64_epi64(packed, 0b11011000);
}

#else

struct Float16 {
  float lane[kLanes];
};

inline Float16 operator*(const Float16& a, const Float16& b) {
  Float16 product;
  for (int i = 0; i < kLanes; ++i) product.lane[i] = a.lane[i] * b.lane[i];
  return product;
}

template <class T>
Float16 widen(const Bits16& bits) {
  Float16 x;
  for (int i = 0; i < kLanes; ++i) x.lane[i] = float(T(bits.lane[i], T::from_bits()));
  return x;
}

template <class T>
Bits16 narrow(const Float16& x) {
  Bits16 bits;
  for (int i = 0; i < kLanes; ++i) bits.lane[i] = T(x.lane[i]).x;
  return bits;
}

#endif

}  // namespace lutserve
