// Body of block.h, included by one file for each instruction set, which defines kLanes (float32 in a vector), kRows and
// kVectors: the products kRows rows by kVectors vectors at a time, whose sums, with kVectors vectors and a number, fill
// the registers. Where it defines ALIT_PAIRS, elements are pairs, and it has functions that make and multiply them.
//
// Everything here has internal linkage and no inline function of the standard library is called: one compiled for AVX-512
// must not be the copy that the linker keeps for all. Sums over k are one chain of multiply-adds in the order of k: a
// row's result does not depend on the rows it is computed with.

#include <cstddef>
#include <cstdint>

#include "block.h"

namespace {

using alit::attention::kKeys;
using alit::attention::kScorePitch;
using std::int64_t;

typedef float F __attribute__((vector_size(kLanes * sizeof(float))));
typedef std::uint32_t I __attribute__((vector_size(kLanes * sizeof(float))));

constexpr int64_t kPanel = kVectors * kLanes;
constexpr int64_t kDepth = 256;  // elements of a panel that stay in the first-level cache, beside those of kRows rows

template <typename T>
inline T read(const void* p) {
  T x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

inline F load(const float* p) { return read<F>(p); }

#include "../exponential.h"

template <typename T>
inline void store(float* p, T x) {
  __builtin_memcpy(p, &x, sizeof x);
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t vectors_for(int64_t count) { return (count + kLanes - 1) / kLanes; }

#ifdef ALIT_PAIRS

using Element = alit::attention::Pair;
typedef I Elements;

inline void multiply_add(F& sum, Element a, I x) { sum = pair_product(sum, a.bits, x); }

// Converts a row of numbers to one of pairs, in place.
inline void pair_up(float* row, int64_t vectors) {
  for (int64_t v = 0; v < vectors; v += 2) {
    const F first = load(row + v * kLanes), second = v + 1 < vectors ? load(row + (v + 1) * kLanes) : F{};
    store(row + v / 2 * kLanes, successive(first, second));
  }
}

// Writes rows i and i + 1 of numbers, or row i alone, to row i / 2 of a stack.
inline void stack_up(const float* rows, int64_t i, bool alone, int64_t vectors, float* stack) {
  const float *a = rows + i * kScorePitch, *b = a + kScorePitch;
  float* out = stack + i / 2 * kScorePitch;
  for (int64_t v = 0; v < vectors * kLanes; v += kLanes) store(out + v, side_by_side(load(a + v), alone ? F{} : load(b + v)));
}

#else

using Element = float;
typedef F Elements;

inline void multiply_add(F& sum, float a, F x) { sum += a * x; }

#endif

using Keys = alit::attention::Keys<Element>;
using Queries = alit::attention::Queries<Element>;

constexpr int64_t kNumbers = alit::attention::kNumbers<Element>;

// Number of elements that hold `numbers` numbers.
inline int64_t elements(int64_t numbers) { return (numbers + kNumbers - 1) / kNumbers; }

struct Matrix {
  const void* data;  // elements
  int64_t pitch;

  const Element* at(int64_t i) const { return static_cast<const Element*>(data) + i; }
};

// R rows by V vectors of C = A B, or C += A B where `add`. Transposed: element (r, k) of A is at k * a.pitch + r.
template <int R, int V, bool Transposed>
inline void tile(Matrix a, Matrix b, float* c, int64_t pitch, int64_t depth, bool add) {
  F sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[r][v] = add ? load(c + r * pitch + v * kLanes) : F{};
  for (int64_t k = 0; k < depth; ++k) {
    Elements x[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) x[v] = read<Elements>(b.at(k * b.pitch + v * kLanes));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Element factor = read<Element>(a.at(Transposed ? k * a.pitch + r : r * a.pitch + k));
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) multiply_add(sum[r][v], factor, x[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(c + r * pitch + v * kLanes, sum[r][v]);
}

// The same for the rows that are left: at most R.
template <int R, int V, bool Transposed>
inline void last_rows(Matrix a, Matrix b, float* c, int64_t pitch, int64_t rows, int64_t depth, bool add) {
  if (rows == R) {
    tile<R, V, Transposed>(a, b, c, pitch, depth, add);
  } else if constexpr (R > 1) {
    last_rows<R - 1, V, Transposed>(a, b, c, pitch, rows, depth, add);
  }
}

template <int V, bool Transposed>
void columns(Matrix a, Matrix b, float* c, int64_t pitch, int64_t rows, int64_t depth, bool add) {
  for (; rows >= kRows; rows -= kRows) {
    tile<kRows, V, Transposed>(a, b, c, pitch, depth, add);
    a.data = a.at(kRows * (Transposed ? 1 : a.pitch));
    c += kRows * pitch;
  }
  last_rows<kRows - 1, V, Transposed>(a, b, c, pitch, rows, depth, add);
}

// All rows by at most V vectors of columns.
template <int V, bool Transposed>
void few_columns(Matrix a, Matrix b, float* c, int64_t pitch, int64_t rows, int64_t vectors, int64_t depth, bool add) {
  if (vectors == V) {
    columns<V, Transposed>(a, b, c, pitch, rows, depth, add);
  } else if constexpr (V > 1) {
    few_columns<V - 1, Transposed>(a, b, c, pitch, rows, vectors, depth, add);
  }
}

// C (+)= A B, C of `rows` rows and `vectors` vectors of columns.
template <bool Transposed>
void multiply(Matrix a, Matrix b, float* c, int64_t pitch, int64_t rows, int64_t vectors, int64_t depth, bool add) {
  for (int64_t v = 0; v < vectors; v += kVectors) {
    few_columns<kVectors, Transposed>(a, {b.at(v * kLanes), b.pitch}, c + v * kLanes, pitch, rows,
                                      smaller(kVectors, vectors - v), depth, add);
  }
}

// Scores of rows of A and the keys from `first` on, which are given in panels; first is a multiple of kPanel.
void multiply_panels(const Element* a, const Keys& keys, const Element* panels, int64_t first, int64_t count, float* c,
                     int64_t rows) {
  for (int64_t j = 0; j < count; j += kPanel) {
    const Element* panel = panels + (first + j) * keys.depth;
    int64_t k = 0;
    do {
      few_columns<kVectors, false>({a + k, keys.row}, {panel + k * kPanel, kPanel}, c + j, kScorePitch, rows,
                                   smaller(kVectors, vectors_for(count - j)), smaller(kDepth, keys.depth - k), k > 0);
    } while ((k += kDepth) < keys.depth);
  }
}

// Number of the `count` keys from `first` on that query i sees.
inline int64_t seen_of(const Queries& queries, int64_t i, int64_t first, int64_t count) {
  const int64_t seen = smaller(queries.seen[i] - first, count);
  return seen < 0 ? 0 : seen;
}

inline float largest_of(F x) {
  float result = x[0];
  for (int l = 1; l < kLanes; ++l) result = x[l] > result ? x[l] : result;
  return result;
}

inline float sum_of(F x) {
  float result = x[0];
  for (int l = 1; l < kLanes; ++l) result += x[l];
  return result;
}

void forward(const Keys& keys, const Queries& queries, float* out, float* largest, float* sum, float* scores) {
  const int64_t wide = vectors_for(keys.depth * kNumbers);
  for (int64_t first = 0; first < keys.count; first += kKeys) {
    const int64_t count = smaller(kKeys, keys.count - first), vectors = vectors_for(count);
    multiply_panels(queries.query, keys, keys.key_panels, first, count, scores, queries.count);
    for (int64_t i = 0; i < queries.count; ++i) {
      float* row = scores + i * kScorePitch;
#ifdef ALIT_PAIRS
      for (int64_t v = 0; v < vectors; ++v) store(row + v * kLanes, load(row + v * kLanes) * queries.scale);
#endif
      for (int64_t j = seen_of(queries, i, first, count); j < vectors * kLanes; ++j) row[j] = -__builtin_inff();
      F most = load(row);
      for (int64_t v = 1; v < vectors; ++v) {
        const F x = load(row + v * kLanes);
        most = x > most ? x : most;
      }
      const float here = largest_of(most), before = first == 0 ? here : largest[i];
      const float now = here > before ? here : before;
      const float shift = now == -__builtin_inff() ? 0.0f : now;  // of scores that are all -inf, as of no key
      F total = {};
      for (int64_t v = 0; v < vectors; ++v) {
        const F p = exponential(load(row + v * kLanes) - shift);
        store(row + v * kLanes, p);
        total += p;
      }
      largest[i] = now;
      if (first == 0) {
        sum[i] = sum_of(total);
      } else {
        const F decay = exponential(F{} + (before - shift));
        sum[i] = sum[i] * decay[0] + sum_of(total);
        for (int64_t v = 0; v < wide; ++v) {
          float* p = out + i * keys.pitch + v * kLanes;
          store(p, load(p) * decay);
        }
      }
#ifdef ALIT_PAIRS
      pair_up(row, vectors);
#endif
    }
    multiply<false>({scores, kScorePitch}, {keys.value + first / kNumbers * keys.pitch, keys.pitch}, out, keys.pitch,
                    queries.count, wide, elements(count), first > 0);
  }
}

void backward(const Keys& keys, const Queries& queries, float* grad_query, float* grad_key, float* grad_value,
              float* scores) {
  const int64_t wide = vectors_for(keys.depth * kNumbers), pitch = keys.pitch, rows = queries.count;
  float* grad_scores = scores + alit::attention::kScores;
  for (int64_t first = 0; first < keys.count; first += kKeys) {
    const int64_t count = smaller(kKeys, keys.count - first), vectors = vectors_for(count);
    multiply_panels(queries.query, keys, keys.key_panels, first, count, scores, rows);
    multiply_panels(queries.grad_out, keys, keys.value_panels, first, count, grad_scores, rows);
    const float* stack = grad_scores;
    for (int64_t i = 0; i < rows; ++i) {
      float *s = scores + i * kScorePitch, *ds = grad_scores + i * kScorePitch;
      const int64_t seen = seen_of(queries, i, first, count);
      for (int64_t v = 0; v < vectors_for(seen); ++v) {
#ifdef ALIT_PAIRS
        const F p = exponential(load(s + v * kLanes) * queries.scale - queries.lse[i]);
#else
        const F p = exponential(load(s + v * kLanes) - queries.lse[i]);
#endif
        store(s + v * kLanes, p);
        store(ds + v * kLanes, p * (load(ds + v * kLanes) - queries.delta[i]));
      }
      for (int64_t j = seen; seen < count && j < vectors * kLanes; ++j) s[j] = ds[j] = 0.0f;
    }
    // What lies beyond the last key in a row of scores is arbitrary; no product of numbers reads it.
#ifdef ALIT_PAIRS
    float* own = grad_scores + alit::attention::kScores;
    for (int64_t i = 0; i < rows; ++i) grad_scores[i * kScorePitch + count] = 0.0f;
    for (int64_t i = 0; i < rows; i += 2) {
      stack_up(scores, i, i + 1 == rows, vectors, scores);
      stack_up(grad_scores, i, i + 1 == rows, vectors, own);
    }
    for (int64_t i = 0; i < rows; ++i) pair_up(grad_scores + i * kScorePitch, vectors);
    stack = own;
#endif
    multiply<true>({scores, kScorePitch}, {queries.grad_out_stack, pitch}, grad_value + first * pitch, pitch, count, wide,
                   elements(rows), true);
    multiply<true>({stack, kScorePitch}, {queries.query_stack, pitch}, grad_key + first * pitch, pitch, count, wide,
                   elements(rows), true);
    multiply<false>({grad_scores, kScorePitch}, {keys.key + first / kNumbers * pitch, pitch}, grad_query, pitch, rows, wide,
                    elements(count), true);
  }
}

}  // namespace
