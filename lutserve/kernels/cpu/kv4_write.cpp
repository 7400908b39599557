// lutserve::kv4_write and kv4_keep_tail: keys and values into a cache of 4 bits a value. Schema, rule and layout:
// kernels/kv4.py.

#include "kv4_page.h"
#include "tensor.h"

namespace lutserve {
namespace {

struct Source {
  const uint16_t* data;
  int64_t token, head;  // elements from one to the next

  explicit Source(const Tensor& x)
      : data(static_cast<const uint16_t*>(x.const_data_ptr())), token(x.stride(0)), head(x.stride(1)) {}
  const uint16_t* at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

struct Coding {
  const float* bounds;
  float divisor;

  // Sixteen groups' scales, as numbers, from their largest magnitudes; `invalid` is NaN where a group is.
  F32 scale(const F32& top, const F32& invalid) const {
    return cast<F32>(widen<Half>(narrow<Half>(cast<Float16>(top / divisor + invalid))));
  }
  I32 indices(const F32& x, const F32& scale) const {
    const F32 quotient = cast<F32>(widen<Half>(narrow<Half>(cast<Float16>(x / scale))));
    const F32 ratio = scale == 0.0f ? F32{} : quotient;
    I32 count = {};
    for (int i = 0; i < 15; ++i) count -= ratio > bounds[i];
    return count;
  }
};

inline F32 magnitude(const F32& x) {
  return cast<F32>(cast<I32>(x) & int32_t(0x7FFFFFFF));
}

inline uint16_t half_bits(float x) {
  return Half(x).x;
}

inline void put_nibble(uint8_t* byte, int64_t odd, int32_t index) {
  *byte = odd ? uint8_t((*byte & 15) | index << 4) : uint8_t((*byte & 0xF0) | index);
}

// One token's keys or values: at(d) is the byte of channel d, odd(d) the half of it.
template <class T, class At, class Odd>
void write_token(const Coding& coding, const uint16_t* from, int64_t size, uint8_t* scales, At at, Odd odd) {
  for (int64_t first = 0; first < size; first += kChannels, scales += 2 * kGroup) {
    const int64_t end = std::min(size, first + kChannels);
    F32 top = {}, invalid = {};
    for (int64_t d = first; d < end; d += kLanes) {
      const F32 x = cast<F32>(widen<T>(load(from + d)));
      top = larger(magnitude(x), top);
      invalid += x * 0.0f;
    }
    const F32 scale = coding.scale(spread(largest_of(top)), spread(sum_of(invalid)));
    const uint16_t bits = half_bits(scale[0]);
    std::memcpy(scales, &bits, sizeof(bits));
    for (int64_t d = first; d < end; d += kLanes) {
      const I32 indices = coding.indices(cast<F32>(widen<T>(load(from + d))), scale);
      for (int64_t i = 0; i < kLanes; ++i) put_nibble(at(d + i), odd(d + i), indices[i]);
    }
  }
}

// A unit's values, kUnit rows of `size`, to indices and scales.
template <class T>
void write_unit(const Coding& coding, const uint16_t* const* rows, int64_t size, uint8_t* values, uint16_t* scales) {
  for (int64_t d = 0; d < size; d += kLanes) {
    F32 top = {}, invalid = {};
    for (int64_t t = 0; t < kUnit; ++t) {
      const F32 x = cast<F32>(widen<T>(load(rows[t] + d)));
      top = larger(magnitude(x), top);
      invalid += x * 0.0f;
    }
    const F32 scale = coding.scale(top, invalid);
    store(scales + d, narrow<Half>(cast<Float16>(scale)));
    for (int64_t t = 0; t < kUnit; t += 2) {
      const I32 even = coding.indices(cast<F32>(widen<T>(load(rows[t] + d))), scale);
      const I32 both = even | coding.indices(cast<F32>(widen<T>(load(rows[t + 1] + d))), scale) << 4;
      uint8_t* to = values + t / 2 * size + d;
      for (int64_t i = 0; i < kLanes; ++i) to[i] = uint8_t(both[i]);
    }
  }
}

struct Target {
  uint8_t* data;
  int64_t block, head;  // bytes from one to the next
  Layout layout;
  const int64_t* slots;
  int64_t count;

