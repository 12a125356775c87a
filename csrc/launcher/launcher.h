// Launches compiled Triton kernels: what kernel[grid](...) does, at a twentieth of its cost on the host.
#pragma once

#include <Python.h>

namespace alit {

// New reference to the type `Launcher`, or null with a Python error. Plain CPython: no header of torch or CUDA.
PyObject* launcher_type();

}  // namespace alit
