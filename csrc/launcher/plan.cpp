// The launches of an op for one signature of its arguments, repeated with other addresses.
//
// All that an op does on the host for one of its calls, from the checks to the choice of tiles, follows from shapes, strides,
// types, alignment and numbers: from `signature`. So it need be done once. Only addresses differ from call to call:
// a Plan holds the launches with everything else in place, takes the tensors, allocates, and launches.

#define PY_SSIZE_T_CLEAN
#include "launcher.h"

#include <structmember.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "driver.h"
#include "exchange.h"
#include "hooks.h"
#include "signature.h"

namespace alit {
namespace {

constexpr int MOST_TENSORS = 32, MOST_PARAMETERS = 72;

struct Launch {
  // A function of the extension's own that launches, given (stream, device, 0, arguments); null: a Triton kernel is launched.
  int (*entry)(const std::int64_t*);
  PyObject *kernel, *compiled;
  CUfunction function;
  unsigned grid[3], threads, shared;
  std::vector<std::uint64_t> values;  // of the parameters, addresses not yet in place
  struct Address {
    int parameter, tensor;
    std::int64_t offset;  // bytes from the tensor's first element
  };
  std::vector<Address> addresses;
};

struct Plan {
  PyObject_HEAD
  vectorcallfunc vectorcall;
  PyObject* runtime;
  int device;
  std::vector<Launch>* launches;
  PyObject *empty, *view;  // (size, stride, dtype) -> tensor on the current device; (tensor, size, stride, offset) -> view
  PyObject* allocations;   // list of (size, stride, dtype)
  PyObject* results;       // list: an int, the place of an allocation, or a tuple, what `view` takes but with a place
  int alone;               // whether there is one result, and no tuple of results
};

// Result of a function called with the items of a tuple; `put`, if it is not null, takes the place of the first.
PyObject* apply(PyObject* function, PyObject* items, PyObject* put) {
  PyObject* arguments[4];
  const Py_ssize_t count = PyTuple_GET_SIZE(items);
  for (Py_ssize_t i = 0; i < count; ++i) arguments[i] = i || !put ? PyTuple_GET_ITEM(items, i) : put;
  return PyObject_Vectorcall(function, arguments, count, nullptr);
}

void drop(PyObject** made, Py_ssize_t count) {
  while (count--) Py_DECREF(made[count]);
}

// Makes the plan's allocations; false with a Python error.
bool allocate(const Plan* self, PyObject** made) {
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(self->allocations); ++i) {
    made[i] = apply(self->empty, PyList_GET_ITEM(self->allocations, i), nullptr);
    if (!made[i]) {
      drop(made, i);
      return false;
    }
  }
  return true;
}

PyObject* result_of(const Plan* self, Py_ssize_t i, PyObject* const* made) {
  PyObject* result = PyList_GET_ITEM(self->results, i);
  if (PyLong_Check(result)) return Py_NewRef(made[PyLong_AsLong(result)]);
  return apply(self->view, result, made[PyLong_AsLong(PyTuple_GET_ITEM(result, 0))]);
}

PyObject* results_of(const Plan* self, PyObject* const* made) {
  if (self->alone) return result_of(self, 0, made);
  PyObject* results = PyTuple_New(PyList_GET_SIZE(self->results));
  for (Py_ssize_t i = 0; results && i < PyTuple_GET_SIZE(results); ++i) {
    PyObject* result = result_of(self, i, made);
    if (result) PyTuple_SET_ITEM(results, i, result);
    else Py_CLEAR(results);
  }
  return results;
}

bool launch_all(const Plan* self, PyObject* const* given, Py_ssize_t count, PyObject* const* made) {
  std::uint64_t address[MOST_TENSORS];
  const Py_ssize_t all = count + PyList_GET_SIZE(self->allocations);
  for (Py_ssize_t i = 0; i < all; ++i) {
    exchange::Tensor tensor;
    if (torch_tensors()->api->tensor_from_object(i < count ? given[i] : made[i - count], &tensor)) return false;
    address[i] = reinterpret_cast<std::uintptr_t>(tensor.data) + tensor.byte_offset;
  }
  CUstream stream;
  if (torch_tensors()->api->current_stream(exchange::CUDA, self->device, &stream)) return false;
  const Driver* driver = Driver::get();
  int error = 0;
  Py_BEGIN_ALLOW_THREADS;  // a full queue makes a launch wait
  for (const Launch& launch : *self->launches) {
    std::uint64_t values[MOST_PARAMETERS];
    void* parameters[MOST_PARAMETERS];
    std::memcpy(values, launch.values.data(), 8 * launch.values.size());
    for (const Launch::Address& each : launch.addresses) values[each.parameter] = address[each.tensor] + each.offset;
    if (launch.entry) {
      values[0] = reinterpret_cast<std::uintptr_t>(stream);
      error = launch.entry(reinterpret_cast<const std::int64_t*>(values));
      if (error) break;
      continue;
    }
    for (std::size_t i = 0; i < launch.values.size(); ++i) parameters[i] = &values[i];
    error = driver->launch(launch.function, launch.grid[0], launch.grid[1], launch.grid[2], launch.threads, 1, 1, launch.shared, stream,
                           parameters, nullptr);
    if (error) break;
  }
  Py_END_ALLOW_THREADS;
  if (error) driver->raise(error);
  return !error;
}

// plan(*tensors) -> results; None where Triton itself has to launch: another device is current, or something watches.
PyObject* call(PyObject* object, PyObject* const* tensors, std::size_t nargsf, PyObject* kwnames) {
  auto* self = reinterpret_cast<Plan*>(object);
  const Py_ssize_t count = PyVectorcall_NARGS(nargsf), more = PyList_GET_SIZE(self->allocations);
  if (kwnames || !count || count + more > MOST_TENSORS) {
    PyErr_Format(PyExc_TypeError, "expected 1 to %zd tensors", MOST_TENSORS - more);
    return nullptr;
  }
  int current;
  if (Driver::get()->current_device(&current) || current != self->device) Py_RETURN_NONE;
  for (const Launch& launch : *self->launches)
    if (!launch.entry && watched(self->runtime, launch.kernel)) Py_RETURN_NONE;
  PyObject* made[MOST_TENSORS];
  if (!allocate(self, made)) return nullptr;
  Py_INCREF(object);
  PyObject* result = launch_all(self, tensors, count, made) ? results_of(self, made) : nullptr;
  drop(made, more);
  Py_DECREF(object);
  return result;
}

// Parses an entry of Plan(launches=...): (kernel, compiled, function, grid, threads, shared, values,
// [(parameter, tensor, offset)]);
// without a kernel (None) the function is one of the extension's own.
bool parse(PyObject* given, Launch& launch) {
  unsigned long long function;
  Py_buffer values;
  PyObject *kernel, *compiled, *addresses;
  if (!PyArg_ParseTuple(given, "OOK(III)IIy*O!", &kernel, &compiled, &function, &launch.grid[0], &launch.grid[1], &launch.grid[2],
                        &launch.threads, &launch.shared, &values, &PyList_Type, &addresses))
    return false;
  if (kernel == Py_None) launch.entry = reinterpret_cast<decltype(launch.entry)>(function);
  launch.function = reinterpret_cast<CUfunction>(function);
  launch.values.resize(values.len / 8);
  std::memcpy(launch.values.data(), values.buf, 8 * launch.values.size());
  PyBuffer_Release(&values);
  if (launch.values.size() > MOST_PARAMETERS || launch.values.empty()) {
    PyErr_Format(PyExc_ValueError, "values: expected 1 to %d parameters, got %zu", MOST_PARAMETERS, launch.values.size());
    return false;
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(addresses); ++i) {
    Launch::Address address;
    long long offset;
    if (!PyArg_ParseTuple(PyList_GET_ITEM(addresses, i), "iiL", &address.parameter, &address.tensor, &offset)) return false;
    address.offset = offset;
    if (address.parameter < 0 || address.parameter >= static_cast<int>(launch.values.size()) || address.tensor < 0 ||
        address.tensor >= MOST_TENSORS) {
      PyErr_SetString(PyExc_ValueError, "addresses: out of range");
      return false;
    }
    launch.addresses.push_back(address);
  }
  launch.kernel = Py_NewRef(kernel);
  launch.compiled = Py_NewRef(compiled);
  return true;
}

bool right(PyObject* allocations, PyObject* results, int alone) {
  const Py_ssize_t count = PyList_GET_SIZE(allocations);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* each = PyList_GET_ITEM(allocations, i);
    if (!PyTuple_Check(each) || PyTuple_GET_SIZE(each) != 3) return false;
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(results); ++i) {
    PyObject *each = PyList_GET_ITEM(results, i), *place = each;
    if (PyTuple_Check(each)) {
      if (PyTuple_GET_SIZE(each) != 4) return false;
      place = PyTuple_GET_ITEM(each, 0);
    }
    if (!PyLong_Check(place) || PyLong_AsLong(place) < 0 || PyLong_AsLong(place) >= count) return false;
  }
  return !alone || PyList_GET_SIZE(results) == 1;
}

