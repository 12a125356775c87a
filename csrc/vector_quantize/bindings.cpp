// Python bindings of the codebook kernels: addresses and sizes in, nothing allocated.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "../codebook_statistics/statistics.h"
#include "../nearest_codeword/search.h"
#include "quantize.h"

namespace py = pybind11;

namespace {

using alit::Rows;
using alit::Type;

template <typename T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Rows rows(std::uintptr_t data, int type, std::int64_t count, std::int64_t dim, std::int64_t stride) {
  return {at<const void>(data), static_cast<Type>(type), count, dim, stride};
}

void nearest_codeword(const Rows& z, const Rows& codebook, std::uintptr_t mask, std::uintptr_t index, int threads,
                      const std::string& instruction_set) {
  alit::nearest_codeword(z, codebook, at<const bool>(mask), at<std::int64_t>(index), threads,
                         alit::instruction_set(instruction_set));
}

void codebook_statistics(std::uintptr_t index, bool wide_index, const Rows& z, std::uintptr_t mask, std::int64_t codes,
                         std::uintptr_t count, std::uintptr_t total, int threads) {
  const auto run = [&](const auto* typed) {
    alit::codebook_statistics(typed, z, at<const bool>(mask), codes, at<float>(count), at<float>(total), threads);
  };
  wide_index ? run(at<const std::int64_t>(index)) : run(at<const std::int32_t>(index));
}

void gather_and_losses(const Rows& u, const Rows& codes, std::uintptr_t index, std::uintptr_t mask, float commitment,
                       int out_type, std::uintptr_t quantized, std::uintptr_t losses, int threads) {
  alit::gather_and_losses(u, codes, at<const std::int64_t>(index), at<const bool>(mask), commitment,
                          static_cast<Type>(out_type), at<void>(quantized), at<float>(losses), threads);
}

void quantize_backward(const Rows& grad_quantized, float grad_loss, float grad_commitment, float grad_codebook_loss,
                       const Rows& z, const Rows& codebook, std::uintptr_t index, std::uintptr_t mask, bool cosine,
                       float commitment, std::uintptr_t grad_z, std::uintptr_t grad_codebook, int threads) {
  alit::quantize_backward({grad_quantized, grad_loss, grad_commitment, grad_codebook_loss}, z, codebook,
                          at<const std::int64_t>(index), at<const bool>(mask), cosine, commitment, at<void>(grad_z),
                          at<void>(grad_codebook), threads);
}

}  // namespace

void bind_codebooks(py::module_& module) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<Rows>(module, "Rows", py::dynamic_attr(),
                   "A matrix: address, type code, rows, columns, elements between rows.")
      .def(py::init(&rows), py::arg("data"), py::arg("type"), py::arg("count"), py::arg("dim"), py::arg("stride"));
  module.def("nearest_codeword", &nearest_codeword, no_gil, py::arg("z"), py::arg("codebook"), py::arg("mask"),
             py::arg("index"), py::arg("threads"), py::arg("instruction_set"));
  module.def("codebook_statistics", &codebook_statistics, no_gil, py::arg("index"), py::arg("wide_index"), py::arg("z"),
             py::arg("mask"), py::arg("codes"), py::arg("count"), py::arg("total"), py::arg("threads"));
  module.def("gather_and_losses", &gather_and_losses, no_gil, py::arg("u"), py::arg("codes"), py::arg("index"),
             py::arg("mask"), py::arg("commitment"), py::arg("out_type"), py::arg("quantized"), py::arg("losses"),
             py::arg("threads"));
  module.def("quantize_backward", &quantize_backward, no_gil, py::arg("grad_quantized"), py::arg("grad_loss"),
             py::arg("grad_commitment"), py::arg("grad_codebook_loss"), py::arg("z"), py::arg("codebook"),
             py::arg("index"), py::arg("mask"), py::arg("cosine"), py::arg("commitment"), py::arg("grad_z"),
             py::arg("grad_codebook"), py::arg("threads"));
}
