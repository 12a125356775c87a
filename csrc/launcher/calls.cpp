// Table of the calls of an op, or of a public function, that are known by their signature.
//
// calls(*arguments, implementation) -> result, or None: the signature is not known, or something watches calls (a mode,
// a transform, a profiler). For a known signature the plan is run where there is one and no gradient is asked for; else
// the op's own function is called, with the arguments in their places: checks and choices are made already.

#define PY_SSIZE_T_CLEAN
#include "launcher.h"

#include <structmember.h>

#include <cstddef>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "signature.h"

namespace alit {
namespace {

struct Call {
  PyObject *plan;    // (*tensors) -> results or None; None where there is none
  PyObject *known;   // what the op's functions take behind their arguments
  PyObject *values;  // tuple of the op's arguments, None in the places of tensors
  PyObject *finish;  // (the op's results) -> those of the public function; None where they are the same
  std::vector<Py_ssize_t> places;  // of tensors

  Call(PyObject* plan, PyObject* known, PyObject* given, PyObject* finish)
      : plan(Py_NewRef(plan)), known(Py_NewRef(known)), values(PyTuple_New(PyTuple_GET_SIZE(given))), finish(Py_NewRef(finish)) {
    for (Py_ssize_t i = 0; values && i < PyTuple_GET_SIZE(given); ++i) {
      PyObject* value = PyTuple_GET_ITEM(given, i);
      const bool tensor = torch_tensors()->holds(value);
      if (tensor) places.push_back(i);
      PyTuple_SET_ITEM(values, i, Py_NewRef(tensor ? Py_None : value));
    }
  }
  Call(const Call&) = delete;
  ~Call() {
    for (PyObject* each : {plan, known, values, finish}) Py_XDECREF(each);
  }
};

using Remembered = std::unordered_map<std::string, std::shared_ptr<Call>>;

struct Calls {
  PyObject_HEAD
  vectorcallfunc vectorcall;
  PyObject *run, *differentiate;      // (*the op's arguments, known) -> results; the second None: gradients stop here, or
                                      // (*the op's arguments, (results,)) where a plan has them ready
  PyObject *looks;                    // tuple of functions without arguments; true: something looks at calls
  PyObject *grad_mode;                // () -> whether gradients are asked for at all
  PyObject *autocast, *autocast_dtype;  // () -> whether it is on for any device; (device type) -> dtype or None
  PyObject *environment, *variable;   // dict of bytes; the name of the implementation that stands for "auto"
  Remembered* calls;
  Py_ssize_t most;
};

// 1 if the function returns true, 0 if false; -1 with a Python error.
int says(PyObject* function) {
  PyObject* told = PyObject_CallNoArgs(function);
  if (!told) return -1;
  const int result = told == Py_True ? 1 : told == Py_False || told == Py_None ? 0 : PyObject_IsTrue(told);
  Py_DECREF(told);
  return result;
}

int any_requires_grad(const Signature& call) {
  static PyObject* const name = PyUnicode_InternFromString("requires_grad");
  for (int i = 0; i < call.count; ++i) {
    PyObject* told = PyObject_GetAttr(call.tensors[i], name);
    if (!told) return -1;
    Py_DECREF(told);  // True and False live on
    if (told == Py_True) return 1;
  }
  return 0;
}

// Describes arguments whose last is the implementation, and the state outside of them: the environment, and autocast on
// the first tensor's device. Returns 1; 0 where there is none; -1 with a Python error.
int describe(const Calls* self, PyObject* const* arguments, Py_ssize_t count, Signature& found) {
  static PyObject* const automatic = PyUnicode_InternFromString("auto");
  static PyObject* const types[] = {PyUnicode_InternFromString("cpu"), PyUnicode_InternFromString("cuda")};
  if (!count || !PyUnicode_CheckExact(arguments[count - 1])) return 0;
  PyObject* implementation = arguments[count - 1];
  int known = found.describe(arguments, count - 1);
  if (known <= 0) return known;
  PyObject* standing = nullptr;
  if (implementation == automatic || PyUnicode_Compare(implementation, automatic) == 0)
    standing = PyDict_GetItemWithError(self->environment, self->variable);
  if (PyErr_Occurred()) return -1;
  if (standing && !PyBytes_Check(standing)) return 0;
  known = standing ? found.add_text(PyBytes_AS_STRING(standing), PyBytes_GET_SIZE(standing)) : found.describe(&implementation, 1);
  if (known <= 0) return known;
  const int cast = says(self->autocast);
  if (cast <= 0) return cast < 0 ? -1 : 1;
  if (found.device_type < 1 || found.device_type > 2) return 0;
  PyObject* dtype = PyObject_CallOneArg(self->autocast_dtype, types[found.device_type - 1]);
  if (!dtype) return -1;
  known = found.describe(&dtype, 1);
  Py_DECREF(dtype);
  return known;
}

std::string key_of(const Signature& found) { return {reinterpret_cast<const char*>(found.words), 8 * static_cast<std::size_t>(found.used)}; }

// The op's results; None where a plan cannot launch and there is nothing else. A plan's results reach the derivative ready,
// in a tuple in the place of what was remembered.
PyObject* results(const Calls* self, const Call& call, const Signature& found, bool wanted) {
  PyObject *ready = nullptr, *arguments[Signature::MOST_ARGUMENTS + 1];
  if (call.plan != Py_None) {
    PyObject* result = PyObject_Vectorcall(call.plan, found.tensors, found.count, nullptr);
    if (!result || (!wanted && result != Py_None)) return result;
    if (result != Py_None) ready = PyTuple_Pack(1, result);
    Py_DECREF(result);
  }
  if (PyErr_Occurred()) return nullptr;
  const Py_ssize_t count = PyTuple_GET_SIZE(call.values);
  for (Py_ssize_t i = 0; i < count; ++i) arguments[i] = PyTuple_GET_ITEM(call.values, i);
  for (std::size_t i = 0; i < call.places.size(); ++i) arguments[call.places[i]] = found.tensors[i];
  arguments[count] = ready ? ready : call.known;
  PyObject* result = PyObject_Vectorcall(wanted ? self->differentiate : self->run, arguments, count + 1, nullptr);
  Py_XDECREF(ready);
  return result;
}

PyObject* call(PyObject* object, PyObject* const* arguments, std::size_t nargsf, PyObject* kwnames) {
  auto* self = reinterpret_cast<Calls*>(object);
  if (kwnames) {
    PyErr_SetString(PyExc_TypeError, "expected arguments in order");
    return nullptr;
  }
  if (self->calls->empty()) Py_RETURN_NONE;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(self->looks); ++i) {
    const int looked_at = says(PyTuple_GET_ITEM(self->looks, i));
    if (looked_at < 0) return nullptr;
    if (looked_at) Py_RETURN_NONE;
  }
  Signature found;
  const int known = describe(self, arguments, PyVectorcall_NARGS(nargsf), found);
  if (known < 0) return nullptr;
  if (!known) Py_RETURN_NONE;
  const auto place = self->calls->find(key_of(found));
  if (place == self->calls->end()) Py_RETURN_NONE;
  const std::shared_ptr<Call> call = place->second;  // Python code that runs now may forget it
  int wanted = self->differentiate == Py_None ? 0 : says(self->grad_mode);
  if (wanted > 0) wanted = any_requires_grad(found);
  if (wanted < 0) return nullptr;
  PyObject* result = results(self, *call, found, wanted);
  if (!result || result == Py_None || call->finish == Py_None) return result;
  PyObject* finished = PyObject_CallOneArg(call->finish, result);
  Py_DECREF(result);
  return finished;
}

PyObject* key(PyObject* object, PyObject* const* arguments, Py_ssize_t count) {
  Signature found;
  const int known = describe(reinterpret_cast<Calls*>(object), arguments, count, found);
  if (known < 0) return nullptr;
  if (!known) Py_RETURN_NONE;
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(found.words), 8 * found.used);
}

