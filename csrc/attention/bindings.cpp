// Python bindings of the attention kernels: addresses and strides in, nothing allocated.

#include "../bindings.h"
#include "attention.h"

void bind_attention(py::module_& module) {
  using namespace alit::attention;
  using alit::Address, alit::at;
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<Rows>(module, "AttentionRows", "Address; elements between sequences, rows and heads.")
      .def(py::init([](Address data, std::int64_t sequence, std::int64_t row, std::int64_t head) {
        return Rows{at<void>(data), sequence, row, head};
      }));
  py::class_<Sums>(module, "AttentionSums", "Address; elements between sequences and heads.")
      .def(py::init([](Address data, std::int64_t sequence, std::int64_t head) {
        return Sums{at<float>(data), sequence, head};
      }));
  py::class_<Problem>(module, "AttentionProblem", py::dynamic_attr())
      .def(py::init([](std::int64_t sequences, std::int64_t heads, std::int64_t dim, int type, Address offsets,
                       std::int64_t length, Address key_offsets, std::int64_t key_length, Address mask,
                       std::int64_t mask_sequence, Address stops, std::int64_t stops_sequence, float scale) {
             return Problem{sequences,
                            heads,
                            dim,
                            static_cast<alit::Type>(type),
                            {at<const std::int32_t>(offsets), length},
                            {at<const std::int32_t>(key_offsets), key_length},
                            at<const std::uint8_t>(mask),
                            mask_sequence,
                            at<const std::int32_t>(stops),
                            stops_sequence,
                            scale};
           }),
           py::kw_only(), py::arg("sequences"), py::arg("heads"), py::arg("dim"), py::arg("type"), py::arg("offsets"),
           py::arg("length"), py::arg("key_offsets"), py::arg("key_length"), py::arg("mask"), py::arg("mask_sequence"),
           py::arg("stops"), py::arg("stops_sequence"), py::arg("scale"));
  module.def(
      "attention",
      [](const Problem& problem, Rows q, Rows k, Rows v, Rows out, Sums lse, int threads, const std::string& set) {
        forward(problem, q, k, v, out, lse, threads, alit::instruction_set(set));
      },
      no_gil);
  module.def(
      "attention_backward",
      [](const Problem& problem, Rows grad_out, Sums grad_lse, Rows q, Rows k, Rows v, Rows out, Sums lse, Rows grad_q,
         Rows grad_k, Rows grad_v, int threads, const std::string& set) {
        backward(problem, grad_out, grad_lse, q, k, v, out, lse, grad_q, grad_k, grad_v, threads,
                 alit::instruction_set(set));
      },
      no_gil);
}
