// The few functions of libcuda that a launch needs, found when they are first asked for: the extension also loads where
// there is no driver.
#pragma once

#include <Python.h>
#include <dlfcn.h>

namespace alit {

using CUfunction = void*;
using CUstream = void*;

struct Driver {
  int (*launch)(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void**, void**);
  int (*current_device)(int*);
  int (*error_string)(int, const char**);

  // The functions of libcuda.so.1, or null where it is not.
  static const Driver* get() {
    static const Driver* driver = []() -> const Driver* {
      void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
      if (!library) return nullptr;
      static Driver found;
      found.launch = reinterpret_cast<decltype(found.launch)>(dlsym(library, "cuLaunchKernel"));
      found.current_device = reinterpret_cast<decltype(found.current_device)>(dlsym(library, "cuCtxGetDevice"));
      found.error_string = reinterpret_cast<decltype(found.error_string)>(dlsym(library, "cuGetErrorString"));
      return found.launch && found.current_device && found.error_string ? &found : nullptr;
    }();
    return driver;
  }

  // Sets the Python error for an error of a launch.
  PyObject* raise(int error) const {
    const char* text = nullptr;
    error_string(error, &text);
    return PyErr_Format(PyExc_RuntimeError, "a kernel was not launched: CUDA error %d, %s", error, text ? text : "unknown");
  }
};

}  // namespace alit