PyObject* make(PyTypeObject* type, PyObject* args, PyObject* keywords) {
  static const char* names[] = {"launches", "device", "runtime", "empty", "view", "allocations", "results", "alone", nullptr};
  PyObject *launches, *runtime, *empty, *view, *allocations, *results;
  int device, alone;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "O!iOOOO!O!p", const_cast<char**>(names), &PyList_Type, &launches, &device, &runtime,
                                   &empty, &view, &PyList_Type, &allocations, &PyList_Type, &results, &alone))
    return nullptr;
  if (!right(allocations, results, alone) || PyErr_Occurred()) {
    PyErr_SetString(PyExc_ValueError, "expected allocations (size, stride, dtype), and results that are places among them or (place, size,"
                                      " stride, offset)");
    return nullptr;
  }
  if (!torch_tensors()) return nullptr;
  if (!Driver::get()) {
    PyErr_SetString(PyExc_RuntimeError, "libcuda.so.1 is not there");
    return nullptr;
  }
  auto* self = reinterpret_cast<Plan*>(type->tp_alloc(type, 0));
  if (!self) return nullptr;
  self->vectorcall = call;
  self->runtime = Py_NewRef(runtime);
  self->empty = Py_NewRef(empty);
  self->view = Py_NewRef(view);
  self->allocations = Py_NewRef(allocations);
  self->results = Py_NewRef(results);
  self->alone = alone;
  self->device = device;
  self->launches = new std::vector<Launch>;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(launches); ++i) {
    Launch launch{};
    if (!parse(PyList_GET_ITEM(launches, i), launch)) {
      Py_DECREF(self);
      return nullptr;
    }
    self->launches->push_back(std::move(launch));
  }
  return reinterpret_cast<PyObject*>(self);
}

