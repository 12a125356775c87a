// Python bindings of vector_quantize: addresses and sizes in, nothing allocated.

#include "../bindings.h"
#include "quantize.h"

namespace {

using namespace alit;

void gather(const Rows& u, const Rows& codes, Address index, Address mask, float commitment,
            float codebook_weight, int out_type, Address quantized, Address losses, int threads) {
  gather_and_losses(u, codes, at<const std::int64_t>(index), at<const bool>(mask), commitment,
                    codebook_weight, static_cast<Type>(out_type), at<void>(quantized), at<float>(losses), threads);
}

void backward(const Rows& grad_quantized, float grad_loss, float grad_commitment, float grad_codebook_loss,
              const Rows& z, const Rows& codebook, Address index, Address mask, bool cosine, float commitment,
              float codebook_weight, Address grad_z, Address grad_codebook, int threads) {
  quantize_backward({grad_quantized, grad_loss, grad_commitment, grad_codebook_loss}, z, codebook,
                    at<const std::int64_t>(index), at<const bool>(mask), cosine, commitment, codebook_weight,
                    at<void>(grad_z), at<void>(grad_codebook), threads);
}

}  // namespace

void bind_vector_quantize(py::module_& module) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  module.def("gather_and_losses", &gather, no_gil, py::arg("u"), py::arg("codes"), py::arg("index"), py::arg("mask"),
             py::arg("commitment"), py::arg("codebook_weight"), py::arg("out_type"), py::arg("quantized"),
             py::arg("losses"), py::arg("threads"));
  module.def("quantize_backward", &backward, no_gil, py::arg("grad_quantized"), py::arg("grad_loss"),
             py::arg("grad_commitment"), py::arg("grad_codebook_loss"), py::arg("z"), py::arg("codebook"),
             py::arg("index"), py::arg("mask"), py::arg("cosine"), py::arg("commitment"),
             py::arg("codebook_weight"), py::arg("grad_z"), py::arg("grad_codebook"), py::arg("threads"));
}
