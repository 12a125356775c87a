// Shared by the Python bindings of all ops. No torch header: kernels take pointers, sizes, strides and a thread count.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

namespace py = pybind11;

// Each is defined in bindings.cpp of the folder that has its name.
void bind_attention(py::module_& module);
void bind_codebook_entropy(py::module_& module);
void bind_codebook_statistics(py::module_& module);
void bind_launcher(py::module_& module);
void bind_nearest_codeword(py::module_& module);
void bind_ragged(py::module_& module);
void bind_ragged_cuda(py::module_& module);  // ragged/cuda_bindings.cpp
void bind_vector_quantize(py::module_& module);

namespace alit {

using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace alit
