// 4-bit indices into a table of 16 numbers, looked up in registers.
//
// A dword of a packed octet holds the indices of one output column and eight input columns, in the order
// that lets word and dword permutations look up straight from a shifted register, without masks: a word
// permutation reads only the low bits of each 16-bit word (the table lies there twice), a dword permutation
// those of each dword.
#pragma once

#include "gemm_fp32.h"

namespace lutserve {

// Indices as a source of fp32 weights. kPlanes: bytes that a value of the table needs, from the top (bf16 and
// whole numbers up to 127 need two, fp16 three).
template <int kPlanes>
struct Indices : ExactProducts {
  static constexpr int64_t kOctetBytes = kColumns * kOctet / 2;
  static constexpr int kOrder[kOctet] = {0, 2, 4, 6, 1, 3, 5, 7};  // nibble -> row of the octet

#if defined(__AVX512F__)
  struct Table {
    Vec values;
    explicit Table(const float* book) : values(_mm512_loadu_ps(book)) {}
  };

  template <class Use>
  __attribute__((always_inline)) static void each(const Table& table, const uint8_t* octet, int vector, Use use) {
    const __m512i raw = _mm512_loadu_si512(octet + vector * 64);
    for (int s = 0; s < kOctet; ++s) use(kOrder[s], _mm512_permutexvar_ps(_mm512_srli_epi32(raw, 4 * s), table.values));
  }
#elif defined(__AVX2__)
  // A byte shuffle looks 32 indices up at once, a byte of the value at a time; unpacking puts the bytes together.
  struct Table {
    __m256i plane[3];
    explicit Table(const float* book) {
      for (int p = 0; p < 3; ++p) {
        uint8_t bytes[16];
        for (int i = 0; i < 16; ++i) bytes[i] = uint8_t(cast<uint32_t>(book[i]) >> (24 - 8 * p));
        plane[p] = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
      }
    }
  };

  template <class Use>
  __attribute__((always_inline)) static void each(const Table& table, const uint8_t* octet, int vector, Use use) {
    // Four columns by four bytes, transposed: a dword then holds the same nibbles of four columns.
    const __m256i transpose = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                               0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i nibble = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(octet + vector * 32));
    const __m256i bytes = _mm256_shuffle_epi8(raw, transpose);
    const __m256i index[2] = {_mm256_and_si256(bytes, nibble), _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble)};
    for (int half = 0; half < 2; ++half) {
      const __m256i top = _mm256_shuffle_epi8(table.plane[0], index[half]);
      const __m256i next = _mm256_shuffle_epi8(table.plane[1], index[half]);
      const __m256i last = kPlanes == 3 ? _mm256_shuffle_epi8(table.plane[2], index[half]) : zero;
      const __m256i high[2] = {_mm256_unpacklo_epi8(next, top), _mm256_unpackhi_epi8(next, top)};
      const __m256i low[2] = {kPlanes == 3 ? _mm256_unpacklo_epi8(zero, last) : zero,
                              kPlanes == 3 ? _mm256_unpackhi_epi8(zero, last) : zero};
      for (int pair = 0; pair < 2; ++pair) {
        const int nibbles = 4 * pair + half;
        use(kOrder[nibbles], _mm256_castsi256_ps(_mm256_unpacklo_epi16(low[pair], high[pair])));
        use(kOrder[nibbles + 2], _mm256_castsi256_ps(_mm256_unpackhi_epi16(low[pair], high[pair])));
      }
    }
  }
#else
  struct Table {
    const float* values;
    explicit Table(const float* book) : values(book) {}
  };

  template <class Use>
  __attribute__((always_inline)) static void each(const Table& table, const uint8_t* octet, int vector, Use use) {
    uint32_t raw[kVec];
    std::memcpy(raw, octet + vector * sizeof(raw), sizeof(raw));
    for (int s = 0; s < kOctet; ++s) {
      Vec w;
      for (int i = 0; i < kVec; ++i) w[i] = table.values[raw[i] >> (4 * s) & 15];
      use(kOrder[s], w);
    }
  }
#endif
};

}  // namespace lutserve
