#include "ragged_cuda.h"

#include "../count_bytes.h"
#include "../launch.h"
#include "../types.h"

namespace {

using Offset = std::int32_t;

#ifndef ALIT_BLOCK_THREADS  // fewer where they are emulated by real threads
#define ALIT_BLOCK_THREADS 256
#endif
constexpr int kThreads = ALIT_BLOCK_THREADS;
constexpr int kWarp = 32;
constexpr i64 kTile = 4 * kThreads;  // rows that a block of the compaction scans
constexpr i64 kSumRows = 64;         // rows whose gradients are summed in float before the sum goes on in double

template <typename T>
T* pointer(i64 address) {
  return reinterpret_cast<T*>(address);
}

i64 divided(i64 total, i64 size) { return (total + size - 1) / size; }

struct alignas(16) Vector16 {
  std::uint32_t words[4];
};

// Rows somewhere in memory; a row number out of range gives no row.
struct Rows {
  const char* data;
  i64 stride, count;

  __device__ const char* operator()(i64 row) const {
    return row >= 0 && row < count ? data + row * stride : nullptr;
  }
};

struct Padded {
  const char* data;
  i64 sequence_stride, row_stride, length;

  __device__ const char* operator()(i64 b, i64 row) const {
    return row >= 0 && row < length ? data + b * sequence_stride + row * row_stride : nullptr;
  }
};

struct Offsets {
  const Offset* values;
  i64 sequences;

  // The first sequence that ends behind `row`; `sequences` if there is none.
  __device__ i64 find(i64 row) const {
    i64 low = 0, high = sequences;
    while (low < high) {
      const i64 middle = (low + high) / 2;
      if (values[middle + 1] > row) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }

  __device__ i64 begin(i64 b) const { return values[b]; }
  __device__ i64 length(i64 b) const { return i64{values[b + 1]} - values[b]; }
};

// Where an output row comes from; no address: the fill value.

struct PackPlan {
  Padded padded;
  Offsets offsets;

  __device__ const char* operator()(i64 row) const {
    const i64 b = offsets.find(row);
    return b < offsets.sequences ? padded(b, row - offsets.begin(b)) : nullptr;
  }
};

struct UnpackPlan {
  Rows packed;
  Offsets offsets;
  i64 max_length;

  __device__ const char* operator()(i64 row) const {
    const i64 b = row / max_length, position = row % max_length;
    return position < offsets.length(b) ? packed(offsets.begin(b) + position) : nullptr;
  }
};

struct GatherPlan {
  Rows rows;
  const Offset* source;

  __device__ const char* operator()(i64 row) const { return rows(source[row]); }
};

struct AppendPlan {
  Rows packed;
  Offsets offsets, grown;
  Padded fresh;

  __device__ const char* operator()(i64 row) const {
    const i64 b = grown.find(row);
    if (b == grown.sequences) return nullptr;
    const i64 position = row - grown.begin(b), old = offsets.length(b);
    return position < old ? packed(offsets.begin(b) + position) : fresh(b, position - old);
  }
};

struct OldGradPlan {
  Rows grad;
  Offsets offsets, grown;

  __device__ const char* operator()(i64 row) const {
    const i64 b = offsets.find(row);
    return b < offsets.sequences ? grad(grown.begin(b) + row - offsets.begin(b)) : nullptr;
  }
};

struct FreshGradPlan {
  Rows grad;
  Offsets offsets, grown;
  const std::uint8_t* select;
  i64 added;

  __device__ const char* operator()(i64 row) const {
    const i64 b = row / added;
    return select[b] ? grad(grown.begin(b) + offsets.length(b) + row % added) : nullptr;
  }
};

struct TailMaskPlan {
  Padded tokens;
  const i64* lengths;
  const char* fill;