PyObject* add(PyObject* object, PyObject* args) {
  auto* self = reinterpret_cast<Calls*>(object);
  const char* key;
  Py_ssize_t length;
  PyObject *plan, *known, *values, *finish;
  if (!PyArg_ParseTuple(args, "y#OOO!O", &key, &length, &plan, &known, &PyTuple_Type, &values, &finish)) return nullptr;
  if (PyTuple_GET_SIZE(values) > Signature::MOST_ARGUMENTS) {
    PyErr_SetString(PyExc_ValueError, "values: too many arguments");
    return nullptr;
  }
  auto made = std::make_shared<Call>(plan, known, values, finish);
  if (!made->values) return nullptr;
  Remembered dropped;  // to the end: that runs Python code
  if (static_cast<Py_ssize_t>(self->calls->size()) >= self->most) dropped.swap(*self->calls);
  (*self->calls)[std::string(key, length)].swap(made);
  Py_RETURN_NONE;
}

PyObject* known(PyObject* object, PyObject* key) {
  const auto* self = reinterpret_cast<Calls*>(object);
  if (!PyBytes_Check(key)) Py_RETURN_NONE;
  const auto place = self->calls->find(std::string(PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key)));
  return Py_NewRef(place == self->calls->end() ? Py_None : place->second->known);
}

