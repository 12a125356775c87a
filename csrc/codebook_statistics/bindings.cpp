// Python bindings of the codebook statistics: addresses and sizes in, nothing allocated.

#include "../bindings.h"
#include "statistics.h"

namespace {

using namespace alit;

void statistics(Address index, bool wide_index, const Rows& z, Address mask, std::int64_t codes, Address count,
                Address total, int threads) {
  const auto run = [&](const auto* typed) {
    codebook_statistics(typed, z, at<const bool>(mask), codes, at<float>(count), at<float>(total), threads);
  };
  wide_index ? run(at<const std::int64_t>(index)) : run(at<const std::int32_t>(index));
}

}  // namespace

void bind_codebook_statistics(py::module_& module) {
  module.def("codebook_statistics", &statistics, py::call_guard<py::gil_scoped_release>(), py::arg("index"),
             py::arg("wide_index"), py::arg("z"), py::arg("mask"), py::arg("codes"), py::arg("count"),
             py::arg("total"), py::arg("threads"));
}
