// Body of scan.h, included by one file for each instruction set, after its `struct Simd`.
//
// Everything here has internal linkage and no function of the standard library is called: an inline function compiled
// for AVX-512 must not be the copy that the linker keeps for all.

#include "scan.h"

namespace {

using alit::kGroup;
using F = Simd::F;
using I = Simd::I;

constexpr int kWidth = Simd::vectors * Simd::lanes;

// The terms summed over the coordinates, for `codes` codes of a group at a time: as many as keep the sums in registers.
struct Differences {
  static constexpr int codes = 4;
  static F add(F query, F code, F sum) { return Simd::add_square(Simd::subtract(query, code), sum); }
};

struct Products {
  static constexpr int codes = Simd::codes;
  static F add(F query, F code, F sum) { return Simd::subtract_product(query, code, sum); }
};

// Sums of V vectors of queries with the codes from `code` on.
template <typename Values, int V>
inline void sums(const float* queries, const float* code, const float* start, std::int64_t dim,
                 F (&sum)[V][Values::codes]) {
  for (int c = 0; c < Values::codes; ++c)
    for (int v = 0; v < V; ++v) sum[v][c] = Simd::broadcast(start[c]);
#pragma GCC unroll 4
  for (std::int64_t d = 0; d < dim; ++d, queries += kWidth, code += kGroup) {
    F query[V];
    for (int v = 0; v < V; ++v) query[v] = Simd::load(queries + v * Simd::lanes);
    for (int c = 0; c < Values::codes; ++c) {
      const F value = Simd::broadcast(code[c]);
      for (int v = 0; v < V; ++v) sum[v][c] = Values::add(query[v], value, sum[v][c]);
    }
  }
}

template <int N>
inline F least_of(const F* values) {
  if constexpr (N == 1) {
    return values[0];
  } else {
    return Simd::min(least_of<N / 2>(values), least_of<N / 2>(values + N / 2));
  }
}

// Least value of each of V vectors of queries among the codes of a group.
template <typename Values, int V>
inline void least_of_group(const float* queries, const float* group, const float* start, std::int64_t dim,
                           F (&least)[V]) {
  for (int first = 0; first < kGroup; first += Values::codes) {
    F sum[V][Values::codes];
    sums<Values>(queries, group + first, start + first, dim, sum);
    for (int v = 0; v < V; ++v) {
      const F here = least_of<Values::codes>(sum[v]);
      least[v] = first == 0 ? here : Simd::min(least[v], here);
    }
  }
}

// The two least of a sequence of values, and the place of the first of them, for each query of a vector.
struct TwoLeast {
  F first = Simd::broadcast(__builtin_inff()), second = first;
  I where = Simd::broadcast(std::int32_t{0});

  void take(F value, std::int64_t place) {
    where = Simd::where_less(value, first, Simd::broadcast(static_cast<std::int32_t>(place)), where);
    second = Simd::min(second, Simd::max(value, first));
    first = Simd::min(value, first);
  }
};

// ByCode: places are codes, else groups, which costs less arithmetic for each value.
template <typename Values, bool ByCode>
void nearest(const float* queries, const alit::Codes& codes, const alit::Least& least) {
  constexpr int V = Simd::vectors;
  const std::int64_t dim = codes.dim;
  const float *group = codes.values, *start = codes.start;
  TwoLeast result[V];
  for (std::int64_t g = 0; g < codes.groups; ++g, group += dim * kGroup, start += kGroup) {
    if constexpr (ByCode) {
      for (int first = 0; first < kGroup; first += Values::codes) {
        F sum[V][Values::codes];
        sums<Values>(queries, group + first, start + first, dim, sum);
        for (int v = 0; v < V; ++v)
          for (int c = 0; c < Values::codes; ++c) result[v].take(sum[v][c], g * kGroup + first + c);
      }
    } else {
      F here[V];
      least_of_group<Values>(queries, group, start, dim, here);
      for (int v = 0; v < V; ++v) result[v].take(here[v], g);
    }
  }
  for (int v = 0; v < V; ++v) {
    Simd::store(least.best + v * Simd::lanes, result[v].first);
    Simd::store(least.second + v * Simd::lanes, result[v].second);
    Simd::store(least.place + v * Simd::lanes, result[v].where);
  }
}

template <bool ByCode>
void nearest_by_products(const float* queries, const alit::Codes& codes, const alit::Least& least) {
  nearest<Products, ByCode>(queries, codes, least);
  for (int first = 0; first < kWidth; first += Simd::lanes) {
    F square = Simd::broadcast(0.0f);
    for (std::int64_t d = 0; d < codes.dim; ++d) {
      square = Simd::add_square(Simd::load(queries + d * kWidth + first), square);
    }
    Simd::store(least.square + first, square);
  }
}

void within(const float* queries, const alit::Codes& codes, const float* limit, alit::Visit visit, void* context) {
  const F bound = Simd::load(limit);
  const float *group = codes.values, *start = codes.start;
  for (std::int64_t g = 0; g < codes.groups; ++g, group += codes.dim * kGroup, start += kGroup) {
    F least[1];
    least_of_group<Differences>(queries, group, start, codes.dim, least);
    if (const std::uint32_t lanes = Simd::lanes_not_above(least[0], bound)) visit(context, g, lanes);
  }
}

void exact(const float* query, const alit::Codes& codes, std::int64_t group, double* distance) {
  typedef float Floats __attribute__((vector_size(kGroup * sizeof(float))));
  typedef double Doubles __attribute__((vector_size(kGroup * sizeof(double))));
  const auto eight = [](const float* from) {
    Floats values;
    __builtin_memcpy(&values, from, sizeof values);
    return __builtin_convertvector(values, Doubles);
  };
  const float* values = codes.values + group * codes.dim * kGroup;
  Doubles sum = eight(codes.start + group * kGroup);
  for (std::int64_t d = 0; d < codes.dim; ++d, values += kGroup) {
    const Doubles difference = static_cast<double>(query[d]) - eight(values);
    sum += difference * difference;
  }
  __builtin_memcpy(distance, &sum, sizeof sum);
}

constexpr alit::Scan kScan = {Simd::lanes,
                              kWidth,
                              {nearest<Differences, false>, nearest<Differences, true>},
                              {nearest_by_products<false>, nearest_by_products<true>},
                              within,
                              exact};

}  // namespace
