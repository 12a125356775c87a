#include "attention.h"

#ifdef __SSE__
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "../parallel.h"
#include "block.h"

namespace alit::attention {

namespace {

using std::int64_t;

const Blocks<float>& number_blocks(InstructionSet set) {
#ifdef ALIT_X86
  if (set >= InstructionSet::avx512) return blocks_avx512;
  if (set == InstructionSet::avx2) return blocks_avx2;
#endif
  (void)set;
  return blocks_baseline;
}

// Calls body(T{}, E{}, blocks) with the C++ type of the rows, that of the elements to multiply, and the functions.
template <typename Body>
void dispatch(Type type, InstructionSet set, const Body& body) {
#ifdef ALIT_AVX512_BF16
  if (type == Type::bfloat16 && set == InstructionSet::avx512_bf16) return body(bfloat16{}, Pair{}, blocks_avx512_bf16);
#endif
  alit::dispatch(type, [&](auto element) { body(element, 0.0f, number_blocks(set)); });
}

int64_t rounded(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// An odd number of cache lines, so that successive rows do not fall into a few sets of the cache.
int64_t odd_lines(int64_t count) { return (rounded(count, kUnit) / kUnit | 1) * kUnit; }

void check(const Side& side, int64_t sequences, const char* name) {
  if (side.offsets == nullptr) return;
  bool fits = side.offsets[0] == 0 && side.offsets[sequences] <= side.length;
  for (int64_t b = 0; b < sequences; ++b) fits &= side.offsets[b] <= side.offsets[b + 1];
  if (!fits) throw std::invalid_argument(std::string(name) + ": expected to ascend from 0 to at most the number of rows");
}

struct Range {
  int64_t first, count;
};

Range rows_of(const Side& side, int64_t sequence) {
  if (side.offsets == nullptr) return {0, side.length};
  return {side.offsets[sequence], side.offsets[sequence + 1] - side.offsets[sequence]};
}

// The query gradients of one head whose keys are cut into pieces. Each piece adds its part to a block of queries after the
// piece before it has, so that every sum has the same order as without pieces.
class Chain {
 public:
  Chain(int pieces, int64_t size) : done_(pieces), data_(size) {}

  float* data() { return data_.data(); }

  // Waits until the piece before has done its part of a block. That piece is under way: tasks are taken in their order.
  void wait(int piece, int64_t block) const {
    while (piece > 0) {
      const int64_t done = done_[piece - 1].load(std::memory_order_acquire);
      if (done == kFailed) throw std::runtime_error("attention: another part of the backward failed");
      if (done > block) return;
      std::this_thread::yield();
    }
  }

  void done(int piece, int64_t blocks) { done_[piece].store(blocks, std::memory_order_release); }

  // Marks a piece as done at the end of the scope, or as failed where it throws: no other piece waits for it any more.
  struct Last {
    ~Last() {
      const bool failed = std::uncaught_exceptions() > exceptions;
      if (chain != nullptr) chain->done(piece, failed ? kFailed : std::numeric_limits<int64_t>::max());
    }
    Chain* chain;
    int piece;
    int exceptions = std::uncaught_exceptions();
  };

 private:
  static constexpr int64_t kFailed = -1;
  std::vector<std::atomic<int64_t>> done_;  // blocks of each piece
  std::vector<float> data_;
};

// One head of one sequence, and which part of it to work on: some of its queries, or one of several pieces of its keys.
struct Task {
  int64_t sequence, head, first, count;
  int piece = 0, pieces = 1;
  std::shared_ptr<Chain> chain = nullptr;  // of several pieces
};

// Indices of the sequences, the costliest first.
std::vector<int64_t> order_of(const Problem& problem) {
  std::vector<int64_t> order(problem.sequences);
  for (int64_t b = 0; b < problem.sequences; ++b) order[b] = b;
  const auto cost = [&](int64_t b) { return rows_of(problem.queries, b).count * rows_of(problem.keys, b).count; };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return cost(a) > cost(b); });
  return order;
}

// Number of parts to cut each head into, so that every thread has `wanted` of them; 1 for a single thread.
int64_t parts_of(const Problem& problem, int64_t wanted, int threads) {
  const int64_t heads = std::max<int64_t>(problem.sequences * problem.heads, 1);
  return threads > 1 ? (wanted * threads + heads - 1) / heads : 1;
}

// Tasks of the forward: one for each head of each sequence, or, where these are few, several, cut between blocks of
// queries. The last queries come first: where queries have stops, these usually see the most keys.
std::vector<Task> forward_tasks(const Problem& problem, int threads) {
  constexpr int64_t kGroup = 3;  // blocks worth packing keys for
  const int64_t wanted = parts_of(problem, 4, threads), least = parts_of(problem, 1, threads);
  std::vector<Task> tasks;
  for (const int64_t b : order_of(problem)) {
    const int64_t count = rows_of(problem.queries, b).count, blocks = (count + kQueries - 1) / kQueries;
    if (count == 0) continue;
    const int64_t parts = std::min({blocks, wanted, std::max(least, blocks / kGroup)});
    const int64_t group = (blocks + parts - 1) / parts * kQueries;
    for (int64_t head = 0; head < problem.heads; ++head) {
      for (int64_t first = (count - 1) / group * group; first >= 0; first -= group) {
        tasks.push_back({b, head, first, std::min(group, count - first)});
      }
    }
  }
  return tasks;
}

// Tasks of the backward: one for each head of each sequence, or, where these are few, one for each piece of its keys.
std::vector<Task> backward_tasks(const Problem& problem, int64_t pitch, int threads) {
  constexpr int64_t kPiece = 128;  // keys worth reading all queries for
  const int64_t wanted = parts_of(problem, 2, threads);
  std::vector<Task> tasks;
  for (const int64_t b : order_of(problem)) {
    const int64_t count = rows_of(problem.queries, b).count, keys = rows_of(problem.keys, b).count;
    const auto pieces = static_cast<int>(std::clamp<int64_t>(keys / kPiece, 1, wanted));
    for (int64_t head = 0; head < problem.heads; ++head) {
      const auto chain = pieces == 1 ? nullptr : std::make_shared<Chain>(pieces, count * pitch);
      for (int piece = 0; piece < pieces; ++piece) tasks.push_back({b, head, 0, count, piece, pieces, chain});
    }
  }
  return tasks;
}

// Memory of one thread, reused by each of its tasks.
class Workspace {
 public:
  explicit Workspace(int64_t size) : data_(new (std::align_val_t{64}) float[static_cast<std::size_t>(size)]) {}