  __device__ const char* operator()(i64 row) const {
    const i64 b = row / tokens.length, position = row % tokens.length;
    return position < lengths[b] ? tokens(b, position) : fill;
  }
};

struct alignas(16) Fill {
  std::uint64_t words[2];
};

constexpr int kInFlight = 4;  // loads of a lane before the first of them is waited for

// One warp writes one row, in vectors of V. A row asks its plan once.
template <typename V, typename Plan>
__global__ void write_rows(Plan plan, Fill fill, char* out, i64 rows, i64 row_bytes) {
  const i64 vectors = row_bytes / static_cast<i64>(sizeof(V)), lane = threadIdx.x % kWarp;
  const i64 warps = i64{gridDim.x} * (blockDim.x / kWarp);
  for (i64 row = (i64{blockIdx.x} * blockDim.x + threadIdx.x) / kWarp; row < rows; row += warps) {
    const V* const from = reinterpret_cast<const V*>(plan(row));
    V* const to = reinterpret_cast<V*>(out + row * row_bytes);
    if (from != nullptr) {
      for (i64 first = lane; first < vectors; first += kInFlight * kWarp) {
        V held[kInFlight];
        UNROLL for (int n = 0; n < kInFlight; ++n) {
          if (first + n * kWarp < vectors) held[n] = from[first + n * kWarp];
        }
        UNROLL for (int n = 0; n < kInFlight; ++n) {
          if (first + n * kWarp >= vectors) continue;
          to[first + n * kWarp] = held[n];
          COUNT_BYTES(2 * sizeof(V));
        }
      }
    } else {
      constexpr i64 kPeriod = static_cast<i64>(sizeof(Fill) / sizeof(V));
      static_assert(kWarp % kPeriod == 0, "a lane's vectors are all the same");
      const V value = reinterpret_cast<const V*>(&fill)[lane % kPeriod];
      for (i64 i = lane; i < vectors; i += kWarp) {
        to[i] = value;
        COUNT_BYTES(sizeof(V));
      }
    }
  }
}

template <typename V, typename Plan>
void launch_write(i64 stream, const Plan& plan, Fill fill, i64 out, i64 rows, i64 row_bytes) {
  if (rows <= 0 || row_bytes <= 0) return;
  const i64 warps = kThreads / kWarp, most = (i64{1} << 31) - 1;
  const i64 blocks = divided(rows, warps) < most ? divided(rows, warps) : most;
  LAUNCH((write_rows<V, Plan>), blocks, kThreads, 0, stream, plan, fill, pointer<char>(out), rows, row_bytes);
}

// `alignment`: bits of all addresses and strides that the rows are read at.
template <typename Plan>
void write(i64 stream, const Plan& plan, i64 alignment, i64 out, i64 rows, i64 row_bytes, Fill fill = {{0, 0}}) {
  const i64 bits = alignment | out | row_bytes;
  if (bits % 16 == 0) return launch_write<Vector16>(stream, plan, fill, out, rows, row_bytes);
  if (bits % 8 == 0) return launch_write<std::uint64_t>(stream, plan, fill, out, rows, row_bytes);
  if (bits % 4 == 0) return launch_write<std::uint32_t>(stream, plan, fill, out, rows, row_bytes);
  if (bits % 2 == 0) return launch_write<std::uint16_t>(stream, plan, fill, out, rows, row_bytes);
  launch_write<std::uint8_t>(stream, plan, fill, out, rows, row_bytes);
}

// Sum of `value` over the threads before this one; `total` is that of the block. Needs 2 * blockDim.x elements.
template <typename T>
__device__ T scan_block(T value, T* shared, T* total) {
  T *now = shared, *next = shared + blockDim.x;
  const unsigned i = threadIdx.x;
  now[i] = value;
  __syncthreads();
  for (unsigned step = 1; step < blockDim.x; step *= 2) {
    next[i] = i >= step ? now[i] + now[i - step] : now[i];
    T* const old = now;
    now = next;
    next = old;
    __syncthreads();
  }
  *total = now[blockDim.x - 1];
  const T before = i > 0 ? now[i - 1] : T{0};
  __syncthreads();  // `shared` may be used again
  return before;
}

struct StatedLength {
  const i64* lengths;
  __device__ i64 operator()(i64 b) const { return lengths[b]; }
};

struct GrownLength {
  Offsets offsets;
  const std::uint8_t* select;
  i64 added;
  __device__ i64 operator()(i64 b) const { return offsets.length(b) + (select[b] ? added : 0); }
};

// One block: offsets of sequences of these lengths.
template <typename Length>
__global__ void scan_lengths(Length length, i64 sequences, Offset* offsets, i64 limit, int* error) {
  DYNAMIC_SHARED(i64, shared);
  i64 before = 0;
  for (i64 first = 0; first < sequences; first += blockDim.x) {
    const i64 b = first + threadIdx.x, own = b < sequences ? length(b) : 0;
    i64 total;
    const i64 start = before + scan_block(own, shared, &total);
    if (b < sequences) {
      offsets[b + 1] = static_cast<Offset>(start + own);
      if (error && own < 0) atomicOr(error, kBadLengths);
      if (error && start + own > limit) atomicOr(error, kCapacityTooSmall);
    }
    before += total;
  }
  if (threadIdx.x == 0) offsets[0] = 0;
}

template <typename Length>
void launch_scan(i64 stream, const Length& length, i64 sequences, i64 offsets, i64 limit, i64 error) {
  LAUNCH(scan_lengths<Length>, 1, kThreads, 2 * kThreads * sizeof(i64), stream, length, sequences,
         pointer<Offset>(offsets), limit, pointer<int>(error));
}

// Flags offsets that do not start at 0, ascend, and end within `rows`, or sequences above `longest`.
__global__ void check_offsets(Offsets offsets, i64 rows, int too_many, i64 longest, int* error) {
  const i64 b = i64{blockIdx.x} * blockDim.x + threadIdx.x;
  if (b == 0 && offsets.values[0] != 0) atomicOr(error, kBadOffsets);
  if (b == 0 && offsets.values[offsets.sequences] > rows) atomicOr(error, too_many);
  if (b < offsets.sequences && offsets.length(b) < 0) atomicOr(error, kBadOffsets);
  if (b < offsets.sequences && offsets.length(b) > longest) atomicOr(error, kBadLengths);
}

void check(i64 stream, Offsets offsets, i64 rows, int too_many, i64 longest, i64 error) {
  if (error == 0) return;
  LAUNCH(check_offsets, divided(offsets.sequences + 1, kThreads), kThreads, 0, stream, offsets, rows, too_many, longest,
         pointer<int>(error));
}

struct Kept {
  const std::uint8_t* keep;
  Offsets offsets;
  i64 rows;

