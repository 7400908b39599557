// The softmax of attention, row by row, once the row's maximum is final: scores to weights, weights to a sum.
#pragma once

#include <cmath>
#include <limits>

#include "attention_tile.h"

namespace lutserve {

constexpr int64_t kChunk = 512;  // keys whose sums are formed at once

// Largest of scores[begin, end), NaN ignored; begin and end may be any.
inline float row_maximum(const float* scores, int64_t begin, int64_t end) {
  float top = -std::numeric_limits<float>::infinity();
  int64_t k = begin;
  const auto one_by_one = [&](int64_t to) {
    for (; k < to; ++k) top = scores[k] > top ? scores[k] : top;
  };
  one_by_one(std::min(end, (begin + kLanes - 1) / kLanes * kLanes));
  Part tops[kParts];
  for (Part& t : tops) t = everywhere(top);
  for (; k + kLanes <= end; k += kLanes) {
    for (int i = 0; i < kParts; ++i) {
      Part s;
      std::memcpy(&s, scores + k + i * kPart, sizeof(s));
      tops[i] = s > tops[i] ? s : tops[i];
    }
  }
  one_by_one(end);
  F32 all;
  std::memcpy(&all, tops, sizeof(all));
  return std::max(top, largest_of(all));
}

// What the exponential is taken of: the score minus the row's maximum, saturated where fp16 ends, so that
// a table's entry of minus infinity is never read. NaN stays NaN.
inline F32 below(float maximum, const float* scores) {
  return larger(spread(-65504.0f), load_f32(scores) - maximum);
}

// Calls step(k, seen) for each sixteen keys before `count`; seen(x) is x for keys in [begin, end), 0 for others.
template <class Step>
inline void each_group(int64_t count, int64_t begin, int64_t end, Step step) {
  const auto some = [&](int64_t from, int64_t to) {
    for (int64_t k = from; k < to; k += kLanes) {
      const I32 mask = lanes(begin - k, end - k);
      step(k, [&](const F32& x) { return choose(mask, x, F32{}); });
    }
  };
  const int64_t first = std::min(count, (begin + kLanes - 1) / kLanes * kLanes);
  const int64_t last = std::max(first, end / kLanes * kLanes);
  some(0, first);
  for (int64_t k = first; k < last; k += kLanes) step(k, [](const F32& x) { return x; });
  some(last, count);
}

// Turns `count` scores (whole sixteens, at most kChunk) into weights, which are exactly 0 for keys outside
// [begin, end). Returns their sum before they are rounded to the type that the product takes; NaN where a
// score is NaN, whatever the table says. table: fp16, or null for the exponential itself.
template <class P>
float row_weights(const uint16_t* table, const float* scores, float maximum, typename P::Left* weights, int64_t count,
                  int64_t begin, int64_t end) {
  F32 sum = {};
  if (!table) {
    each_group(count, begin, end, [&](int64_t k, auto seen) {
      const F32 e = seen(exp_negative(below(maximum, scores + k)));
      sum += e;
      P::pack(weights + k, e);
    });
    return sum_of(sum);
  }
  // All patterns, then all look-ups as plain loads, then all weights: a third faster on Zen 4 than sixteen
  // at a time, whether those are scalar loads or a gather instruction.
  alignas(64) uint16_t entries[kChunk];
  F32 invalid = {};
  each_group(count, begin, end, [&](int64_t k, auto seen) {
    const F32 x = below(maximum, scores + k);
    invalid += seen(x * 0.0f);
    store(entries + k, narrow<Half>(cast<Float16>(x)));
  });
  for (int64_t k = 0; k < count; k += kLanes) {
#pragma GCC unroll 16
    for (int64_t i = k; i < k + kLanes; ++i) {
      entries[i] = table[entries[i]];
      asm volatile("" ::: "memory");  // or GCC gathers the entries in vector registers, which takes longer
    }
  }
  each_group(count, begin, end, [&](int64_t k, auto seen) {
    const F32 e = seen(cast<F32>(widen<Half>(load(entries + k))));
    sum += e;
    P::pack(weights + k, e);
  });
  return sum_of(sum + invalid);
}

// The sum of a row's weights and what the row is divided by.
struct Denominator {
  const uint16_t* reciprocals;  // fp16 table of 1/x, or null: divide
  bool fp16;                    // round the sum to fp16, saturated

  // Multiplies (true) or divides (false) by the returned value.
  std::pair<float, bool> of(float sum) const {
    if (fp16 && std::isfinite(sum)) {
      const float rounded = float(Half(sum));
      sum = std::isfinite(rounded) ? rounded : std::copysign(65504.0f, sum);
    }
    if (!reciprocals || !std::isnormal(sum) || sum < 0) return {sum, false};
    // sum = mantissa * 2^exponent with an fp16 mantissa in [1, 2).
    int exponent;
    Half mantissa(2 * std::frexp(sum, &exponent));
    if (mantissa.x == 0x4000) mantissa.x = 0x3C00, ++exponent;
    return {std::ldexp(float(Half(reciprocals[mantissa.x], Half::from_bits())), 1 - exponent), true};
  }
};

}  // namespace lutserve