  // Takes `count` numbers or pairs; every allocation begins at a cache line.
  template <typename E = float>
  E* take(int64_t count) {
    static_assert(sizeof(E) == sizeof(float));
    float* piece = data_.get() + used_;
    used_ += rounded(count, kUnit);
    return reinterpret_cast<E*>(piece);
  }

  void reset() { used_ = 0; }

  std::vector<int64_t> kept;

 private:
  struct Free {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  std::unique_ptr<float[], Free> data_;
  int64_t used_ = 0;
};

// Runs the tasks: each free thread takes the next one; which thread takes it does not matter to the result.
template <typename Body>
void run(const std::vector<Task>& tasks, int64_t workspace, int threads, const Body& body) {
  std::atomic<std::size_t> next{0};
  const int workers = static_cast<int>(std::min<std::size_t>(std::max(threads, 1), tasks.size()));
  ThreadPool::instance().run(workers, threads, [&](int) {
    Workspace memory(workspace);  // before a task is taken: others may wait for it
    for (std::size_t task = next++; task < tasks.size(); task = next++) {
      memory.reset();
      body(tasks[task], memory);
    }
  });
}

template <typename T>
T* at(const Rows& rows, const Task& task, int64_t first) {
  return static_cast<T*>(rows.data) + task.sequence * rows.sequence + task.head * rows.head + first * rows.row;
}

float* at(const Sums& sums, const Task& task, int64_t first) {
  return sums.data + task.sequence * sums.sequence + task.head * sums.head + first;
}

// Prefetches a row: rows of one head lie far apart, each on a page of its own, and would come one by one otherwise.
template <int Write, typename T>
void prefetch(T* row, int64_t dim) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t d = 0; d < dim; d += kLine) __builtin_prefetch(row + d, Write);
}

constexpr int64_t kAhead = 16;  // rows