void destroy(PyObject* object) {
  auto* self = reinterpret_cast<Plan*>(object);
  for (const Launch& launch : *self->launches) {
    Py_DECREF(launch.kernel);
    Py_DECREF(launch.compiled);
  }
  delete self->launches;
  for (PyObject* each : {self->runtime, self->empty, self->view, self->allocations, self->results}) Py_XDECREF(each);
  PyTypeObject* type = Py_TYPE(object);
  type->tp_free(object);
  Py_DECREF(type);
}

PyMemberDef MEMBERS[] = {{"__vectorcalloffset__", T_PYSSIZET, offsetof(Plan, vectorcall), READONLY, nullptr}, {}};
PyType_Slot SLOTS[] = {
    {Py_tp_doc, const_cast<char*>("plan(*tensors) -> results: the allocations and launches of one call, with these tensors' addresses; None"
                                  " where Triton has to launch itself.")},
    {Py_tp_new, reinterpret_cast<void*>(make)},
    {Py_tp_dealloc, reinterpret_cast<void*>(destroy)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_members, MEMBERS},
    {0, nullptr},
};
PyType_Spec SPEC = {"alit_kernels._C.Plan", sizeof(Plan), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL, SLOTS};

}  // namespace

PyObject* plan_type() { return PyType_FromSpec(&SPEC); }

}  // namespace alit
