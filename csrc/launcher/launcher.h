// Launches of compiled Triton kernels, as by kernel[grid](...), without its work in Python.
#pragma once

#include <Python.h>

namespace alit {

// New references, or null with a Python error. Plain CPython: no header of torch or CUDA.
PyObject* launcher_type();  // Launcher: any call
PyObject* plan_type();      // Plan: the launches of one call that is repeated with other addresses
PyObject* calls_type();     // Calls: those of an op or of a public function that are known by their signature

}  // namespace alit