// Gathers rows: row i of the result, `pitch` wide, is row index[i] (or i, without an index) of `data` times `factor`,
// then zeros.
template <typename T>
void gather(const T* data, int64_t stride, const int64_t* index, int64_t count, int64_t dim, float factor, float* out,
            int64_t pitch) {
  for (int64_t i = 0; i < count; ++i, out += pitch) {
    const auto at = [&](int64_t j) { return data + (index == nullptr ? j : index[j]) * stride; };
    if (i + kAhead < count) prefetch<0>(at(i + kAhead), dim);
    const T* row = at(i);
    for (int64_t d = 0; d < dim; ++d) out[d] = load(row[d]) * factor;
    std::fill(out + dim, out + pitch, 0.0f);
  }
}

// Gathers rows as pairs, without a factor.
void gather(const bfloat16* data, int64_t stride, const int64_t* index, int64_t count, int64_t dim, float, Pair* out,
            int64_t pitch) {
  for (int64_t i = 0; i < count; ++i, out += pitch) {
    const auto at = [&](int64_t j) { return data + (index == nullptr ? j : index[j]) * stride; };
    if (i + kAhead < count) prefetch<0>(at(i + kAhead), dim);
    std::memset(out + dim / 2, 0, static_cast<std::size_t>(pitch - dim / 2) * sizeof *out);
    std::memcpy(out, at(i), static_cast<std::size_t>(dim) * sizeof *data);
  }
}

// Rows as a stack, see block.h; rows of numbers are a stack as they are.
const float* stack(const float* rows, int64_t, int64_t, int64_t, float*, int64_t) { return rows; }

const Pair* stack(const Pair* rows, int64_t count, int64_t dim, int64_t row, Pair* out, int64_t pitch) {
  const int64_t depth = (dim + 1) / 2;
  for (int64_t i = 0; i < count; i += 2) {
    const Pair *a = rows + i * row, *b = a + row;
    Pair* own = out + i / 2 * pitch;
    for (int64_t e = 0; e < depth; ++e) {
      const std::uint32_t x = a[e].bits, y = i + 1 < count ? b[e].bits : 0;
      own[2 * e] = {(x & 0xffffu) | (y << 16)};
      own[2 * e + 1] = {(x >> 16) | (y & 0xffff0000u)};
    }
    std::fill(own + 2 * depth, own + pitch, Pair{});
  }
  return out;
}

// Scatters rows, the opposite of gather; row i of the result is row i times factor(i).
template <typename T, typename Factor>
void scatter(const float* rows, int64_t pitch, const int64_t* index, int64_t count, int64_t dim, const Factor& factor,
             T* out, int64_t stride) {
  for (int64_t i = 0; i < count; ++i, rows += pitch) {
    const auto at = [&](int64_t j) { return out + (index == nullptr ? j : index[j]) * stride; };
    if (i + kAhead < count) prefetch<1>(at(i + kAhead), dim);
    T* row = at(i);
    const float f = factor(i);
    for (int64_t d = 0; d < dim; ++d) row[d] = store<T>(rows[d] * f);
  }
}

// Transposes elements d to d + 3 of four rows. Four rows are `pitch` apart, four columns `panel`.
template <typename E>
inline void transpose_4x4(const E* rows, int64_t pitch, E* out, int64_t panel) {
#ifdef __SSE__
  const auto at = [&](int i) { return _mm_loadu_ps(reinterpret_cast<const float*>(rows + i * pitch)); };
  __m128 a = at(0), b = at(1), c = at(2), d = at(3);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  const auto to = [&](int i, __m128 x) { _mm_storeu_ps(reinterpret_cast<float*>(out + i * panel), x); };
  to(0, a), to(1, b), to(2, c), to(3, d);
#else
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) out[j * panel + i] = rows[i * pitch + j];
  }
#endif
}

// Copies rows to panels, see block.h.
template <typename E>
void transpose(const E* rows, int64_t count, int64_t dim, int64_t pitch, E* panels, int64_t panel) {
  for (int64_t first = 0; first < count; first += panel, panels += dim * panel) {
    const int64_t here = std::min(panel, count - first), fours = here / 4 * 4, dims = dim / 4 * 4;
    for (int64_t j = 0; j < fours; j += 4) {
      for (int64_t d = 0; d < dims; d += 4) {
        transpose_4x4(rows + (first + j) * pitch + d, pitch, panels + d * panel + j, panel);
      }
    }
    for (int64_t d = 0; d < dim; ++d) {
      for (int64_t j = d < dims ? fours : 0; j < here; ++j) panels[d * panel + j] = rows[(first + j) * pitch + d];
      std::fill(panels + d * panel + here, panels + (d + 1) * panel, E{});
    }
  }
}

