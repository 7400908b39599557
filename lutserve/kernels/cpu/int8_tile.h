// What the two kinds of int8_linear's tiles have in common: what they read and where they write.
#pragma once

#include <cstdint>

#include "vec.h"

namespace lutserve {
namespace {

constexpr int64_t kColumns = 32;  // of a panel
constexpr int64_t kGroup = 4;     // input columns that lie together

struct Panel {
  const uint8_t* weight;     // [groups][32][4]
  const float* scales;       // [32]
  const uint16_t* outliers;  // [slots], n apart
  const uint16_t* bias;      // or null
  uint16_t* out;             // rows n apart
  int64_t n, width;
  const float* wide;  // [slots][32], see widen_outliers
};

struct Activations {
  const int32_t* words;  // [groups][words of a group] of a tile's rows
  const float* side;     // [slots] of a tile's rows
  const float* scales;
  const int32_t* sums;
  int64_t groups, slots;
};

}  // namespace
}  // namespace lutserve
