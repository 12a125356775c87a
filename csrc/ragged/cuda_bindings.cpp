// Python bindings of the ragged CUDA kernels: the entry points as they are.

#include "../bindings.h"
#include "ragged_cuda.h"

#define DEFINE(name) module.def(#name, &name, py::call_guard<py::gil_scoped_release>())

void bind_ragged_cuda(py::module_& module) {
  DEFINE(alit_cuda_cumulative_offsets);
  DEFINE(alit_cuda_pack);
  DEFINE(alit_cuda_unpack);
  DEFINE(alit_cuda_tiles);
  DEFINE(alit_cuda_compact);
  DEFINE(alit_cuda_scatter_rows);
  DEFINE(alit_cuda_append);
  DEFINE(alit_cuda_append_backward);
  DEFINE(alit_cuda_tail_mask);
  DEFINE(alit_cuda_sum_blocks);
  DEFINE(alit_cuda_tail_mask_backward);
}
