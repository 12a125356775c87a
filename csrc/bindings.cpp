// The Python module of the C++ core: functions that belong to no op, and the bindings of all ops.

#include "bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "instruction_set.h"
#include "parallel.h"
#include "rows.h"

namespace {

using alit::Rows;

py::dict build_info() {
  py::dict info;
  info["version"] = ALIT_VERSION;
#ifdef __VERSION__
  info["compiler"] = __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["build_type"] = ALIT_BUILD_TYPE;
  info["instruction_set"] = alit::name(alit::best_instruction_set());
  info["threads"] = std::thread::hardware_concurrency();
#ifdef ALIT_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  return info;
}

// The pieces (begin, end) that a kernel would get, in order; throws in the piece that holds `fail_at`.
std::vector<std::pair<std::int64_t, std::int64_t>> parallel_ranges(std::int64_t total, std::int64_t grain, int threads,
                                                                   std::int64_t fail_at) {
  std::mutex mutex;
  std::vector<std::pair<std::int64_t, std::int64_t>> ranges;
  alit::parallel_for(total, grain, threads, [&](std::int64_t begin, std::int64_t end) {
    if (begin <= fail_at && fail_at < end) throw std::runtime_error("failed at " + std::to_string(fail_at));
    // A nested call must not wait for the pool that runs this piece.
    std::int64_t inner = 0;
    alit::parallel_for(end - begin, 1, threads, [&](std::int64_t b, std::int64_t e) { inner += e - b; });
    if (inner != end - begin) throw std::logic_error("nested parallel_for missed a part of its range");
    std::lock_guard<std::mutex> lock(mutex);
    ranges.emplace_back(begin, end);
  });
  std::sort(ranges.begin(), ranges.end());
  return ranges;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled core of alit_kernels.";
  module.def("build_info", &build_info, "Version, compiler, instruction set chosen at run time, hardware threads.");
  module.def("parallel_ranges", &parallel_ranges, py::arg("total"), py::arg("grain"), py::arg("threads"),
             py::arg("fail_at") = -1, py::call_guard<py::gil_scoped_release>(),
             "Pieces (begin, end) into which the thread pool cuts a range of `total` items.");
  module.def("use_team", [](alit::Address team) { alit::ThreadPool::use_team(reinterpret_cast<alit::ThreadPool::Team>(team)); },
             py::arg("team"), "Borrow the threads of an OpenMP library, given the address of its GOMP_parallel; 0: not any more.");
  py::class_<Rows>(module, "Rows", py::dynamic_attr(),
                   "A matrix: address, type code, rows, columns, elements between rows.")
      .def(py::init([](alit::Address data, int type, std::int64_t count, std::int64_t dim, std::int64_t stride) {
             return Rows{alit::at<const void>(data), static_cast<alit::Type>(type), count, dim, stride};
           }),
           py::arg("data"), py::arg("type"), py::arg("count"), py::arg("dim"), py::arg("stride"));
  bind_attention(module);
  bind_codebook_entropy(module);
  bind_codebook_statistics(module);
  bind_launcher(module);
  bind_nearest_codeword(module);
  bind_ragged(module);
  bind_vector_quantize(module);
#ifdef ALIT_CUDA
  bind_ragged_cuda(module);
#endif
}
