// Python bindings of codebook_entropy: addresses and sizes in, nothing allocated.

#include "../bindings.h"
#include "entropy.h"

namespace {

using namespace alit;
using std::int64_t;

void forward(Address panels, int64_t panel_count, int64_t dim, Address rows, int64_t count, Address largest, Address sum,
             Address entropy, Address total, int threads, const std::string& set) {
  entropy::forward({at<const float>(panels), panel_count, dim}, at<const float>(rows), count, at<float>(largest),
                   at<float>(sum), at<float>(entropy), at<float>(total), threads, instruction_set(set));
}

void backward(Address panels, int64_t panel_count, int64_t dim, Address rows, int64_t count, float sample, float batch,
              Address slope, Address largest, Address sum, Address entropy, Address grad_rows, Address grad_panels,
              int threads, const std::string& set) {
  entropy::backward({at<const float>(panels), panel_count, dim}, at<const float>(rows), count,
                    {sample, batch, at<const float>(slope)}, at<const float>(largest), at<const float>(sum),
                    at<const float>(entropy), at<float>(grad_rows), at<float>(grad_panels), threads,
                    instruction_set(set));
}

}  // namespace

void bind_codebook_entropy(py::module_& module) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  module.attr("ENTROPY_PANEL") = entropy::kPanel;
  module.def("codebook_entropy", &forward, no_gil, py::arg("panels"), py::arg("panel_count"), py::arg("dim"),
             py::arg("rows"), py::arg("count"), py::arg("largest"), py::arg("sum"), py::arg("entropy"), py::arg("total"),
             py::arg("threads"), py::arg("instruction_set"));
  module.def("codebook_entropy_backward", &backward, no_gil, py::arg("panels"), py::arg("panel_count"), py::arg("dim"),
             py::arg("rows"), py::arg("count"), py::arg("sample"), py::arg("batch"), py::arg("slope"), py::arg("largest"),
             py::arg("sum"), py::arg("entropy"), py::arg("grad_rows"), py::arg("grad_panels"), py::arg("threads"),
             py::arg("instruction_set"));
}
