// What the operators that attend require of the tensors that describe requests, and of tables.
#pragma once

#include <optional>

#include "attention_steps.h"
#include "tensor.h"

namespace lutserve {

inline const uint16_t* fp16_table(const char* op, const std::optional<Tensor>& table) {
  if (!table) return nullptr;
  STD_TORCH_CHECK(table->scalar_type() == ScalarType::Half && table->dim() == 1 && table->numel() == 65536 &&
                      table->is_contiguous(),
                  op, ": a table must be a contiguous float16 [65536]");
  return static_cast<const uint16_t*>(table->const_data_ptr());
}

inline const int32_t* indices(const char* op, const Tensor& x, int64_t dimensions) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Int && x.dim() == dimensions &&
                      (x.size(dimensions - 1) <= 1 || x.stride(dimensions - 1) == 1),
                  op, ": block_table [requests, blocks], query_start [requests + 1] and lengths [requests] "
                  "must be int32 with contiguous rows");
  return static_cast<const int32_t*>(x.const_data_ptr());
}

// Everything that a problem's indices point at: `rows` queries and `blocks` blocks.
inline void check_requests(const char* op, const Problem& problem, const Tensor& table, const Tensor& starts,
                           int64_t requests, int64_t rows, int64_t blocks) {
  STD_TORCH_CHECK(starts.numel() == requests + 1 && table.size(0) == requests,
                  op, ": block_table [requests, blocks] and query_start [requests + 1] must fit lengths");
  STD_TORCH_CHECK(problem.starts[0] >= 0 && problem.starts[requests] <= rows,
                  op, ": query_start must lie within query");
  for (int64_t i = 0; i < requests; ++i) {
    const int64_t queries = problem.starts[i + 1] - problem.starts[i], keys = problem.lengths[i];
    STD_TORCH_CHECK(queries >= 0 && (queries == 0 || queries <= keys) &&
                        (queries == 0 || keys <= table.size(1) * problem.block_size),
                    op, ": a request's queries must be among its keys, and those in its blocks");
    for (int64_t b = 0; queries > 0 && b * problem.block_size < keys; ++b) {
      const int64_t block = problem.blocks[i * problem.blocks_row + b];
      // Blocks that have left the sliding window hold nothing and are not read.
      const bool read = problem.window <= 0 || (b + 1) * problem.block_size > keys - queries + 1 - problem.window;
      STD_TORCH_CHECK(!read || (block >= 0 && block < blocks), op, ": a block is outside the cache");
    }
  }
}

}  // namespace lutserve
