// Causal attention of a ragged batch over the paged cache on the CPU: softmax online (arXiv 1805.02867) over 64 keys at
// a time, in float32.
//
// A row is one query head at one token. What is computed for it depends on its own keys alone: keys are taken in chunks
// and parts that begin at multiples of their sizes, and a row's sums run over them in that order, whichever rows share
// its tile, whichever thread has it, and whether one thread takes all of its parts or several do.
#include "attention/cpu_attention.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "cpu_product.h"
#include "cpu_vector.h"

namespace {

using namespace nybble;

constexpr int KEYS = 64;         // of a chunk
constexpr int PART = 512;        // keys whose sums are made apart from those of other parts, a multiple of KEYS
constexpr int TILE_ROWS = 64;    // most rows of a tile, which share the packed keys and values
constexpr int TURNS = 4;         // fewer items than this for each thread are split by parts
constexpr float LOG2E = 1.4426950408889634f;
constexpr int ALIGNMENT = 64;

// Queries [first, first + count) of a request, and KV heads [head, head + heads) with the query heads that share them.
// Row r of it is query head r % group of query r / group % count of KV head r / group / count.
struct Tile {
  int request, head, heads, first, count;
};

// Of each row: the largest score, the sum of 2^(score - largest), and that sum of values [width].
struct State {
  float* largest;
  float* total;
  float* values;
};

// Rows of `part` are added to those of `state`; a row that saw no key of a part is left as it was.
void merge(const State& state, const State& part, int rows, int width) {
  for (int r = 0; r < rows; r++) {
    float ours = state.largest[r], theirs = part.largest[r];
    if (theirs == -INFINITY) continue;
    float* to = state.values + r * width;
    const float* from = part.values + r * width;
    if (ours == -INFINITY) {
      std::memcpy(to, from, width * sizeof(float));
      state.largest[r] = theirs, state.total[r] = part.total[r];
      continue;
    }
    float most = theirs <= ours ? ours : theirs;
    Floats keep = exp2_of(broadcast(ours - most)), take = exp2_of(broadcast(theirs - most));
    for (int d = 0; d < width; d += LANES) store(to + d, load(to + d) * keep + load(from + d) * take);
    state.largest[r] = most, state.total[r] = state.total[r] * keep[0] + part.total[r] * take[0];
  }
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Memory = std::unique_ptr<float, Free>;

Memory allocate(size_t floats) {
  const size_t bytes = (floats * sizeof(float) / ALIGNMENT + 1) * ALIGNMENT;
  Memory memory(static_cast<float*>(std::aligned_alloc(ALIGNMENT, bytes)));
  if (!memory) throw std::bad_alloc();
  return memory;
}

// One thread's share of a call, and the memory it works in.
template <typename T>
class Worker {
 public:
  explicit Worker(const CpuAttention& a) : a(a), group(a.heads / a.kv_heads), width(padded(a.dim)) {
    memory = allocate(TILE_ROWS * (width + KEYS) + KEYS * (a.dim + width) + 2 * TILE_ROWS * state_size());
    q = memory.get();
    scores = q + TILE_ROWS * width, keys = scores + TILE_ROWS * KEYS, values = keys + KEYS * a.dim;
    float* at = values + KEYS * width;
    total = take_state(at, TILE_ROWS), part_sums = take_state(at, TILE_ROWS);
  }

  // Floats of a row's state.
  int state_size() const { return width + 2; }

  // The state of `rows` rows in memory that `at` points to, and then points behind.
  State take_state(float*& at, int rows) const {
    State state{at + rows * width, at + rows * (width + 1), at};
    at += rows * state_size();
    return state;
  }

  int rows_of(const Tile& tile) const { return tile.heads * tile.count * group; }

  // Keys that a tile's queries see, [begin, end).
  void bounds(const Tile& tile, int& begin, int& end) const {
    int position = first_position(tile);
    begin = a.window ? std::max(0, position - a.window + 1) : 0;
    end = position + tile.count;
  }

  // A tile's result; `upcoming` is the tile after it, null for the last.
  void whole(const Tile& tile, const Tile* upcoming) {
    int begin, end, rows = rows_of(tile);
    bounds(tile, begin, end);
    load_queries(tile);
    clear(total, rows);
    for (int part = begin / PART; part * PART < end; part++) {
      const bool last = (part + 1) * PART >= end;
      attend(tile, std::max(begin, part * PART), std::min(end, (part + 1) * PART), part_sums,
             last ? upcoming : nullptr);
      merge(total, part_sums, rows, width);
    }
    write(tile, total);
  }

  void one_part(const Tile& tile, int part, const State& sums) {
    int begin, end;
    bounds(tile, begin, end);
    load_queries(tile);
    attend(tile, std::max(begin, part * PART), std::min(end, (part + 1) * PART), sums, nullptr);
  }

  // out = sums / total
  void write(const Tile& tile, const State& sums) const {
    for (int r = 0; r < rows_of(tile); r++) {
      T* to = static_cast<T*>(a.out) + row_offset(tile, r, int64_t(a.heads) * a.dim);
      Floats divisor = broadcast(sums.total[r]);
      for (int d = 0; d < a.dim; d += LANES) store(to + d, load(sums.values + r * width + d) / divisor, a.dim - d);
    }
  }

 private:
  // Nothing seen yet: a row that sees no number ends as 0 / 0.
  void clear(const State& state, int rows) const {
    std::fill(state.largest, state.largest + rows, -INFINITY);
    std::fill(state.total, state.total + rows, 0.0f);
    std::memset(state.values, 0, sizeof(float) * rows * width);
  }

  int first_position(const Tile& tile) const {
    int queries = a.query_start[tile.request + 1] - a.query_start[tile.request];
    return a.seq_lens[tile.request] - queries + tile.first;
  }

  int64_t row_offset(const Tile& tile, int r, int64_t stride) const {
    int of_head = tile.count * group;
    int64_t token = a.query_start[tile.request] + tile.first + r % of_head / group;
    return token * stride + int64_t((tile.head + r / of_head) * group + r % group) * a.dim;
  }

  void load_queries(const Tile& tile) {
    Floats scale = broadcast(a.scale * LOG2E);
    for (int r = 0; r < rows_of(tile); r++) {
      const T* from = static_cast<const T*>(a.q) + row_offset(tile, r, a.q_stride);
      for (int d = 0; d < a.dim; d += LANES) store(q + r * width + d, load(from + d, a.dim - d) * scale);
    }
  }

  // The sums of a tile's rows over keys [begin, end) of one part.
  void attend(const Tile& tile, int begin, int end, const State& sums, const Tile* upcoming) {
    const int all = rows_of(tile), rows = tile.count * group, position = first_position(tile);
    clear(sums, all);
    for (int chunk = begin / KEYS * KEYS; chunk < end; chunk += KEYS) {
      int first = std::max(begin - chunk, 0), last = std::min(end - chunk, KEYS), columns = padded(last);
      find_keys(tile, chunk, first, last, keys_at);
      std::copy(keys_at + first, keys_at + last, ahead + first);
      if (chunk + KEYS < end)
        find_keys(tile, chunk + KEYS, first, std::min(last, end - chunk - KEYS), ahead);
      else if (upcoming != nullptr)
        find_first_keys(*upcoming, first, last);
      for (int head = 0; head < tile.heads; head++) {
        const int row = head * rows;
        pack_keys(head * a.dim, first, last);
        const bool numbers = pack_values(head * a.dim, first, last);
        product(scores, KEYS, q + row * width, width, keys, KEYS, rows, a.dim, columns, false);
        for (int r = 0; r < rows; r++) soften(sums, row + r, scores + r * KEYS, position + r / group - chunk, columns);
        if (numbers)
          product(sums.values + row * width, width, scores, KEYS, values, width, rows, last, width, true);
        else
          add_seen(sums, row, rows, position - chunk, first, last);
      }
    }
  }

  // A chunk's values with infinities or NaN among them, which a weight of zero would not keep away: each row adds just
  // those that it sees.
  void add_seen(const State& sums, int row, int rows, int own, int first, int last) const {
    for (int r = 0; r < rows; r++) {
      const int newest = own + r / group;
      const int from = a.window ? std::max(first, newest - a.window + 1) : first, to = std::min(last, newest + 1);
      if (from < to)
        product(sums.values + (row + r) * width, width, scores + r * KEYS + from, KEYS, values + from * width, width, 1,
                to - from, width, true);
    }
  }

  // Where the keys [first, last) of a chunk begin, at the tile's first head.
  void find_keys(const Tile& tile, int chunk, int first, int last, const T** places) const {
    const int32_t* table = a.block_table + tile.request * a.table_stride;
    const int64_t stride = int64_t(a.kv_heads) * a.dim;
    const T* base = static_cast<const T*>(a.cache) + int64_t(tile.head) * a.dim;
    for (int i = first; i < last;) {
      int block = (chunk + i) / a.block_size, offset = (chunk + i) % a.block_size;
      const T* row = base + (int64_t(table[block]) * a.block_size + offset) * stride;
      for (; i < last && offset < a.block_size; i++, offset++, row += stride) places[i] = row;
    }
  }

  // The first keys of a tile, as far as they are places ahead of a chunk's [first, last).
  void find_first_keys(const Tile& tile, int first, int last) {
    int begin, end;
    bounds(tile, begin, end);
    const int chunk = begin / KEYS * KEYS;
    first = std::max(first, begin - chunk), last = std::min(last, end - chunk);
    if (first < last) find_keys(tile, chunk, first, last, ahead);
  }

  // keys [dim][KEYS]: a column for each key, so that a product's lanes are keys. Only [first, last) are read.
  void pack_keys(int at, int first, int last) {
    for (int i = first / LANES * LANES; i < last; i += LANES)
      for (int d = 0; d < a.dim; d += LANES) {
        Floats x[LANES];
        float* to = keys + d * KEYS + i;
        if (i >= first && i + LANES <= last && d + LANES <= a.dim) {  // the same, without a look at each
#pragma GCC unroll 16
          for (int j = 0; j < LANES; j++) {
            x[j] = load(keys_at[i + j] + at + d);
            __builtin_prefetch(ahead[i + j] + at + d);
          }
          transpose(x);
#pragma GCC unroll 16
          for (int j = 0; j < LANES; j++) store(to + j * KEYS, x[j]);
          continue;
        }
        for (int j = 0; j < LANES; j++)
          x[j] = i + j >= first && i + j < last ? load(keys_at[i + j] + at + d, a.dim - d) : Floats{};
        transpose(x);
        for (int j = 0; j < std::min(LANES, a.dim - d); j++) store(to + j * KEYS, x[j]);
      }
  }

  // values [KEYS][width]; what is before `first` may be anything in the cache, and is taken as zeros. Whether all are
  // finite.
  bool pack_values(int at, int first, int last) {
    Floats odd{};  // x - x is not zero for an infinity or NaN
    const int dim = a.dim, whole = dim / LANES * LANES;
    float* to = values;
    std::memset(to, 0, sizeof(float) * first * width);
    to += first * width;
    for (int i = first; i < last; i++, to += width) {
      const T *from = keys_at[i] + at + a.plane_size, *next = ahead[i] + at + a.plane_size;
      for (int d = 0; d < whole; d += LANES) {
        Floats x = load(from + d);
        store(to + d, x);
        odd += x - x;
        __builtin_prefetch(next + d);
      }
      if (whole < dim) {
        Floats x = load(from + whole, dim - whole);
        store(to + whole, x);
        odd += x - x;
      }
    }
    return sum(odd) == 0;
  }

  // The scores of row r become weights 2^(score - largest), zero for keys that its query, the chunk's key `own`, does
  // not see; what the row has so far is brought to the new largest score.
  void soften(const State& sums, int r, float* row, int own, int columns) {
    const int oldest = a.window ? own - a.window + 1 : INT32_MIN;
    const Ints lanes = lane_numbers();
    Floats most = broadcast(sums.largest[r]);
    for (int i = 0; i < columns; i += LANES) {
      Ints at = lanes + i;
      Floats x = select((at <= own) & (at >= oldest), load(row + i), broadcast(-INFINITY));
      store(row + i, x);
      most = larger(x, most);
    }
    const float now = largest(most);
    if (now == -INFINITY) {  // sees none of these, and saw none before
      std::memset(row, 0, sizeof(float) * columns);
      return;
    }
    Floats all{};
    for (int i = 0; i < columns; i += LANES) {
      Floats x = exp2_of(load(row + i) - now);
      store(row + i, x);
      all += x;
    }
    if (now != sums.largest[r]) {
      Floats less = exp2_of(broadcast(sums.largest[r] - now));
      sums.total[r] *= less[0];
      float* values_of = sums.values + r * width;
      for (int d = 0; d < width; d += LANES) store(values_of + d, load(values_of + d) * less);
      sums.largest[r] = now;
    }
    sums.total[r] += sum(all);
  }

  const CpuAttention& a;
  const int group, width;
  Memory memory;
  float *q, *scores, *keys, *values;
  State total, part_sums;
  // Where a chunk's keys are, and those of the chunk after it, which are asked for on the way.
  const T *keys_at[KEYS], *ahead[KEYS];
};

// A part of a tile, as several threads share it.
struct Piece {
  int tile, part;
};

// The tiles of a call: each of as many KV heads as it may, up to `most_heads`: they lie side by side in the cache.
template <typename T>
std::vector<Tile> tiles_of(const CpuAttention& a, int most_heads) {
  const int group = a.heads / a.kv_heads, most = std::max(1, TILE_ROWS / group);
  std::vector<Tile> tiles;
  for (int request = 0; request < a.requests; request++) {
    const int queries = a.query_start[request + 1] - a.query_start[request];
    if (a.seq_lens[request] == 0) continue;
    for (int first = 0; first < queries; first += most) {
      const int count = std::min(most, queries - first);
      const int heads = std::min(most_heads, std::max(1, TILE_ROWS / (count * group)));
      for (int head = 0; head < a.kv_heads; head += heads)
        tiles.push_back({request, head, std::min(heads, a.kv_heads - head), first, count});
    }
  }
  return tiles;
}

template <typename T>
void run_whole(const CpuAttention& a, const std::vector<Tile>& tiles) {
  const int64_t count = tiles.size();
  take_turns(a.parallel, a.threads, count, [&](auto next) {
    Worker<T> worker(a);
    for (int64_t i = next(); i < count;) {
      const int64_t after = next();
      worker.whole(tiles[i], after < count ? &tiles[after] : nullptr);
      i = after;
    }
  });
}

// Threads share the tiles by parts, whose sums are then merged as one thread would have done.
template <typename T>
void run_parts(const CpuAttention& a, const std::vector<Tile>& tiles) {
  const Worker<T> sizes(a);
  const int64_t count = tiles.size();
  std::vector<Piece> pieces;
  std::vector<size_t> first_piece;
  int64_t rows = 0;
  for (int i = 0; i < count; i++) {
    int begin, end;
    sizes.bounds(tiles[i], begin, end);
    first_piece.push_back(pieces.size());
    for (int part = begin / PART; part * PART < end; part++, rows += sizes.rows_of(tiles[i]))
      pieces.push_back({i, part});
  }
  first_piece.push_back(pieces.size());
  const int64_t total = pieces.size();
  if (total == count) return run_whole<T>(a, tiles);
  const auto memory = allocate(rows * sizes.state_size());
  std::vector<State> sums;
  float* at = memory.get();
  for (const Piece& piece : pieces) sums.push_back(sizes.take_state(at, sizes.rows_of(tiles[piece.tile])));
  take_turns(a.parallel, a.threads, total, [&](auto next) {
    Worker<T> worker(a);
    for (int64_t i; (i = next()) < total;) worker.one_part(tiles[pieces[i].tile], pieces[i].part, sums[i]);
  });
  take_turns(a.parallel, a.threads, count, [&](auto next) {
    for (int64_t i; (i = next()) < count;) {
      const State& whole = sums[first_piece[i]];
      for (size_t j = first_piece[i] + 1; j < first_piece[i + 1]; j++)
        merge(whole, sums[j], sizes.rows_of(tiles[i]), padded(a.dim));
      sizes.write(tiles[i], whole);
    }
  });
}

template <typename T>
void run(const CpuAttention& a) {
  for (int request = 0; request < a.requests; request++)
    if (a.seq_lens[request] == 0) {  // rows that only pad
      const int64_t first = a.query_start[request], width = int64_t(a.heads) * a.dim;
      std::memset(static_cast<T*>(a.out) + first * width, 0, sizeof(T) * width * (a.query_start[request + 1] - first));
    }
  const size_t enough = a.threads == 1 ? 0 : TURNS * a.threads;
  auto tiles = tiles_of<T>(a, a.kv_heads);
  if (tiles.size() < enough) tiles = tiles_of<T>(a, 1);
  if (tiles.size() < enough)
    run_parts<T>(a, tiles);
  else
    run_whole<T>(a, tiles);
}

}  // namespace

extern "C" int nybble_cpu_attention(const CpuAttention* a) {
  if (a->heads / a->kv_heads > TILE_ROWS) return -1;
  return by_type(a->type, [&](auto value) { run<decltype(value)>(*a); });
}