  uint8_t* page(int64_t slot, int64_t h) const { return data + slot / layout.block_size * block + h * head; }
  uint16_t* tail(uint8_t* page, int64_t token) const {
    return reinterpret_cast<uint16_t*>(page + layout.tail()) + token % kUnit * layout.size;
  }
};

template <class T>
void write(const Coding& key_coding, const Coding& value_coding, const Source& key, const Source& value,
           const Target& to, int64_t h) {
  const Layout& layout = to.layout;
  for (int64_t t = 0; t < to.count; ++t) {
    const int64_t slot = to.slots[t], token = slot % layout.block_size;
    if (slot < 0) continue;
    uint8_t* page = to.page(slot, h);
    uint8_t* keys = page + layout.keys(token) + token % kGroup;
    write_token<T>(key_coding, key.at(t, h), layout.size, page + layout.key_scales() + layout.scale(token),
                   [&](int64_t d) { return keys + d / 2 * kGroup; }, [](int64_t d) { return d % 2; });
    if (!layout.by_unit) {
      uint8_t* values = page + layout.values(token) + token % kGroup / 2 * layout.size;
      write_token<T>(value_coding, value.at(t, h), layout.size, page + layout.value_scales() + layout.scale(token),
                     [&](int64_t d) { return values + d; }, [&](int64_t) { return token % 2; });
    } else if (token % kUnit == kUnit - 1) {
      const uint16_t* rows[kUnit];
      int64_t back = 0;
      for (; back < kUnit && back <= t && to.slots[t - back] == slot - back; ++back) {
        rows[kUnit - 1 - back] = value.at(t - back, h);
      }
      for (; back < kUnit; ++back) rows[kUnit - 1 - back] = to.tail(page, token - back);
      auto* scales = reinterpret_cast<uint16_t*>(page + layout.value_scales()) + token / kUnit * layout.size;
      write_unit<T>(value_coding, rows, layout.size, page + layout.values(token - kUnit + 1), scales);
    }
  }
}

Target target(const char* op, const Tensor& x, const Tensor& cache, const Tensor& slots, bool by_unit) {
  STD_TORCH_CHECK((x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16) &&
                      cache.scalar_type() == ScalarType::Byte,
                  op, ": values must be float16 or bfloat16, the cache uint8");
  STD_TORCH_CHECK(cache.dim() == 4 && x.dim() == 3 && x.size(2) % 16 == 0 && x.size(2) > 0 && x.size(2) <= kMostSize,
                  op, ": the cache must be [blocks, kv heads, block size, bytes] and the others [tokens, heads, head "
                  "size] with a head size that is a multiple of 16 up to 256");
  const Layout layout{cache.size(2), x.size(2), by_unit};
  STD_TORCH_CHECK(layout.block_size > 0 && layout.block_size % (by_unit ? kUnit : kGroup) == 0 &&
                      cache.size(3) == layout.bytes_per_token(),
                  op, ": block size must be a multiple of ", by_unit ? kUnit : kGroup, ", and the cache have ",
                  layout.bytes_per_token(), " bytes a token");
  STD_TORCH_CHECK(cache.size(1) == x.size(1) && x.size(0) >= slots.numel(),
                  op, ": keys and values must be [tokens, kv heads, head size] with a token for each slot");
  STD_TORCH_CHECK(slots.scalar_type() == ScalarType::Long && slots.dim() == 1 && slots.is_contiguous(),
                  op, ": slots must be a contiguous int64 [tokens]");
  STD_TORCH_CHECK(cache.stride(3) == 1 && cache.stride(2) == cache.size(3) && x.stride(2) == 1,
                  op, ": each block and head of the cache, and the last dimension, must be contiguous");
  const auto* slot = static_cast<const int64_t*>(slots.const_data_ptr());
  for (int64_t t = 0; t < slots.numel(); ++t) {
    STD_TORCH_CHECK(slot[t] < cache.size(0) * layout.block_size, op, ": a slot is outside the cache");
  }
  return {static_cast<uint8_t*>(cache.mutable_data_ptr()), cache.stride(0), cache.stride(1), layout, slot,
          slots.numel()};
}

// Heads are shared among threads, tokens are not: two of them may have their halves of one byte.
template <class Body>
void each_head(const Target& to, int64_t heads, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, to.count * to.layout.size));
  torch::stable::parallel_for(0, heads, grain, [&](int64_t first, int64_t last) {
    for (int64_t h = first; h < last; ++h) body(h);
  });
}

void kv4_write(const Tensor& key, const Tensor& value, const Tensor& cache, const Tensor& slots,
               const Tensor& bounds, double key_divisor, double value_divisor, bool by_unit) {
  const Target to = target("kv4_write", key, cache, slots, by_unit);
  STD_TORCH_CHECK(value.scalar_type() == key.scalar_type() && value.dim() == 3 && value.size(1) == key.size(1) &&
                      value.size(2) == key.size(2) && value.size(0) >= to.count && value.stride(2) == 1,
                  "kv4_write: keys and values must have one dtype and shape");
  STD_TORCH_CHECK(bounds.scalar_type() == ScalarType::Float && bounds.dim() == 2 && bounds.size(0) == 2 &&
                      bounds.size(1) == 15 && bounds.is_contiguous(),
                  "kv4_write: bounds must be a contiguous float32 [2, 15]");
  const auto* bound = static_cast<const float*>(bounds.const_data_ptr());
  const Coding keys{bound, float(key_divisor)}, values{bound + 15, float(value_divisor)};
  const auto run = key.scalar_type() == ScalarType::Half ? write<Half> : write<BFloat16>;
  each_head(to, key.size(1), [&](int64_t h) { run(keys, values, Source(key), Source(value), to, h); });
}

void kv4_keep_tail(const Tensor& value, const Tensor& cache, const Tensor& slots) {
  const Target to = target("kv4_keep_tail", value, cache, slots, true);
  const Source from(value);
  each_head(to, value.size(1), [&](int64_t h) {
    for (int64_t t = 0; t < to.count; ++t) {
      const int64_t slot = to.slots[t], left = kUnit - 1 - slot % kUnit;
      if (slot < 0 || (t + left < to.count && to.slots[t + left] == slot + left)) continue;
      std::memcpy(to.tail(to.page(slot, h), slot), from.at(t, h), size_t(to.layout.size) * sizeof(uint16_t));
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lutserve, CPU, library) {
  library.impl("kv4_write", TORCH_BOX(&kv4_write));
  library.impl("kv4_keep_tail", TORCH_BOX(&kv4_keep_tail));
}

}  // namespace lutserve
