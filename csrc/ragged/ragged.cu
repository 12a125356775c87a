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
constexpr int kRowsEach = 16;                 // whose choice a thread of the compaction reads at once
constexpr i64 kTile = kRowsEach * kThreads;  // rows of a block of the compaction
constexpr i64 kSumRows = 64;                 // rows whose gradients are summed in float before the sum goes on in double

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

struct Lengths {
  const void* values;
  i64 bytes;  // of each

  __device__ i64 operator[](i64 b) const {
    return bytes == 8 ? static_cast<const i64*>(values)[b] : static_cast<const std::int32_t*>(values)[b];
  }
};

struct Selection {
  const std::uint8_t* values;  // null: all

  __device__ bool operator[](i64 b) const { return values == nullptr || values[b] != 0; }
};

// Source of an output row; no address: the fill value.

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

// The rows from *count on are not in use: `source` is told here.
struct CompactPlan {
  Rows rows;
  Offset* source;
  const Offset* count;

  __device__ const char* operator()(i64 row) const {
    if (row < *count) return rows(source[row]);
    if (threadIdx.x % kWarp == 0) source[row] = -1;
    return nullptr;
  }
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
  Selection select;
  i64 added;

  __device__ const char* operator()(i64 row) const {
    const i64 b = row / added;
    return select[b] ? grad(grown.begin(b) + offsets.length(b) + row % added) : nullptr;
  }
};

struct TailMaskPlan {
  Padded tokens;
  Lengths lengths;
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

// One warp writes one row, in vectors of V. The plan is asked once for each row.
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
  if (rows <= 0) return;
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

// Sum of `value` over the threads before this one; `total` is the sum over the block. Needs 2 * blockDim.x elements.
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
  Lengths lengths;
  __device__ i64 operator()(i64 b) const { return lengths[b]; }
};

struct GrownLength {
  Offsets offsets;
  Selection select;
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

  // Rows from here on belong to no sequence, and none of them is kept.
  __device__ i64 end() const {
    const i64 end = offsets.values[offsets.sequences];
    return end < rows ? end : rows;
  }

  // Bit i: row first + i is kept.
  __device__ unsigned operator()(i64 first, i64 end) const {
    unsigned found = 0;
    if (first + kRowsEach <= end && reinterpret_cast<std::uintptr_t>(keep + first) % sizeof(Vector16) == 0) {
      const Vector16 bytes = *reinterpret_cast<const Vector16*>(keep + first);
      UNROLL for (int i = 0; i < kRowsEach; ++i) found |= (bytes.words[i / 4] >> i % 4 * 8 & 255 ? 1u : 0u) << i;
    } else {
      for (int i = 0; i < kRowsEach && first + i < end; ++i) found |= (keep[first + i] ? 1u : 0u) << i;
    }
    return found;
  }
};

