// The signature of a call: all of its arguments but the contents and addresses of tensors.
#pragma once

#include <Python.h>

#include <cstdint>

#include "exchange.h"

namespace alit {

// torch's tensors as this extension sees them.
struct TorchTensors {
  const exchange::Api* api;
  PyObject *tensor, *parameter;  // the two types that are looked into; others may have rules of their own
  PyObject* dtype;               // the type of torch.float32 and its kin, of which there is one object each

  bool holds(PyObject* object) const {
    auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    return type == tensor || type == parameter;
  }
};

// Looked up once; null with a Python error where torch has no exchange API.
const TorchTensors* torch_tensors();

struct Signature {
  static constexpr int MOST_WORDS = 256, MOST_ARGUMENTS = 32;
  std::int64_t words[MOST_WORDS];
  int used = 0;
  PyObject* tensors[MOST_ARGUMENTS];
  int count = 0;        // of tensors
  int device_type = 0;  // of the first tensor, as DLPack numbers them; 0 without one

  // 1; 0 where an argument is none of torch's own tensors with data, None, bool, int, float, str or dtype; -1 with a Python error.
  int describe(PyObject* const* arguments, Py_ssize_t count);
  bool add_text(const char* text, Py_ssize_t length);  // false where there is no room for it
};

// signature(*arguments) -> bytes | None, METH_FASTCALL.
PyObject* signature(PyObject* self, PyObject* const* arguments, Py_ssize_t count);

}  // namespace alit
