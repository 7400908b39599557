// lutserve::cache_write: keys and values into the paged cache. Schema and layout: kernels/attention.py.

#include "attention_tile.h"
#include "tensor.h"

namespace lutserve {
namespace {

struct Source {
  const uint16_t* data;
  int64_t token, head;  // elements from one to the next
};

Source source(const Tensor& x) {
  return {static_cast<const uint16_t*>(x.const_data_ptr()), x.stride(0), x.stride(1)};
}

// One token of one head into its place in a block.
template <class T>
void write(const uint16_t* key, const uint16_t* value, uint16_t* block, int64_t offset, int64_t block_size,
           int64_t size) {
  const int64_t group = offset / kGroup * kGroup * size, lane = offset % kGroup;
  uint16_t* keys = block + group;
  uint16_t* values = block + block_size * size + group;
  for (int64_t d = 0; d < size; ++d) keys[packed<T>(d, lane, kGroup)] = key[d];
  for (int64_t d = 0; d < size; ++d) values[packed<T>(lane, d, size)] = value[d];
}

void cache_write(const Tensor& key, const Tensor& value, const Tensor& cache, const Tensor& slots) {
  const ScalarType dtype = cache.scalar_type();
  STD_TORCH_CHECK((dtype == ScalarType::Half || dtype == ScalarType::BFloat16) && key.scalar_type() == dtype &&
                      value.scalar_type() == dtype,
                  "cache_write: key, value and cache must be all float16 or all bfloat16");
  STD_TORCH_CHECK(cache.dim() == 4 && key.dim() == 3 && value.dim() == 3, "cache_write: key and value must be "
                  "[tokens, kv heads, head size] and cache [blocks, kv heads, block size, 2 * head size]");
  const int64_t heads = key.size(1), size = key.size(2), block_size = cache.size(2), count = slots.numel();
  STD_TORCH_CHECK(cache.size(1) == heads && cache.size(3) == 2 * size && value.size(1) == heads &&
                      value.size(2) == size && key.size(0) >= count && value.size(0) >= count,
                  "cache_write: key and value must be [tokens, kv heads, head size] and cache [blocks, kv heads, "
                  "block size, 2 * head size]");
  STD_TORCH_CHECK(size % 16 == 0 && block_size % kGroup == 0,
                  "cache_write: head size and block size must be multiples of 16");
  STD_TORCH_CHECK(slots.scalar_type() == ScalarType::Long && slots.dim() == 1 && slots.is_contiguous(),
                  "cache_write: slots must be a contiguous int64 [tokens]");
  STD_TORCH_CHECK(cache.stride(3) == 1 && cache.stride(2) == 2 * size,
                  "cache_write: each block and head of the cache must be contiguous");
  STD_TORCH_CHECK(key.stride(2) == 1 && value.stride(2) == 1, "cache_write: the last dimension must be contiguous");
  const auto* slot = static_cast<const int64_t*>(slots.const_data_ptr());
  const int64_t end = cache.size(0) * block_size;
  for (int64_t t = 0; t < count; ++t) STD_TORCH_CHECK(slot[t] < end, "cache_write: a slot is outside the cache");
  auto* data = static_cast<uint16_t*>(cache.mutable_data_ptr());
  const int64_t block_stride = cache.stride(0), head_stride = cache.stride(1);
  const auto run = dtype == ScalarType::Half ? write<Half> : write<BFloat16>;
  const Source keys = source(key), values = source(value);
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, heads * size));
  torch::stable::parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      if (slot[t] < 0) continue;
      uint16_t* block = data + slot[t] / block_size * block_stride;
      for (int64_t h = 0; h < heads; ++h) {
        run(keys.data + t * keys.token + h * keys.head, values.data + t * values.token + h * values.head,
            block + h * head_stride, slot[t] % block_size, block_size, size);
      }
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lutserve, CPU, library) {
  library.impl("cache_write", TORCH_BOX(&cache_write));
}

}  // namespace lutserve
