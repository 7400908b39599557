// lutserve::lut_attention: softmax(q k^T) v over a paged cache with a table for the exponential. Schema, rule
// and layout: kernels/attention.py.
//
// The work is cut into tiles (some query positions of one request and one kv head, with all query heads of
// its group) and chunks of kChunk keys. Scores of all chunks come first, then each row's maximum is final, then
// weights and their products chunk by chunk. Sums are formed within a chunk and chunks added in order, so
// a row's result depends neither on its tile nor on who computes which chunk.

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>

#include "attention_steps.h"
#include "tensor.h"

namespace lutserve {
namespace {

constexpr int64_t kTileRows = 24;
constexpr int64_t kTileScores = 1 << 18;  // scores that a tile may keep, if it has more rows than one position
constexpr int64_t kGrain = 1 << 19;       // products that are worth waking other threads: about 10 us of work
constexpr int64_t kShared = 1 << 22;      // products that are worth two more barriers

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Memory that a thread keeps from call to call.
class Arena {
 public:
  template <class T>
  T* take(int64_t count) {
    const int64_t size = (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    used_ += size;
    return reinterpret_cast<T*>(memory_.get() + used_ - size);
  }
  void reserve(int64_t size) {
    used_ = 0;
    if (size <= size_) return;
    memory_.reset(static_cast<char*>(std::aligned_alloc(64, size_t(size + 63) / 64 * 64)));
    if (!memory_) throw std::bad_alloc();
    size_ = size;
  }

 private:
  std::unique_ptr<char, Free> memory_;
  int64_t size_ = 0, used_ = 0;
};

// to += from, element by element.
inline void add(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// A whole tile on one thread.
template <class P>
void attend_tile(const Attention<P>& tile, Arena& arena) {
  using Left = typename P::Left;
  const Range all = tile.chunks();
  const int64_t rows = tile.rows, size = tile.p.size;
  const int64_t floats = rows * (kStride * (all.count() + 1) + 3 * size + 4);
  arena.reserve(floats * int64_t(sizeof(float)) + 64 * 8);
  Left* q = arena.take<Left>(rows * size);
  float* scores = arena.take<float>(rows * kStride * all.count());
  Left* weights = arena.take<Left>(rows * kStride);
  float *part = arena.take<float>(rows * size), *total = arena.take<float>(rows * size);
  float *maxima = arena.take<float>(rows), *some = arena.take<float>(rows), *sums = arena.take<float>(rows);
  tile.pack_queries(q);
  std::fill(maxima, maxima + rows, -std::numeric_limits<float>::infinity());
  for (int64_t c = 0; c < all.count(); ++c) {
    tile.score(q, all.begin + c, scores + c * rows * kStride, some);
    for (int64_t r = 0; r < rows; ++r) maxima[r] = std::max(maxima[r], some[r]);
  }
  std::fill(total, total + rows * size, 0.0f);
  std::fill(sums, sums + rows, 0.0f);
  for (int64_t c = 0; c < all.count(); ++c) {
    tile.weigh(all.begin + c, scores + c * rows * kStride, maxima, weights, some, part);
    add(total, part, rows * size);
    add(sums, some, rows);
  }
  tile.finish(sums, total);
}

// Calls body(i) for 0 <= i < count, on all threads or on this one; each takes the next as it becomes free.
template <class Body>
void share(int64_t count, bool all, const Body& body) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, count, all ? 1 : std::max<int64_t>(count, 1), [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) body(i);
  });
}

template <class P>
void attend_tiles(const Problem& problem, const std::vector<Tile>& tiles, bool all) {
  // The last tiles of a request see most keys: first, so that threads end together.
  share(int64_t(tiles.size()), all, [&](int64_t i) {
    static thread_local Arena arena;
    attend_tile(Attention<P>(problem, tiles[tiles.size() - 1 - size_t(i)]), arena);
  });
}

// A chunk of a tile, and where its intermediate results are.
template <class P>
struct Piece {
  Attention<P> tile;
  int64_t chunk;
  float *scores, *maxima, *sums, *part;
};

// Few tiles with many keys: chunks are shared among the threads as well.
template <class P>
void attend_pieces(const Problem& problem, const std::vector<Tile>& tiles) {
  using Left = typename P::Left;
  static thread_local Arena arena;
  int64_t rows = 0;
  for (const Tile& tile : tiles) {
    const Attention<P> one(problem, tile);
    rows += one.rows * one.chunks().count();
  }
  arena.reserve(rows * (kStride + problem.size + 2) * int64_t(sizeof(float)) + 64 * 8);
  float *scores = arena.take<float>(rows * kStride), *part = arena.take<float>(rows * problem.size);
  float *maxima = arena.take<float>(rows), *sums = arena.take<float>(rows);
  std::vector<Piece<P>> pieces;
  std::vector<size_t> firsts;
  int64_t at = 0;
  for (const Tile& tile : tiles) {
    const Attention<P> one(problem, tile);
    firsts.push_back(pieces.size());
    for (int64_t c = one.chunks().begin; c < one.chunks().end; ++c, at += one.rows) {
      pieces.push_back({one, c, scores + at * kStride, maxima + at, sums + at, part + at * problem.size});
    }
  }
  firsts.push_back(pieces.size());
  const auto count = int64_t(pieces.size());
  share(count, true, [&](int64_t i) {
    static thread_local Arena own;
    const Piece<P>& piece = pieces[size_t(i)];
    own.reserve(piece.tile.rows * problem.size * int64_t(sizeof(Left)) + 64);
    Left* q = own.take<Left>(piece.tile.rows * problem.size);
    piece.tile.pack_queries(q);
    piece.tile.score(q, piece.chunk, piece.scores, piece.maxima);
  });
  // A tile's pieces lie one after another, so the first one's arrays become the whole tile's.
  const auto fold = [&](auto combine) {
    for (size_t t = 0; t < tiles.size(); ++t) {
      for (size_t i = firsts[t] + 1; i < firsts[t + 1]; ++i) combine(pieces[firsts[t]], pieces[i]);
    }
  };
  fold([](const Piece<P>& to, const Piece<P>& from) {
    for (int64_t r = 0; r < to.tile.rows; ++r) to.maxima[r] = std::max(to.maxima[r], from.maxima[r]);
  });
  fold([](const Piece<P>& from, const Piece<P>& to) {
    std::copy(from.maxima, from.maxima + from.tile.rows, to.maxima);
  });
  share(count, true, [&](int64_t i) {
    static thread_local Arena own;
    const Piece<P>& piece = pieces[size_t(i)];
    own.reserve(piece.tile.rows * kStride * int64_t(sizeof(Left)) + 64);
    Left* weights = own.take<Left>(piece.tile.rows * kStride);
    piece.tile.weigh(piece.chunk, piece.scores, piece.maxima, weights, piece.sums, piece.part);
  });
  fold([&](const Piece<P>& to, const Piece<P>& from) {
    add(to.part, from.part, to.tile.rows * problem.size);
    add(to.sums, from.sums, to.tile.rows);
  });
  for (size_t t = 0; t < tiles.size(); ++t) {
    const Piece<P>& whole = pieces[firsts[t]];
    whole.tile.finish(whole.sums, whole.part);
  }
}

template <class P>
void attend(const Problem& problem, int64_t requests, int64_t kv_heads) {
  std::vector<Tile> tiles;
  int64_t chunks = 0, products = 0;
  for (int64_t request = 0; request < requests; ++request) {
    const int64_t queries = problem.starts[request + 1] - problem.starts[request];
    if (queries == 0) continue;
    const int64_t keys = problem.window > 0 ? std::min<int64_t>(problem.lengths[request], problem.window + kTileRows)
                                            : problem.lengths[request];
    const int64_t most = std::clamp(kTileScores / std::max<int64_t>(keys, 1), int64_t(kRows), kTileRows);
    const int64_t positions = std::max<int64_t>(1, most / problem.group);
    for (int64_t head = 0; head < kv_heads; ++head) {
      for (int64_t first = 0; first < queries; first += positions) {
        tiles.push_back({request, head, first, std::min(positions, queries - first)});
        const Attention<P> tile(problem, tiles.back());
        chunks += tile.chunks().count();
        products += 2 * tile.rows * tile.keys().count() * problem.size;
      }
    }
  }
  const int64_t threads = torch::stable::get_num_threads(), count = int64_t(tiles.size());
  // A few tiles that do not divide evenly would leave threads idle.
  const bool uneven = count < 4 * threads && count % threads != 0 && chunks > count;
  if (uneven && products > kShared) return attend_pieces<P>(problem, tiles);
  attend_tiles<P>(problem, tiles, threads > 1 && products > kGrain);
}

const uint16_t* fp16_table(const std::optional<Tensor>& table) {
  if (!table) return nullptr;
  STD_TORCH_CHECK(table->scalar_type() == ScalarType::Half && table->dim() == 1 && table->numel() == 65536 &&
                      table->is_contiguous(),
                  "lut_attention: a table must be a contiguous float16 [65536]");
  return static_cast<const uint16_t*>(table->const_data_ptr());
}

const int32_t* indices(const Tensor& x, int64_t dimensions) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Int && x.dim() == dimensions &&
                      (x.size(dimensions - 1) <= 1 || x.stride(dimensions - 1) == 1),
                  "lut_attention: block_table [requests, blocks], query_start [requests + 1] and lengths [requests] "
                  "must be int32 with contiguous rows");
  return static_cast<const int32_t*>(x.const_data_ptr());
}

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
      static_cast<const uint16_t*>(cache.const_data_ptr()), indices(block_table, 2), indices(query_start, 1),
      indices(lengths, 1), query.stride(0), query.stride(1), out.stride(0), out.stride(1), cache.stride(0),
      cache.stride(1), block_table.stride(0), block_size, size, heads / kv_heads, window, float(scale),
      fp16_table(exp_table), {fp16_table(recip_table), fp16_sum}};
  STD_TORCH_CHECK(query_start.numel() == requests + 1 && block_table.size(0) == requests,
                  "lut_attention: block_table [requests, blocks] and query_start [requests + 1] must fit lengths");
  STD_TORCH_CHECK(problem.starts[0] >= 0 && problem.starts[requests] <= query.size(0),
                  "lut_attention: query_start must lie within query");
  for (int64_t i = 0; i < requests; ++i) {
    const int64_t queries = problem.starts[i + 1] - problem.starts[i], keys = problem.lengths[i];
    STD_TORCH_CHECK(queries >= 0 && (queries == 0 || queries <= keys) &&
                        (queries == 0 || keys <= block_table.size(1) * block_size),
                    "lut_attention: a request's queries must be among its keys, and those in its blocks");
    for (int64_t b = 0; queries > 0 && b * block_size < keys; ++b) {
      const int64_t block = problem.blocks[i * problem.blocks_row + b];
      // Blocks that have left the sliding window hold nothing and are not read.
      const bool read = window <= 0 || (b + 1) * block_size > keys - queries + 1 - window;
      STD_TORCH_CHECK(!read || (block >= 0 && block < cache.size(0)), "lut_attention: a block is outside the cache");
    }
  }
  const auto run = dtype == ScalarType::Half ? attend<HalfProduct> : attend<BFloat16Product>;
  run(problem, requests, kv_heads);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lutserve, CPU, library) {
  library.impl("lut_attention", TORCH_BOX(&lut_attention));
}

}  // namespace lutserve
