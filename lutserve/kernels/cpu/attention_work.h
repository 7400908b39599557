// Which thread computes which part of an attention when; what a part computes is the template argument A
// (attention_steps.h).
//
// The work is cut into tiles (some query positions of one request and one kv head, with all query heads of
// its group) and chunks of kChunk keys. Scores of all chunks come first, then each row's maximum is final, then
// weights and their products chunk by chunk. Sums are formed within a chunk and chunks added in order, so
// a row's result depends neither on its tile nor on who computes which chunk.
#pragma once

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "attention_steps.h"
#include "tensor.h"

namespace lutserve {

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
template <class A>
void attend_tile(const A& tile, Arena& arena) {
  using Left = typename A::Left;
  const Range all = tile.chunks();
  const int64_t rows = tile.rows, size = tile.p.size;
  const int64_t floats = rows * (kStride * all.count() + 2 * size + 3) + tile.queries() + tile.weights();
  arena.reserve(floats * int64_t(sizeof(float)) + 64 * 8);
  Left* q = arena.take<Left>(tile.queries());
  float* scores = arena.take<float>(rows * kStride * all.count());
  Left* weights = arena.take<Left>(tile.weights());
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

template <class A>
void attend_tiles(const typename A::Problem& problem, const std::vector<Tile>& tiles, bool all) {
  // The last tiles of a request see most keys: first, so that threads end together.
  share(int64_t(tiles.size()), all, [&](int64_t i) {
    static thread_local Arena arena;
    attend_tile(A(problem, tiles[tiles.size() - 1 - size_t(i)]), arena);
  });
}

// A chunk of a tile, and where its intermediate results are.
template <class A>
struct Piece {
  A tile;
  int64_t chunk;
  float *scores, *maxima, *sums, *part;
};

// Few tiles with many keys: chunks are shared among the threads as well.
template <class A>
void attend_pieces(const typename A::Problem& problem, const std::vector<Tile>& tiles) {
  using Left = typename A::Left;
  static thread_local Arena arena;
  int64_t rows = 0;
  for (const Tile& tile : tiles) {
    const A one(problem, tile);
    rows += one.rows * one.chunks().count();
  }
  arena.reserve(rows * (kStride + problem.size + 2) * int64_t(sizeof(float)) + 64 * 8);
  float *scores = arena.take<float>(rows * kStride), *part = arena.take<float>(rows * problem.size);
  float *maxima = arena.take<float>(rows), *sums = arena.take<float>(rows);
  std::vector<Piece<A>> pieces;
  std::vector<size_t> firsts;
  int64_t at = 0;
  for (const Tile& tile : tiles) {
    const A one(problem, tile);
    firsts.push_back(pieces.size());
    for (int64_t c = one.chunks().begin; c < one.chunks().end; ++c, at += one.rows) {
      pieces.push_back({one, c, scores + at * kStride, maxima + at, sums + at, part + at * problem.size});
    }
  }
  firsts.push_back(pieces.size());
  const auto count = int64_t(pieces.size());
  share(count, true, [&](int64_t i) {
    static thread_local Arena own;
    const Piece<A>& piece = pieces[size_t(i)];
    own.reserve(piece.tile.queries() * int64_t(sizeof(Left)) + 64);
    Left* q = own.take<Left>(piece.tile.queries());
    piece.tile.pack_queries(q);
    piece.tile.score(q, piece.chunk, piece.scores, piece.maxima);
  });
  // A tile's pieces lie one after another, so the first one's arrays become the whole tile's.
  const auto fold = [&](auto combine) {
    for (size_t t = 0; t < tiles.size(); ++t) {
      for (size_t i = firsts[t] + 1; i < firsts[t + 1]; ++i) combine(pieces[firsts[t]], pieces[i]);
    }
  };
  fold([](const Piece<A>& to, const Piece<A>& from) {
    for (int64_t r = 0; r < to.tile.rows; ++r) to.maxima[r] = std::max(to.maxima[r], from.maxima[r]);
  });
  fold([](const Piece<A>& from, const Piece<A>& to) {
    std::copy(from.maxima, from.maxima + from.tile.rows, to.maxima);
  });
  share(count, true, [&](int64_t i) {
    static thread_local Arena own;
    const Piece<A>& piece = pieces[size_t(i)];
    own.reserve(piece.tile.weights() * int64_t(sizeof(Left)) + 64);
    Left* weights = own.take<Left>(piece.tile.weights());
    piece.tile.weigh(piece.chunk, piece.scores, piece.maxima, weights, piece.sums, piece.part);
  });
  fold([&](const Piece<A>& to, const Piece<A>& from) {
    add(to.part, from.part, to.tile.rows * problem.size);
    add(to.sums, from.sums, to.tile.rows);
  });
  for (size_t t = 0; t < tiles.size(); ++t) {
    const Piece<A>& whole = pieces[firsts[t]];
    whole.tile.finish(whole.sums, whole.part);
  }
}

template <class A>
void attend(const typename A::Problem& problem, int64_t requests, int64_t kv_heads) {
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
      for (int64_t first = 0; first < queries; first += tiles.back().count) {
        const int64_t context = problem.lengths[request] - queries + first;
        tiles.push_back({request, head, first, std::min({positions, queries - first, A::most_positions(context)})});
        const A tile(problem, tiles.back());
        chunks += tile.chunks().count();
        products += 2 * tile.rows * tile.keys().count() * problem.size;
      }
    }
  }
  const int64_t threads = torch::stable::get_num_threads(), count = int64_t(tiles.size());
  // A few tiles that do not divide evenly would leave threads idle.
  const bool uneven = count < 4 * threads && count % threads != 0 && chunks > count;
  if (uneven && products > kShared) return attend_pieces<A>(problem, tiles);
  attend_tiles<A>(problem, tiles, threads > 1 && products > kGrain);
}

}  // namespace lutserve
