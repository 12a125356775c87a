// Any processor: vectors of 4, which SSE2 and NEON both have; 4 rows by 2 vectors leave room for products of their own.
namespace {
constexpr int kLanes = 4, kRows = 4, kVectors = 2;
}

#include "block_loops.h"

const alit::attention::Blocks<float> alit::attention::blocks_baseline = {kPanel, forward, backward};
