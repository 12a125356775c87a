#define PY_SSIZE_T_CLEAN
#include "signature.h"

#include <algorithm>
#include <cstring>

namespace alit {

const TorchTensors* torch_tensors() {
  static TorchTensors found{};
  if (found.api) return &found;
  PyObject* torch = PyImport_ImportModule("torch");
  PyObject* tensor = torch ? PyObject_GetAttrString(torch, "Tensor") : nullptr;
  PyObject* nn = tensor ? PyObject_GetAttrString(torch, "nn") : nullptr;
  PyObject* parameter = nn ? PyObject_GetAttrString(nn, "Parameter") : nullptr;
  PyObject* dtype = parameter ? PyObject_GetAttrString(torch, "dtype") : nullptr;
  PyObject* capsule = dtype ? PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__") : nullptr;
  const void* pointer = capsule ? PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule)) : nullptr;
  if (const auto* api = static_cast<const exchange::Api*>(pointer)) {
    if (api->header.major == exchange::MAJOR && api->header.minor >= exchange::MINOR && api->tensor_from_object && api->current_stream) {
      found = {api, Py_NewRef(tensor), Py_NewRef(parameter), Py_NewRef(dtype)};
    } else {
      PyErr_Format(PyExc_RuntimeError, "expected DLPack's exchange API %d.%d or later, got %d.%d", exchange::MAJOR, exchange::MINOR,
                   api->header.major, api->header.minor);
    }
  }
  for (PyObject* each : {torch, tensor, nn, parameter, dtype, capsule}) Py_XDECREF(each);
  return found.api ? &found : nullptr;
}

namespace {

enum Tag : std::int64_t { NONE = 1, TENSOR, TRUE, FALSE, INT, FLOAT, TEXT, DTYPE };

bool is_negative(PyObject* tensor) {  // its sign has still to be applied
  static PyObject* const name = PyUnicode_InternFromString("is_neg");
  PyObject* told = PyObject_VectorcallMethod(name, &tensor, 1, nullptr);
  if (!told) PyErr_Clear();
  Py_XDECREF(told);
  return told != Py_False;
}

}  // namespace

bool Signature::add_text(const char* text, Py_ssize_t length) {
  if (used + 3 + length / 8 > MOST_WORDS) return false;
  words[used++] = TEXT;
  words[used++] = length;
  words[used + length / 8] = 0;
  std::memcpy(words + used, text, length);
  used += length / 8 + 1;
  return true;
}

int Signature::describe(PyObject* const* arguments, Py_ssize_t given) {
  const TorchTensors* torch = torch_tensors();
  if (!torch) return -1;
  if (given > MOST_ARGUMENTS) return 0;
  std::uintptr_t addresses[MOST_ARGUMENTS];
  for (Py_ssize_t i = 0; i < given; ++i) {
    PyObject* argument = arguments[i];
    if (used + 4 > MOST_WORDS) return 0;
    if (argument == Py_None) {
      words[used++] = NONE;
    } else if (torch->holds(argument)) {
      exchange::Tensor tensor;
      if (torch->api->tensor_from_object(argument, &tensor)) {
        PyErr_Clear();
        return 0;
      }
      if (used + 2 + 2 * tensor.ndim > MOST_WORDS) return 0;
      std::int64_t elements = 1;
      for (int d = 0; d < tensor.ndim; ++d) elements *= tensor.shape[d];
      const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(tensor.data) + tensor.byte_offset;
      if ((elements && !tensor.data) || is_negative(argument)) return 0;
      // The earlier tensor that begins where this one does: a plan has to know which of them a launch was given.
      addresses[count] = address;
      if (!count) device_type = tensor.device.type;
      const std::int64_t same = std::find(addresses, addresses + count, address) - addresses;
      words[used++] = TENSOR | (std::int64_t{tensor.type.code} << 8) | (std::int64_t{tensor.type.bits} << 16) |
                      (static_cast<std::int64_t>(address % 16) << 24) | (std::int64_t{tensor.ndim} << 28) |
                      (std::int64_t{tensor.device.type} << 36) | (std::int64_t{tensor.device.id} << 44) | (same << 52);
      std::memcpy(words + used, tensor.shape, 8 * tensor.ndim);
      std::memcpy(words + used + tensor.ndim, tensor.strides, 8 * tensor.ndim);
      used += 2 * tensor.ndim;
      tensors[count++] = argument;
    } else if (argument == Py_True || argument == Py_False) {
      words[used++] = argument == Py_True ? TRUE : FALSE;
    } else if (PyLong_CheckExact(argument)) {
      int overflow;
      words[used++] = INT;
      words[used++] = PyLong_AsLongLongAndOverflow(argument, &overflow);
      if (overflow) return 0;
    } else if (PyFloat_CheckExact(argument)) {
      const double value = PyFloat_AS_DOUBLE(argument);
      words[used++] = FLOAT;
      std::memcpy(&words[used++], &value, 8);
    } else if (PyUnicode_CheckExact(argument)) {
      Py_ssize_t length;
      const char* text = PyUnicode_AsUTF8AndSize(argument, &length);
      if (!text) return -1;
      if (!add_text(text, length)) return 0;
    } else if (reinterpret_cast<PyObject*>(Py_TYPE(argument)) == torch->dtype) {
      words[used++] = DTYPE;
      words[used++] = reinterpret_cast<std::intptr_t>(argument);
    } else {
      return 0;
    }
  }
  return 1;
}

PyObject* signature(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  Signature found;
  const int known = found.describe(arguments, count);
  if (known < 0) return nullptr;
  if (!known) Py_RETURN_NONE;
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(found.words), 8 * found.used);
}

}  // namespace alit
