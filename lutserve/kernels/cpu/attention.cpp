// lutserve::lut_attention: softmax(q k^T) v over a paged cache with a table for the exponential. Schema, rule
// and layout: kernels/attention.py.

#include "attention_arguments.h"
#include "attention_work.h"

namespace lutserve {
namespace {

constexpr char kOp[] = "lut_attention";

void lut_attention(const Tensor& query, const Tensor& cache, const Tensor& block_table, const Tensor& query_start,
                   const Tensor& lengths, const Tensor& out, double scale, int64_t window,
                   const std::optional<Tensor>& exp_table, const std::optional<Tensor>& recip_table, bool fp16_sum) {
  const ScalarType dtype = query.scalar_type();
  STD_TORCH_CHECK((dtype == ScalarType::Half || dtype == ScalarType::BFloat16) && cache.scalar_type() == dtype &&
                      out.scalar_type() == dtype,
                  "lut_attention: query, cache and out must be all float16 or all bfloat16");
  STD_TORCH_CHECK(query.dim() == 3 && out.dim() == 3 && cache.dim() == 4 && cache.size(3) == 2 * query.size(2) &&
                      out.size(0) == query.size(0) && out.size(1) == query.size(1) && out.size(2) == query.size(2),
                  "lut_attention: query and out must be [tokens, heads, head size] and cache [blocks, kv heads, "
                  "block size, 2 * head size]");
  const int64_t heads = query.size(1), size = query.size(2), kv_heads = cache.size(1), block_size = cache.size(2);
  STD_TORCH_CHECK(size % 16 == 0 && size > 0 && size <= 256 && block_size % kGroup == 0 && block_size > 0,
                  "lut_attention: head size must be a multiple of 16 up to 256, block size a multiple of 16");
  STD_TORCH_CHECK(kv_heads > 0 && heads > 0 && heads % kv_heads == 0,
                  "lut_attention: heads must be a multiple of kv heads");
  STD_TORCH_CHECK(query.stride(2) == 1 && out.stride(2) == 1 && cache.stride(3) == 1 && cache.stride(2) == 2 * size,
                  "lut_attention: the last dimension of query and out and each block of the cache must be "
                  "contiguous");
  const int64_t requests = lengths.numel();
  const Problem problem{
      static_cast<const uint16_t*>(query.const_data_ptr()), static_cast<uint16_t*>(out.mutable_data_ptr()),
      static_cast<const uint16_t*>(cache.const_data_ptr()), indices(kOp, block_table, 2), indices(kOp, query_start, 1),
      indices(kOp, lengths, 1), query.stride(0), query.stride(1), out.stride(0), out.stride(1), cache.stride(0),
      cache.stride(1), block_table.stride(0), block_size, size, heads / kv_heads, window, float(scale),
      fp16_table(kOp, exp_table), {fp16_table(kOp, recip_table), fp16_sum}};
  check_requests(kOp, problem, block_table, query_start, requests, query.size(0), cache.size(0));
  const auto run = dtype == ScalarType::Half ? attend<Attention<HalfProduct>> : attend<Attention<BFloat16Product>>;
  run(problem, requests, kv_heads);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lutserve, CPU, library) {
  library.impl("lut_attention", TORCH_BOX(&lut_attention));
}

}  // namespace lutserve
