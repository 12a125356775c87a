// Python bindings of the ragged CUDA kernels: the entry points as they are, and as plans call them.

#include <cstddef>
#include <utility>

#include "../bindings.h"
#include "ragged_cuda.h"

namespace {

// An entry point as a function of one array.
template <auto entry, typename Type = decltype(entry)>
struct Unpacked;

template <auto entry, typename... T>
struct Unpacked<entry, int (*)(T...)> {
  template <std::size_t... i>
  static int call_at(const i64* arguments, std::index_sequence<i...>) {
    return entry(arguments[i]...);
  }
  static int call(const i64* arguments) { return call_at(arguments, std::index_sequence_for<T...>{}); }
};

}  // namespace

#define DEFINE(name)                                                  \
  module.def(#name, &name, py::call_guard<py::gil_scoped_release>()); \
  unpacked[#name] = reinterpret_cast<alit::Address>(static_cast<int (*)(const i64*)>(Unpacked<&name>::call))

void bind_ragged_cuda(py::module_& module) {
  py::dict unpacked;  // name -> address of the function of an array
  DEFINE(alit_cuda_cumulative_offsets);
  DEFINE(alit_cuda_pack);
  DEFINE(alit_cuda_unpack);
  DEFINE(alit_cuda_unpack_backward);
  DEFINE(alit_cuda_compact);
  DEFINE(alit_cuda_compact_backward);
  DEFINE(alit_cuda_append);
  DEFINE(alit_cuda_append_backward);
  DEFINE(alit_cuda_tail_mask);
  DEFINE(alit_cuda_tail_mask_backward);
  module.def("alit_cuda_sum_blocks", &alit_cuda_sum_blocks);
  module.attr("unpacked") = unpacked;
}