template <typename T>
float dot(const T* a, const T* b, int64_t count) {
  constexpr int kLanes = 8;
  float part[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) part[l] += load(a[i + l]) * load(b[i + l]);
  }
  for (int l = 0; i < count; ++i, ++l) part[l] += load(a[i]) * load(b[i]);
  return ((part[0] + part[4]) + (part[1] + part[5])) + ((part[2] + part[6]) + (part[3] + part[7]));
}

// Number of keys that query n of a sequence sees, whether they take part or not.
int64_t stop_of(const Problem& problem, const Task& task, const Range& keys, int64_t n) {
  if (problem.stops == nullptr) return keys.count;
  const int64_t stop = problem.stops[task.sequence * problem.stops_sequence + n];
  return std::clamp<int64_t>(stop, 0, keys.count);
}

// Writes to `kept` the rows, within the sequence, of keys that take part and that one of `count` queries from `first`
// on sees.
void keep(const Problem& problem, const Task& task, const Range& keys, int64_t first, int64_t count,
          std::vector<int64_t>& kept) {
  int64_t stop = 0;
  for (int64_t n = first; n < first + count && stop < keys.count; ++n) stop = std::max(stop, stop_of(problem, task, keys, n));
  kept.clear();
  for (int64_t j = 0; j < stop; ++j) {
    if (problem.mask == nullptr || problem.mask[task.sequence * problem.mask_sequence + keys.first + j]) kept.push_back(j);
  }
}

// Range of rows, within the sequence, of the keys of this piece; `kept` is cut to those of them that take part. A piece
// has an even number of kept keys, but for the last.
Range cut(const Task& task, const Range& keys, std::vector<int64_t>& kept) {
  const auto count = static_cast<int64_t>(kept.size());
  const int64_t size = rounded((count + task.pieces - 1) / task.pieces, 2 * kUnit);
  const auto row = [&](int64_t i) { return i < count ? kept[i] : keys.count; };
  const int64_t first = std::min(task.piece * size, count), last = std::min(first + size, count);
  const int64_t begin = task.piece == 0 ? 0 : row(first);
  const Range rows{begin, row(last) - begin};
  kept.erase(kept.begin() + last, kept.end());
  kept.erase(kept.begin(), kept.begin() + first);
  return rows;
}

// Writes to `seen` the number of kept keys that each of `count` queries from `first` on sees; returns the largest.
int64_t see(const Problem& problem, const Task& task, const Range& keys, int64_t first, int64_t count,
            const std::vector<int64_t>& kept, int64_t* seen) {
  int64_t most = 0;
  for (int64_t n = 0; n < count; ++n) {
    seen[n] = std::lower_bound(kept.begin(), kept.end(), stop_of(problem, task, keys, first + n)) - kept.begin();
    most = std::max(most, seen[n]);
  }
  return most;
}

int64_t longest(const Problem& problem, const Side& side) {
  int64_t result = 0;
  for (int64_t b = 0; b < problem.sequences; ++b) result = std::max(result, rows_of(side, b).count);
  return result;
}

// Width of the rows of one head as they are multiplied, and their pitch, in elements.
template <typename E>
struct Width {
  using Element = E;
  explicit Width(int64_t dim) : depth(rounded(dim, kNumbers<E>) / kNumbers<E>), row(odd_lines(depth)), pitch(odd_lines(dim)) {}
  // Elements of a stack of `rows` rows, an even number, beside the rows themselves.
  int64_t stack(int64_t rows) const { return kNumbers<E> == 1 ? 0 : rows / 2 * pitch; }
  int64_t depth, row, pitch;
};

// Checks the problem; calls body(T{}, blocks, width, most) with the C++ type of the rows, the functions that multiply
// them, their width, and room for the keys of the longest sequence.
template <typename Body>
void prepared(const Problem& problem, InstructionSet set, const Body& body) {
  check(problem.queries, problem.sequences, "offsets");
  check(problem.keys, problem.sequences, "key_offsets");
  const int64_t most = rounded(longest(problem, problem.keys), kKeys);
  dispatch(problem.type, set, [&](auto number, auto element, const auto& blocks) {
    body(number, blocks, Width<decltype(element)>(problem.dim), most);
  });
}

}  // namespace