  __device__ int operator()(i64 row) const {
    return row < rows && row < offsets.values[offsets.sequences] && keep[row] ? 1 : 0;
  }
};

__global__ void count_tiles(Kept kept, Offset* counts) {
  DYNAMIC_SHARED(int, shared);
  int own = 0, total;
  for (int i = 0; i < kTile / kThreads; ++i) own += kept(blockIdx.x * kTile + i64{threadIdx.x} * (kTile / kThreads) + i);
  scan_block(own, shared, &total);
  if (threadIdx.x == 0) counts[blockIdx.x] = total;
}

// before[row]: kept rows before `row`, for 0 to rows; source_row of every kept row that fits.
__global__ void scan_tiles(Kept kept, const Offset* counts, Offset* before, Offset* source_row, i64 capacity) {
  DYNAMIC_SHARED(int, shared);
  int earlier = 0, base, total;
  for (i64 tile = threadIdx.x; tile < i64{blockIdx.x}; tile += blockDim.x) earlier += counts[tile];
  scan_block(earlier, shared, &base);
  const i64 first = blockIdx.x * kTile + i64{threadIdx.x} * (kTile / kThreads);
  int own = 0;
  for (int i = 0; i < kTile / kThreads; ++i) own += kept(first + i);
  int target = base + scan_block(own, shared, &total);
  for (i64 row = first; row < first + kTile / kThreads && row <= kept.rows; ++row) {
    before[row] = target;
    if (!kept(row)) continue;
    if (target < capacity) source_row[target] = static_cast<Offset>(row);
    ++target;
  }
}

// What is left to write: the new offsets, and -1 for the rows that are not in use.
__global__ void finish_compaction(Kept kept, const Offset* before, Offset* new_offsets, Offset* source_row, i64 capacity,
                                  int* error) {
  const i64 i = i64{blockIdx.x} * blockDim.x + threadIdx.x;
  const i64 total = before[kept.rows];
  if (i <= kept.offsets.sequences) {
    const i64 row = kept.offsets.values[i];
    new_offsets[i] = before[row < 0 ? 0 : row < kept.rows ? row : kept.rows];
  }
  if (i < capacity && i >= total) source_row[i] = -1;
  if (i == 0 && error && total > capacity) atomicOr(error, kCapacityTooSmall);
}

__global__ void fill_offsets(Offset* values, i64 count, Offset value) {
  const i64 i = i64{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < count) values[i] = value;
}

__global__ void invert_rows(const Offset* target_row, i64 count, Offset* source, i64 rows, int* error) {
  const i64 i = i64{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const Offset target = target_row[i];
  if (target >= 0 && target < rows) source[target] = static_cast<Offset>(i);
  if (error && (target < -1 || target >= rows)) atomicOr(error, kBadTargetRow);
}

// A block sums kWarp columns, lane by lane: its warps share the `count` terms of each, and the first warp gets the sum.
template <typename Term>
__device__ double sum_in_block(i64 count, const Term& term) {
  DYNAMIC_SHARED(double, shared);
  const int warps = blockDim.x / kWarp;
  double sum = 0;
  for (i64 first = threadIdx.x / kWarp; first < count; first += kInFlight * warps) {
    float held[kInFlight];
    UNROLL for (int n = 0; n < kInFlight; ++n) held[n] = first + n * warps < count ? term(first + n * warps) : 0.0f;
    UNROLL for (int n = 0; n < kInFlight; ++n) sum += held[n];
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  for (unsigned other = threadIdx.x + kWarp; other < blockDim.x; other += kWarp) sum += shared[other];
  return sum;
}

#define LAUNCH_SUM(kernel, columns, stream, ...) \
  LAUNCH(kernel, divided(columns, kWarp), kThreads, kThreads * sizeof(double), stream, __VA_ARGS__)

template <typename T>
__global__ void sum_fresh(Rows grad, Offsets offsets, Offsets grown, const std::uint8_t* select, T* out, i64 added,
                          i64 width) {
  const i64 i = i64{blockIdx.x} * kWarp + threadIdx.x % kWarp, position = i / width, column = i % width;
  const double sum = sum_in_block(offsets.sequences, [&](i64 b) {
    if (position >= added || !select[b]) return 0.0f;
    const char* const row = grad(grown.begin(b) + offsets.length(b) + position);
    if (row == nullptr) return 0.0f;
    COUNT_BYTES(sizeof(T));
    return alit::load(reinterpret_cast<const T*>(row)[column]);
  });
  if (threadIdx.x >= kWarp || position >= added) return;
  out[i] = alit::store<T>(static_cast<float>(sum));
  COUNT_BYTES(sizeof(T));
}

// A block has kSumRows rows of one sequence.
template <typename T>
__global__ void mask_gradients(Padded grad, const i64* lengths, i64 blocks, T* grad_tokens, float* partial, i64 width) {
  const i64 b = blockIdx.x / blocks, first = blockIdx.x % blocks * kSumRows, kept = lengths[b];
  const i64 stop = first + kSumRows < grad.length ? first + kSumRows : grad.length;
  for (i64 c = threadIdx.x; c < width; c += blockDim.x) {
    float sum = 0;
    for (i64 start = first; start < stop; start += kInFlight) {
      T held[kInFlight];
      UNROLL for (int n = 0; n < kInFlight; ++n) {
        if (start + n < stop) held[n] = reinterpret_cast<const T*>(grad(b, start + n))[c];
      }
      UNROLL for (int n = 0; n < kInFlight; ++n) {
        const i64 row = start + n;
        if (row >= stop) continue;
        grad_tokens[(b * grad.length + row) * width + c] = row < kept ? held[n] : alit::store<T>(0.0f);
        if (row >= kept) sum += alit::load(held[n]);
        COUNT_BYTES(2 * sizeof(T));
      }
    }
    partial[i64{blockIdx.x} * width + c] = sum;
    COUNT_BYTES(sizeof(float));
  }
}

template <typename T>
__global__ void sum_partial(const float* partial, i64 count, T* out, i64 width) {
  const i64 c = i64{blockIdx.x} * kWarp + threadIdx.x % kWarp;
  const float* const column = partial + (c < width ? c : 0);  // a branch would wait for each load
  const double sum = sum_in_block(count, [&](i64 i) {
    COUNT_BYTES(c < width ? sizeof(float) : 0);
    return column[i * width];
  });
  if (threadIdx.x >= kWarp || c >= width) return;
  out[c] = alit::store<T>(static_cast<float>(sum));
  COUNT_BYTES(sizeof(T));
}

Offsets offsets_of(i64 values, i64 sequences) { return {pointer<const Offset>(values), sequences}; }

Rows rows_of(i64 data, i64 stride, i64 count) { return {pointer<const char>(data), stride, count}; }

Padded padded_of(i64 data, i64 sequence_stride, i64 row_stride, i64 length) {
  return {pointer<const char>(data), sequence_stride, row_stride, length};
}

constexpr i64 kNoLimit = (i64{1} << 31) - 1;

}  // namespace

// Every entry point makes the device current, launches, and reports.
#define ALIT_BEGIN \
  if (const int code = alit::device::begin(static_cast<int>(device))) return code
#define ALIT_END return alit::device::end()

extern "C" {

int alit_cuda_cumulative_offsets(i64 stream, i64 device, i64 error, i64 lengths, i64 sequences, i64 offsets) {
  ALIT_BEGIN;
  launch_scan(stream, StatedLength{pointer<const i64>(lengths)}, sequences, offsets, kNoLimit, error);
  ALIT_END;
}

int alit_cuda_pack(i64 stream, i64 device, i64 error, i64 padded, i64 sequence_stride, i64 row_stride, i64 length,
                   i64 offsets, i64 sequences, i64 out, i64 capacity, i64 row_bytes) {
  ALIT_BEGIN;
  const PackPlan plan{padded_of(padded, sequence_stride, row_stride, length), offsets_of(offsets, sequences)};
  check(stream, plan.offsets, capacity, kCapacityTooSmall, length, error);
  write(stream, plan, padded | sequence_stride | row_stride, out, capacity, row_bytes);
  ALIT_END;
}

int alit_cuda_unpack(i64 stream, i64 device, i64 error, i64 packed, i64 row_stride, i64 rows, i64 offsets, i64 sequences,
                     i64 fill_low, i64 fill_high, i64 out, i64 max_length, i64 row_bytes) {
  ALIT_BEGIN;
  const UnpackPlan plan{rows_of(packed, row_stride, rows), offsets_of(offsets, sequences), max_length};
  check(stream, plan.offsets, rows, kBadOffsets, max_length, error);
  const Fill fill{{static_cast<std::uint64_t>(fill_low), static_cast<std::uint64_t>(fill_high)}};
  write(stream, plan, packed | row_stride, out, sequences * max_length, row_bytes, fill);
  ALIT_END;
}

i64 alit_cuda_tiles(i64 rows) { return divided(rows + 1, kTile); }

int alit_cuda_compact(i64 stream, i64 device, i64 error, i64 packed, i64 row_stride, i64 rows, i64 offsets, i64 sequences,
                      i64 keep, i64 out, i64 new_offsets, i64 source_row, i64 capacity, i64 row_bytes, i64 scratch) {
  ALIT_BEGIN;
  const Kept kept{pointer<const std::uint8_t>(keep), offsets_of(offsets, sequences), rows};
  Offset* const before = pointer<Offset>(scratch);
  Offset* const counts = before + rows + 1;
  Offset* const source = pointer<Offset>(source_row);
  const i64 tiles = alit_cuda_tiles(rows), most = sequences + 1 > capacity ? sequences + 1 : capacity;
  check(stream, kept.offsets, rows, kBadOffsets, kNoLimit, error);
  LAUNCH(count_tiles, tiles, kThreads, 2 * kThreads * sizeof(int), stream, kept, counts);
  LAUNCH(scan_tiles, tiles, kThreads, 2 * kThreads * sizeof(int), stream, kept, counts, before, source, capacity);
  LAUNCH(finish_compaction, divided(most, kThreads), kThreads, 0, stream, kept, before, pointer<Offset>(new_offsets),
         source, capacity, pointer<int>(error));
  write(stream, GatherPlan{rows_of(packed, row_stride, rows), source}, packed | row_stride, out, capacity, row_bytes);
  ALIT_END;
}

int alit_cuda_scatter_rows(i64 stream, i64 device, i64 error, i64 values, i64 row_stride, i64 count, i64 target_row, i64 out,
                           i64 rows, i64 row_bytes, i64 scratch) {
  ALIT_BEGIN;
  if (rows == 0) return 0;
  Offset* const source = pointer<Offset>(scratch);
  LAUNCH(fill_offsets, divided(rows, kThreads), kThreads, 0, stream, source, rows, Offset{-1});
  if (count > 0) {
    LAUNCH(invert_rows, divided(count, kThreads), kThreads, 0, stream, pointer<const Offset>(target_row), count, source,
           rows, pointer<int>(error));
  }
  write(stream, GatherPlan{rows_of(values, row_stride, count), source}, values | row_stride, out, rows, row_bytes);
  ALIT_END;
}

int alit_cuda_append(i64 stream, i64 device, i64 error, i64 packed, i64 row_stride, i64 rows, i64 offsets, i64 sequences,
                     i64 fresh, i64 fresh_sequence_stride, i64 fresh_row_stride, i64 added, i64 select, i64 out,
                     i64 new_offsets, i64 capacity, i64 row_bytes) {
  ALIT_BEGIN;
  const Offsets before = offsets_of(offsets, sequences), grown = offsets_of(new_offsets, sequences);
  check(stream, before, rows, kBadOffsets, kNoLimit, error);
  launch_scan(stream, GrownLength{before, pointer<const std::uint8_t>(select), added}, sequences, new_offsets, capacity,
              error);
  const AppendPlan plan{rows_of(packed, row_stride, rows), before, grown,
                        padded_of(fresh, fresh_sequence_stride, fresh_row_stride, added)};
  write(stream, plan, packed | row_stride | fresh | fresh_sequence_stride | fresh_row_stride, out, capacity, row_bytes);
  ALIT_END;
}

int alit_cuda_append_backward(i64 stream, i64 device, i64 error, i64 grad, i64 row_stride, i64 capacity, i64 offsets,
                              i64 new_offsets, i64 sequences, i64 select, i64 grad_packed, i64 rows, i64 grad_fresh,
                              i64 added, i64 shared, i64 row_bytes, i64 type) {
  ALIT_BEGIN;
  const Offsets before = offsets_of(offsets, sequences), grown = offsets_of(new_offsets, sequences);
  const Rows from = rows_of(grad, row_stride, capacity);
  const auto* const chosen = pointer<const std::uint8_t>(select);
  check(stream, before, rows, kBadOffsets, kNoLimit, error);
  check(stream, grown, capacity, kBadOffsets, kNoLimit, error);
  write(stream, OldGradPlan{from, before, grown}, grad | row_stride, grad_packed, rows, row_bytes);
  if (!shared) {
    write(stream, FreshGradPlan{from, before, grown, chosen, added}, grad | row_stride, grad_fresh, sequences * added,
          row_bytes);
  } else if (added * row_bytes > 0) {
    alit::dispatch(static_cast<alit::Type>(type), [&](auto element) {
      using T = decltype(element);
      const i64 width = row_bytes / static_cast<i64>(sizeof(T));
      LAUNCH_SUM(sum_fresh<T>, added * width, stream, from, before, grown, chosen, pointer<T>(grad_fresh), added, width);
    });
  }
  ALIT_END;
}

int alit_cuda_tail_mask(i64 stream, i64 device, i64 error, i64 tokens, i64 sequence_stride, i64 row_stride, i64 lengths,
                        i64 sequences, i64 length, i64 fill, i64 out, i64 row_bytes) {
  (void)error;  // every length is valid
  ALIT_BEGIN;
  const TailMaskPlan plan{padded_of(tokens, sequence_stride, row_stride, length), pointer<const i64>(lengths),
                          pointer<const char>(fill)};
  write(stream, plan, tokens | sequence_stride | row_stride | fill, out, sequences * length, row_bytes);
  ALIT_END;
}

i64 alit_cuda_sum_blocks(i64 length) { return divided(length, kSumRows); }

int alit_cuda_tail_mask_backward(i64 stream, i64 device, i64 error, i64 grad, i64 sequence_stride, i64 row_stride,
                                 i64 lengths, i64 sequences, i64 length, i64 grad_tokens, i64 grad_fill, i64 row_bytes,
                                 i64 type, i64 scratch) {
  (void)error;
  ALIT_BEGIN;
  if (row_bytes == 0) return 0;
  const i64 blocks = alit_cuda_sum_blocks(length);
  alit::dispatch(static_cast<alit::Type>(type), [&](auto element) {
    using T = decltype(element);
    const i64 width = row_bytes / static_cast<i64>(sizeof(T));
    if (sequences * blocks > 0) {
      LAUNCH(mask_gradients<T>, sequences * blocks, kThreads, 0, stream,
             padded_of(grad, sequence_stride, row_stride, length), pointer<const i64>(lengths), blocks,
             pointer<T>(grad_tokens), pointer<float>(scratch), width);
    }
    LAUNCH_SUM(sum_partial<T>, width, stream, pointer<const float>(scratch), sequences * blocks, pointer<T>(grad_fill),
               width);
  });
  ALIT_END;
}
}