Py_ssize_t size(PyObject* object) { return reinterpret_cast<Calls*>(object)->calls->size(); }

PyObject* make(PyTypeObject* type, PyObject* args, PyObject* keywords) {
  static const char* names[] = {"run",         "differentiate", "looks", "grad_mode", "autocast", "autocast_dtype",
                                "environment", "variable",      "most",  nullptr};
  PyObject *run, *differentiate, *looks, *grad_mode, *autocast, *autocast_dtype, *environment, *variable;
  Py_ssize_t most;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOO!OOOO!O!n", const_cast<char**>(names), &run, &differentiate, &PyTuple_Type, &looks,
                                   &grad_mode, &autocast, &autocast_dtype, &PyDict_Type, &environment, &PyBytes_Type, &variable, &most))
    return nullptr;
  if (!torch_tensors()) return nullptr;
  auto* self = reinterpret_cast<Calls*>(type->tp_alloc(type, 0));
  if (!self) return nullptr;
  self->vectorcall = call;
  self->run = Py_NewRef(run);
  self->differentiate = Py_NewRef(differentiate);
  self->looks = Py_NewRef(looks);
  self->grad_mode = Py_NewRef(grad_mode);
  self->autocast = Py_NewRef(autocast);
  self->autocast_dtype = Py_NewRef(autocast_dtype);
  self->environment = Py_NewRef(environment);
  self->variable = Py_NewRef(variable);
  self->calls = new Remembered;
  self->most = most;
  return reinterpret_cast<PyObject*>(self);
}

void destroy(PyObject* object) {
  auto* self = reinterpret_cast<Calls*>(object);
  delete self->calls;
  for (PyObject* each : {self->run, self->differentiate, self->looks, self->grad_mode, self->autocast, self->autocast_dtype,
                         self->environment, self->variable})
    Py_DECREF(each);
  PyTypeObject* type = Py_TYPE(object);
  type->tp_free(object);
  Py_DECREF(type);
}

PyMethodDef METHODS[] = {
    {"add", add, METH_VARARGS, "add(key, plan, known, values, finish): remember a call. Tensors among the values are those of the call, in order."},
    {"key", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(key)), METH_FASTCALL,
     "key(*arguments, implementation) -> bytes that a call is known by, or None: nothing can tell."},
    {"known", known, METH_O, "known(key) -> what was remembered, or None."},
    {}};
PyMemberDef MEMBERS[] = {{"__vectorcalloffset__", T_PYSSIZET, offsetof(Calls, vectorcall), READONLY, nullptr}, {}};
PyType_Slot SLOTS[] = {
    {Py_tp_doc, const_cast<char*>("calls(*arguments, implementation) -> the results of a call that is known, or None.")},
    {Py_tp_new, reinterpret_cast<void*>(make)},
    {Py_tp_dealloc, reinterpret_cast<void*>(destroy)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_methods, METHODS},
    {Py_tp_members, MEMBERS},
    {Py_sq_length, reinterpret_cast<void*>(size)},
    {0, nullptr},
};
PyType_Spec SPEC = {"alit_kernels._C.Calls", sizeof(Calls), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL, SLOTS};

}  // namespace

PyObject* calls_type() { return PyType_FromSpec(&SPEC); }

}  // namespace alit