void forward(const Problem& problem, Rows q, Rows k, Rows v, Rows out, Sums lse, int threads, InstructionSet set) {
  prepared(problem, set, [&](auto number, const auto& blocks, const auto& width, int64_t most) {
    using T = decltype(number);
    using E = typename std::decay_t<decltype(width)>::Element;
    const int64_t dim = problem.dim, pitch = width.pitch;
    const int64_t for_keys = most * (2 * width.row + width.depth) + width.stack(most);
    const int64_t workspace = for_keys + kQueries * (width.row + pitch + 2) + kScores + 8 * kUnit;
    run(forward_tasks(problem, threads), workspace, threads, [&](const Task& task, Workspace& memory) {
      const Range queries = rows_of(problem.queries, task.sequence), keys = rows_of(problem.keys, task.sequence);
      keep(problem, task, keys, queries.first + task.first, task.count, memory.kept);
      const auto count = static_cast<int64_t>(memory.kept.size());
      const auto packed_rows = [&](const Rows& x) {
        E* rows = memory.take<E>(most * width.row);
        gather(at<const T>(x, task, keys.first), x.row, memory.kept.data(), count, dim, 1.0f, rows, width.row);
        return rows;
      };
      E* panels = memory.take<E>(most * width.depth);
      transpose(packed_rows(k), count, width.depth, width.row, panels, blocks.panel);
      const E* value = packed_rows(v);
      value = stack(value, count, dim, width.row, memory.take<E>(width.stack(most)), pitch);
      Keys<E> packed{count, width.depth, width.row, pitch, panels, value};
      int64_t seen[kQueries];

      E* query = memory.take<E>(kQueries * width.row);
      float *sums = memory.take(kQueries * pitch), *largest = memory.take(kQueries), *sum = memory.take(kQueries);
      float* scores = memory.take(kScores);
      for (int64_t i = 0; i < task.count; i += kQueries) {
        const int64_t rows = std::min(kQueries, task.count - i), first = queries.first + task.first + i;
        gather(at<const T>(q, task, first), q.row, nullptr, rows, dim, problem.scale, query, width.row);
        packed.count = see(problem, task, keys, first, rows, memory.kept, seen);
        if (packed.count > 0) {
          blocks.forward(packed, {rows, query, seen, problem.scale}, sums, largest, sum, scores);
        } else {
          std::fill_n(sums, rows * pitch, 0.0f);
          std::fill_n(largest, rows, 0.0f);
          std::fill_n(sum, rows, 0.0f);
        }
        float* logarithm = at(lse, task, first);
        for (int64_t r = 0; r < rows; ++r) logarithm[r] = largest[r] + std::log(sum[r]);
        const auto inverse = [&](int64_t r) { return sum[r] == 0.0f ? 0.0f : 1.0f / sum[r]; };
        scatter(sums, pitch, nullptr, rows, dim, inverse, at<T>(out, task, first), out.row);
      }
    });
  });
}

