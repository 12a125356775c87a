// Python bindings of the codeword search: addresses and sizes in, nothing allocated.

#include "../bindings.h"
#include "search.h"

namespace {

using namespace alit;

void search(const Rows& z, const Rows& codebook, Address mask, Address index, int threads, const std::string& set) {
  nearest_codeword(z, codebook, at<const bool>(mask), at<std::int64_t>(index), threads, instruction_set(set));
}

}  // namespace

void bind_nearest_codeword(py::module_& module) {
  module.def("nearest_codeword", &search, py::call_guard<py::gil_scoped_release>(), py::arg("z"), py::arg("codebook"),
             py::arg("mask"), py::arg("index"), py::arg("threads"), py::arg("instruction_set"));
}