// Writes the rows in use of source_row, and all of target_row and new_offsets. A block has kTile rows, and counts the
// rows kept before its own by itself: bytes are few beside rows.
__global__ void select_rows(Kept kept, Offset* new_offsets, Offset* source_row, Offset* target_row, i64 capacity,
                            int* error) {
  DYNAMIC_SHARED(int, shared);
  int* const starts = shared + 2 * kThreads;
  unsigned* const masks = reinterpret_cast<unsigned*>(starts + kThreads);
  const i64 end = kept.end(), begin = blockIdx.x * kTile;
  int earlier = 0, base, total;
  for (i64 row = i64{threadIdx.x} * kRowsEach; row < begin; row += kTile) earlier += __popc(kept(row, end));
  scan_block(earlier, shared, &base);
  const unsigned own = kept(begin + i64{threadIdx.x} * kRowsEach, end);
  starts[threadIdx.x] = base + scan_block(__popc(own), shared, &total);
  masks[threadIdx.x] = own;
  __syncthreads();
  const auto before = [&](i64 row) {  // how many are kept
    const i64 i = row - begin;
    return starts[i / kRowsEach] + __popc(masks[i / kRowsEach] & ((1u << i % kRowsEach) - 1));
  };
  for (i64 row = begin + threadIdx.x; row < begin + kTile && row < kept.rows; row += kThreads) {
    const i64 i = row - begin;
    const int target = before(row);
    const bool taken = masks[i / kRowsEach] >> i % kRowsEach & 1 && target < capacity;
    target_row[row] = taken ? target : -1;
    if (taken) source_row[target] = static_cast<Offset>(row);
  }
  for (i64 b = threadIdx.x; b <= kept.offsets.sequences; b += kThreads) {
    const i64 stated = kept.offsets.values[b], row = stated < 0 ? 0 : stated < kept.rows ? stated : kept.rows;
    if (row >= begin && row < begin + kTile) new_offsets[b] = before(row);
  }
  if (error && threadIdx.x == 0 && base + total > capacity) atomicOr(error, kCapacityTooSmall);
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
__global__ void sum_fresh(Rows grad, Offsets offsets, Offsets grown, Selection select, T* out, i64 added,
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

template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Values {
  T values[N];
};

// A block has kSumRows rows of one sequence, a thread N columns at a time. The gradient of the tokens is left out where
// it has no address.
template <typename T, int N>
__global__ void mask_gradients(Padded grad, Lengths lengths, i64 blocks, T* grad_tokens, float* partial, i64 width) {
  const i64 b = blockIdx.x / blocks, first = blockIdx.x % blocks * kSumRows, kept = lengths[b];
  const i64 stop = first + kSumRows < grad.length ? first + kSumRows : grad.length;
  for (i64 c = i64{threadIdx.x} * N; c < width; c += i64{blockDim.x} * N) {
    Values<float, N> sum = {};
    for (i64 start = first; start < stop; start += kInFlight) {
      Values<T, N> held[kInFlight];
      UNROLL for (int n = 0; n < kInFlight; ++n) {
        if (start + n < stop)
          held[n] = *reinterpret_cast<const Values<T, N>*>(grad(b, start + n) + c * static_cast<i64>(sizeof(T)));
      }
      UNROLL for (int n = 0; n < kInFlight; ++n) {
        const i64 row = start + n;
        if (row >= stop) continue;
        if (row >= kept) {
          UNROLL for (int i = 0; i < N; ++i) {
            sum.values[i] += alit::load(held[n].values[i]);
            held[n].values[i] = alit::store<T>(0.0f);
          }
        }
        if (grad_tokens)
          *reinterpret_cast<Values<T, N>*>(grad_tokens + (b * grad.length + row) * width + c) = held[n];
        COUNT_BYTES(2 * sizeof(held[n]));
      }
    }
    *reinterpret_cast<Values<float, N>*>(partial + i64{blockIdx.x} * width + c) = sum;
    COUNT_BYTES(sizeof(sum));
  }
}

// As many columns at a time as 16 bytes hold, where all rows begin at multiples of them; `alignment` as in write().
template <typename T>
void launch_mask_gradients(i64 stream, i64 alignment, Padded grad, Lengths lengths, i64 sequences, i64 grad_tokens,
                           i64 scratch, i64 width) {
  const i64 blocks = divided(grad.length, kSumRows);
  constexpr int kWide = 16 / sizeof(T);
  if (sequences * blocks == 0) return;
  if ((alignment | grad_tokens | scratch | width * static_cast<i64>(sizeof(T))) % 16 == 0) {
    LAUNCH((mask_gradients<T, kWide>), sequences * blocks, kThreads, 0, stream, grad, lengths, blocks,
           pointer<T>(grad_tokens), pointer<float>(scratch), width);
  } else {
    LAUNCH((mask_gradients<T, 1>), sequences * blocks, kThreads, 0, stream, grad, lengths, blocks,
           pointer<T>(grad_tokens), pointer<float>(scratch), width);
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

Lengths lengths_of(i64 values, i64 bytes) { return {pointer<const void>(values), bytes}; }

constexpr i64 kNoLimit = (i64{1} << 31) - 1;

}  // namespace

// Every entry point makes the device current, launches, and reports.
#define ALIT_BEGIN \
  if (const int code = alit::device::begin(static_cast<int>(device))) return code
#define ALIT_END return alit::device::end()

extern "C" {

int alit_cuda_cumulative_offsets(i64 stream, i64 device, i64 error, i64 lengths, i64 length_bytes, i64 sequences,
                                 i64 offsets) {
  ALIT_BEGIN;
  launch_scan(stream, StatedLength{lengths_of(lengths, length_bytes)}, sequences, offsets, kNoLimit, error);
  ALIT_END;
}

int alit_cuda_pack(i64 stream, i64 device, i64 error, i64 padded, i64 sequence_stride, i64 row_stride, i64 length,
                   i64 lengths, i64 length_bytes, i64 sequences, i64 out, i64 offsets, i64 capacity, i64 row_bytes) {
  ALIT_BEGIN;
  launch_scan(stream, StatedLength{lengths_of(lengths, length_bytes)}, sequences, offsets, kNoLimit, error);
  const PackPlan plan{padded_of(padded, sequence_stride, row_stride, length), offsets_of(offsets, sequences)};
  check(stream, plan.offsets, capacity, kCapacityTooSmall, length, error);
  write(stream, plan, padded | sequence_stride | row_stride, out, capacity, row_bytes);
  ALIT_END;
}

int alit_cuda_unpack_backward(i64 stream, i64 device, i64 error, i64 grad, i64 sequence_stride, i64 row_stride,
                              i64 length, i64 offsets, i64 sequences, i64 out, i64 rows, i64 row_bytes) {
  ALIT_BEGIN;
  const PackPlan plan{padded_of(grad, sequence_stride, row_stride, length), offsets_of(offsets, sequences)};
  check(stream, plan.offsets, rows, kBadOffsets, length, error);
  write(stream, plan, grad | sequence_stride | row_stride, out, rows, row_bytes);
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

int alit_cuda_compact(i64 stream, i64 device, i64 error, i64 packed, i64 row_stride, i64 rows, i64 offsets, i64 sequences,
                      i64 keep, i64 out, i64 new_offsets, i64 source_row, i64 target_row, i64 capacity, i64 row_bytes) {
  ALIT_BEGIN;
  const Kept kept{pointer<const std::uint8_t>(keep), offsets_of(offsets, sequences), rows};
  auto* const source = pointer<Offset>(source_row);
  check(stream, kept.offsets, rows, kBadOffsets, kNoLimit, error);
  LAUNCH(select_rows, divided(rows + 1, kTile), kThreads, 4 * kThreads * sizeof(int), stream, kept,
         pointer<Offset>(new_offsets), source, pointer<Offset>(target_row), capacity, pointer<int>(error));
  const CompactPlan plan{rows_of(packed, row_stride, rows), source, pointer<const Offset>(new_offsets) + sequences};
  write(stream, plan, packed | row_stride, out, capacity, row_bytes);
  ALIT_END;
}

int alit_cuda_compact_backward(i64 stream, i64 device, i64 error, i64 grad, i64 row_stride, i64 capacity, i64 target_row,
                               i64 out, i64 rows, i64 row_bytes) {
  (void)error;  // rows that are not there are zero
  ALIT_BEGIN;
  write(stream, GatherPlan{rows_of(grad, row_stride, capacity), pointer<const Offset>(target_row)}, grad | row_stride, out,
        rows, row_bytes);
  ALIT_END;
}

int alit_cuda_append(i64 stream, i64 device, i64 error, i64 packed, i64 row_stride, i64 rows, i64 offsets, i64 sequences,
                     i64 fresh, i64 fresh_sequence_stride, i64 fresh_row_stride, i64 added, i64 select, i64 out,
                     i64 new_offsets, i64 capacity, i64 row_bytes) {
  ALIT_BEGIN;
  const Offsets before = offsets_of(offsets, sequences), grown = offsets_of(new_offsets, sequences);
  check(stream, before, rows, kBadOffsets, kNoLimit, error);
  launch_scan(stream, GrownLength{before, {pointer<const std::uint8_t>(select)}, added}, sequences, new_offsets, capacity,
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
  const Selection chosen{pointer<const std::uint8_t>(select)};
  check(stream, before, rows, kBadOffsets, kNoLimit, error);
  check(stream, grown, capacity, kBadOffsets, kNoLimit, error);
  if (grad_packed) write(stream, OldGradPlan{from, before, grown}, grad | row_stride, grad_packed, rows, row_bytes);
  if (grad_fresh && !shared) {
    write(stream, FreshGradPlan{from, before, grown, chosen, added}, grad | row_stride, grad_fresh, sequences * added,
          row_bytes);
  } else if (grad_fresh && added * row_bytes > 0) {
    alit::dispatch(static_cast<alit::Type>(type), [&](auto element) {
      using T = decltype(element);
      const i64 width = row_bytes / static_cast<i64>(sizeof(T));
      LAUNCH_SUM(sum_fresh<T>, added * width, stream, from, before, grown, chosen, pointer<T>(grad_fresh), added, width);
    });
  }
  ALIT_END;
}

int alit_cuda_tail_mask(i64 stream, i64 device, i64 error, i64 tokens, i64 sequence_stride, i64 row_stride, i64 lengths,
                        i64 length_bytes, i64 sequences, i64 length, i64 fill, i64 out, i64 row_bytes) {
  (void)error;  // every length is valid
  ALIT_BEGIN;
  const TailMaskPlan plan{padded_of(tokens, sequence_stride, row_stride, length), lengths_of(lengths, length_bytes),
                          pointer<const char>(fill)};
  write(stream, plan, tokens | sequence_stride | row_stride | fill, out, sequences * length, row_bytes);
  ALIT_END;
}

i64 alit_cuda_sum_blocks(i64 length) { return divided(length, kSumRows); }

int alit_cuda_tail_mask_backward(i64 stream, i64 device, i64 error, i64 grad, i64 sequence_stride, i64 row_stride,
                                 i64 lengths, i64 length_bytes, i64 sequences, i64 length, i64 grad_tokens,
                                 i64 grad_fill, i64 row_bytes, i64 type, i64 scratch) {
  (void)error;
  ALIT_BEGIN;
  if (row_bytes == 0) return 0;
  const Padded from = padded_of(grad, sequence_stride, row_stride, length);
  const Lengths kept = lengths_of(lengths, length_bytes);
  if (!grad_fill) {
    if (grad_tokens) write(stream, TailMaskPlan{from, kept, nullptr}, grad | sequence_stride | row_stride, grad_tokens,
                           sequences * length, row_bytes);
    ALIT_END;
  }
  const i64 blocks = alit_cuda_sum_blocks(length);
  alit::dispatch(static_cast<alit::Type>(type), [&](auto element) {
    using T = decltype(element);
    const i64 width = row_bytes / static_cast<i64>(sizeof(T));
    launch_mask_gradients<T>(stream, grad | sequence_stride | row_stride, from, kept, sequences, grad_tokens, scratch,
                             width);
    LAUNCH_SUM(sum_partial<T>, width, stream, pointer<const float>(scratch), sequences * blocks, pointer<T>(grad_fill),
               width);
  });
  ALIT_END;
}
}