void backward(const Problem& problem, Rows grad_out, Sums grad_lse, Rows q, Rows k, Rows v, Rows out, Sums lse, Rows grad_q,
              Rows grad_k, Rows grad_v, int threads, InstructionSet set) {
  prepared(problem, set, [&](auto number, const auto& blocks, const auto& width, int64_t most) {
    using T = decltype(number);
    using E = typename std::decay_t<decltype(width)>::Element;
    const int64_t dim = problem.dim, pitch = width.pitch;
    const int64_t for_keys = most * 2 * (width.row + width.depth + pitch) + width.stack(most);
    const int64_t for_queries = kQueries * (2 * width.row + pitch + 2) + 2 * width.stack(kQueries);
    const int64_t workspace = for_keys + for_queries + 3 * kScores + 16 * kUnit;
    run(backward_tasks(problem, pitch, threads), workspace, threads, [&](const Task& task, Workspace& memory) {
      const Range queries = rows_of(problem.queries, task.sequence), keys = rows_of(problem.keys, task.sequence);
      const Chain::Last last{task.chain.get(), task.piece};
      keep(problem, task, keys, queries.first + task.first, task.count, memory.kept);
      const Range own = cut(task, keys, memory.kept);
      const auto count = static_cast<int64_t>(memory.kept.size());
      const auto panels_of = [&](const E* rows) {
        E* panels = memory.take<E>(most * width.depth);
        transpose(rows, count, width.depth, width.row, panels, blocks.panel);
        return panels;
      };
      E *key = memory.take<E>(most * width.row), *value = memory.take<E>(most * width.row);
      gather(at<const T>(k, task, keys.first), k.row, memory.kept.data(), count, dim, 1.0f, key, width.row);
      gather(at<const T>(v, task, keys.first), v.row, memory.kept.data(), count, dim, 1.0f, value, width.row);
      const E *key_panels = panels_of(key), *value_panels = panels_of(value);
      const E* key_stack = stack(key, count, dim, width.row, memory.take<E>(width.stack(most)), pitch);
      Keys<E> packed{count, width.depth, width.row, pitch, key_panels, nullptr, value_panels, key_stack};
      int64_t seen[kQueries];
      float *key_gradient = memory.take(most * pitch), *value_gradient = memory.take(most * pitch);
      std::fill_n(key_gradient, count * pitch, 0.0f);
      std::fill_n(value_gradient, count * pitch, 0.0f);

      E *query = memory.take<E>(kQueries * width.row), *gradient = memory.take<E>(kQueries * width.row);
      const int64_t size = width.stack(kQueries);
      E *query_memory = memory.take<E>(size), *gradient_memory = memory.take<E>(size);
      float *block_gradient = memory.take(kQueries * pitch), *scores = memory.take(3 * kScores);
      float *sum = memory.take(kQueries), *delta = memory.take(kQueries);
      for (int64_t i = 0; i < task.count; i += kQueries) {
        const int64_t rows = std::min(kQueries, task.count - i), first = queries.first + i;
        float* query_gradient = task.chain ? task.chain->data() + i * pitch : block_gradient;
        packed.count = see(problem, task, keys, first, rows, memory.kept, seen);
        if (packed.count > 0) {
          const T* its_gradient = at<const T>(grad_out, task, first);
          gather(at<const T>(q, task, first), q.row, nullptr, rows, dim, problem.scale, query, width.row);
          gather(its_gradient, grad_out.row, nullptr, rows, dim, 1.0f, gradient, width.row);
          const float *logarithm = at(lse, task, first), *of_logarithm = grad_lse.data ? at(grad_lse, task, first) : nullptr;
          for (int64_t r = 0; r < rows; ++r) {
            const bool none = logarithm[r] == -INFINITY;  // no key, no gradient, whatever comes in
            sum[r] = none ? INFINITY : logarithm[r];
            const float product = dot(its_gradient + r * grad_out.row, at<const T>(out, task, first + r), dim);
            delta[r] = product - (none || !of_logarithm ? 0.0f : of_logarithm[r]);
          }
        }
        if (task.piece == 0) std::fill_n(query_gradient, rows * pitch, 0.0f);
        if (task.chain) task.chain->wait(task.piece, i / kQueries);
        if (packed.count > 0) {
          const E* query_stack = stack(query, rows, dim, width.row, query_memory, pitch);
          const E* gradient_stack = stack(gradient, rows, dim, width.row, gradient_memory, pitch);
          const Queries<E> block{rows, query, seen, problem.scale, gradient, query_stack, gradient_stack, sum, delta};
          blocks.backward(packed, block, query_gradient, key_gradient, value_gradient, scores);
        }
        if (task.piece + 1 == task.pieces) {
          const auto scale = [&](int64_t) { return problem.scale; };
          scatter(query_gradient, pitch, nullptr, rows, dim, scale, at<T>(grad_q, task, first), grad_q.row);
        } else {
          task.chain->done(task.piece, i / kQueries + 1);
        }
      }
      T *grad_key = at<T>(grad_k, task, keys.first), *grad_value = at<T>(grad_v, task, keys.first);
      for (int64_t j = own.first; count < own.count && j < own.first + own.count; ++j) {
        std::fill_n(grad_key + j * grad_k.row, dim, store<T>(0.0f));
        std::fill_n(grad_value + j * grad_v.row, dim, store<T>(0.0f));
      }
      // Queries of numbers were scaled, those of pairs were not.
      const auto key_factor = [&](int64_t) { return kNumbers<E> == 1 ? 1.0f : problem.scale; };
      const auto one = [](int64_t) { return 1.0f; };
      scatter(key_gradient, pitch, memory.kept.data(), count, dim, key_factor, grad_key, grad_k.row);
      scatter(value_gradient, pitch, memory.kept.data(), count, dim, one, grad_value, grad_v.row);
    });
  });
}

}  // namespace alit::attention
