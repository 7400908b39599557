// One group's sums of lutserve::axcore_strict: products of a few rows with 32 columns, added in fp16 in order.
//
// A product is an entry of a table, by activation and code. Where activation and products are normal numbers,
// a table of FPMA is one addition to the activation's pattern, in fp32 patterns as in fp16 ones; then no table
// is read. Sums are kept in fp32 and rounded to fp16 after every addition: fp32 holds the sum of two fp16
// numbers closely enough that the second rounding is as good as a single one.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "lut_indices.h"

namespace lutserve {

constexpr int32_t kOne = 0x3C00, kInfinity = 0x7C00;  // fp16 patterns
constexpr int32_t kRebias = 112 << 23;                // what an fp32 pattern has more than an fp16 one moved up
// Instead of 0, which no addition to a pattern gives. Their sums with each other are normal fp32 numbers, and
// those with all others less than half a unit in the last fp32 place of any fp16 number: adding them to a sum
// changes nothing.
constexpr int32_t kNoActivation = 70 << 23, kNoWeight = -(67 << 23);
constexpr int32_t kLookUp = 0;  // instead of an activation whose products must be looked up

using Words = uint16_t __attribute__((vector_size(32)));
using Bits = int32_t __attribute__((vector_size(sizeof(Vec))));
// fp16 numbers, and sums with a multiple of 2^13 in their patterns: three bytes are not 0.
using Codes = Indices<3>;

inline bool all_ones(const Words& mask) {
  const auto words = cast<std::array<uint64_t, 4>>(mask);
  return (words[0] & words[1] & words[2] & words[3]) == ~uint64_t(0);
}

// What the codes add to an activation's pattern, read off the products of 1.
struct Addends {
  Words added, none;  // to fp16 patterns; all ones where products are 0
  int32_t wide[kLanes];  // to fp32 patterns
  int32_t largest = std::numeric_limits<int32_t>::min();

  explicit Addends(const uint16_t* products) {
    for (int c = 0; c < kLanes; ++c) {
      const uint16_t product = products[kOne * kLanes + c];
      const int32_t magnitude = product & 0x7FFF, more = (magnitude - kOne) * (1 << 13);
      none[c] = magnitude ? 0 : 0xFFFF;
      added[c] = uint16_t(product - kOne);
      wide[c] = magnitude ? int32_t(uint32_t(more) + (uint32_t(product & 0x8000) << 16)) : kNoWeight;
      if (magnitude) largest = std::max(largest, more);
    }
  }

