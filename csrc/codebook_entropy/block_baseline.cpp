// Any processor: vectors of 4, which SSE2 and NEON both have.
namespace {
constexpr int kLanes = 4;
}

#include "block_loops.h"

const alit::entropy::Blocks alit::entropy::blocks_baseline = {forward, grad_rows, grad_codes};