  // The activation as an fp32 pattern, or kLookUp. row: its products.
  int32_t activation(uint16_t x, const uint16_t* row) const {
    const Words found = cast<Words>(load(row)), magnitude = found & 0x7FFF;
    if ((x & 0x7FFF) == 0) return all_ones(Words(magnitude == 0)) ? kNoActivation : kLookUp;
    const Words normal = Words(magnitude >= 0x0400) & Words(magnitude < kInfinity);
    const Words sum = Words(found == added + x) & normal;
    if (!all_ones((none & Words(magnitude == 0)) | (~none & sum))) return kLookUp;
    return int32_t((uint32_t(x & 0x7FFF) << 13) + kRebias + (uint32_t(x & 0x8000) << 16));
  }
};

// The activations of one group for one table, and whether a sum of their products may leave fp16's range.
inline bool prepare(const Addends& addends, const uint16_t* products, const uint16_t* x, int64_t count,
                    int32_t* activations) {
  float bound = 0.0f;
  for (int64_t k = 0; k < count; ++k) {
    const uint16_t* row = products + x[k] * kLanes;
    activations[k] = addends.activation(x[k], row);
    if (activations[k] != kLookUp) {
      bound += std::fabs(cast<float>(activations[k] + addends.largest));
    } else {
      uint16_t most = 0;
      for (int c = 0; c < kLanes; ++c) most = std::max<uint16_t>(most, row[c] & 0x7FFF);
      bound += most < kInfinity ? float(Half(most, Half::from_bits())) : std::numeric_limits<float>::infinity();
    }
  }
  // Roundings add at most a factor of (1 + 2^-11)^1024 < 1.65.
  return bound >= 32768.0f || count > 1024;
}

// One row of activations and one panel, in one group.
struct Strand {
  const int32_t* activations;
  bool may_overflow;
  const uint16_t *x, *products;
  const uint8_t* codes;
  const float* weights;  // [group][32], addends as fp32 patterns
};

// The numbers of a table that the codes of one octet select: to[8][32].
inline void look_up(const Codes::Table& table, const uint8_t* octet, float* to) {
  for (int v = 0; v < kPanelVectors; ++v) {
    Codes::each(table, octet, v, [&](int k, const Vec& x) { store_vec(to + k * kColumns + v * kVec, x); });
  }
}

// The products of an activation with a panel's weights in column k, written to a part of to[8][32].
inline const float* look_up_products(const Strand& strand, int64_t k, float* to) {
  alignas(64) float row[kLanes];
  store_f32(row, cast<F32>(widen<Half>(load(strand.products + strand.x[k] * kLanes))));
  look_up(Codes::Table(row), strand.codes + k / kOctet * Codes::kOctetBytes, to);
  return to + k % kOctet * kColumns;
}

// x to 11 significant bits, ties to even; below 2^-14 sums of fp16 numbers have no more.
inline Vec round_significand(const Vec& x) {
  const Vec power = cast<Vec>(cast<Bits>(x) & int32_t(0xFF800000));
  return multiply_add(power, spread_vec(-8192.0f), multiply_add(power, spread_vec(8192.0f), x));
}

inline F32 round_to_half(const F32& x) {
  return cast<F32>(widen<Half>(narrow<Half>(cast<Float16>(x))));
}

// sum[kPanelVectors] += products, rounded to fp16.
template <bool kMayOverflow, size_t... V>
__attribute__((always_inline)) inline void add_products(Vec* sum, const float* weights, int32_t activation,
                                                        std::index_sequence<V...>) {
  ((sum[V] = sum[V] + cast<Vec>(cast<Bits>(load_vec(weights + V * kVec)) + activation)), ...);
  if constexpr (kMayOverflow) {
    for (int i = 0; i < 2; ++i) {
      F32 x;
      std::memcpy(&x, reinterpret_cast<const float*>(sum) + i * kLanes, sizeof(x));
      store_f32(reinterpret_cast<float*>(sum) + i * kLanes, round_to_half(x));
    }
  } else {
    ((sum[V] = round_significand(sum[V])), ...);
  }
}

// sums[S][32] += `count` columns of S strands whose products need no look-up. The folds unroll before the
// compiler decides what lives in registers, and a function of its own keeps the sums there.
template <bool kMayOverflow, size_t... S, size_t... I>
__attribute__((noinline)) void add_columns(const int32_t* const* activations, const float* const* weights,
                                           int64_t count, float* sums, std::index_sequence<S...>,
                                           std::index_sequence<I...>) {
  constexpr auto kAll = std::make_index_sequence<kPanelVectors>{};
  const int32_t* const x[] = {activations[S]...};
  const float* const w[] = {weights[S]...};
  Vec sum[] = {load_vec(sums + I * kVec)...};
  for (int64_t k = 0; k < count; ++k) {
    (add_products<kMayOverflow>(sum + S * kPanelVectors, w[S] + k * kColumns, x[S][k], kAll), ...);
  }
  (store_vec(sums + I * kVec, sum[I]), ...);
}

// sums[S][32] of S strands; kMayOverflow: of one of them at least.
template <bool kMayOverflow, size_t... S>
void sum_up(const Strand* strands, int64_t group, float* sums, std::index_sequence<S...> all) {
  constexpr auto kVectors = std::make_index_sequence<sizeof...(S) * kPanelVectors>{};
  std::fill(sums, sums + sizeof...(S) * kColumns, 0.0f);
  for (int64_t begin = 0; begin < group; ++begin) {
    int64_t end = begin;
    while (end < group && ((strands[S].activations[end] != kLookUp) && ...)) ++end;
    const int32_t* activations[] = {strands[S].activations + begin...};
    const float* weights[] = {strands[S].weights + begin * kColumns...};
    add_columns<kMayOverflow>(activations, weights, end - begin, sums, all, kVectors);
    if (end == group) break;
    alignas(64) float found[sizeof...(S)][kOctet * kColumns];
    const int32_t* last[] = {strands[S].activations + end...};
    const float* terms[] = {*last[S] == kLookUp ? look_up_products(strands[S], end, found[S])
                                                : strands[S].weights + end * kColumns...};
    add_columns<kMayOverflow>(last, terms, 1, sums, all, kVectors);
    begin = end;
  }
}

}  // namespace lutserve
