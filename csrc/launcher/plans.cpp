// The plans of an op by the signature of its calls.
//
// plans(*arguments) -> results, or None: the signature is not known, something looks at calls (a mode, a transform, a
// profiler), a gradient is asked for, or the plan cannot launch.

#define PY_SSIZE_T_CLEAN
#include "launcher.h"

#include <structmember.h>

#include <cstddef>
#include <string>
#include <unordered_map>

#include "signature.h"

namespace alit {
namespace {

struct Plans {
  PyObject_HEAD
  vectorcallfunc vectorcall;
  PyObject* looks;       // tuple of functions without arguments; true: something looks at calls
  PyObject* grad_mode;   // function: whether gradients are asked for at all
  std::unordered_map<std::string, PyObject*>* plans;
  Py_ssize_t most;
};

// Whether a function says so; -1 with a Python error.
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

PyObject* call(PyObject* object, PyObject* const* arguments, std::size_t nargsf, PyObject* kwnames) {
  auto* self = reinterpret_cast<Plans*>(object);
  if (kwnames) {
    PyErr_SetString(PyExc_TypeError, "expected arguments in order");
    return nullptr;
  }
  if (self->plans->empty()) Py_RETURN_NONE;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(self->looks); ++i) {
    const int looked_at = says(PyTuple_GET_ITEM(self->looks, i));
    if (looked_at < 0) return nullptr;
    if (looked_at) Py_RETURN_NONE;
  }
  Signature found;
  int known = found.describe(arguments, PyVectorcall_NARGS(nargsf));
  if (known > 0) {
    const int asked = says(self->grad_mode);
    const int wanted = asked > 0 ? any_requires_grad(found) : asked;
    if (wanted < 0) return nullptr;
    known = !wanted;
  }
  if (known < 0) return nullptr;
  if (!known) Py_RETURN_NONE;
  const auto place = self->plans->find(std::string(reinterpret_cast<const char*>(found.words), 8 * found.used));
  if (place == self->plans->end()) Py_RETURN_NONE;
  PyObject* plan = Py_NewRef(place->second);
  PyObject* result = PyObject_Vectorcall(plan, found.tensors, found.count, nullptr);
  Py_DECREF(plan);
  return result;
}

void forget(Plans* self) {
  auto plans = std::move(*self->plans);
  self->plans->clear();
  for (auto& [key, plan] : plans) Py_DECREF(plan);
}

PyObject* add(PyObject* object, PyObject* args) {
  auto* self = reinterpret_cast<Plans*>(object);
  const char* key;
  Py_ssize_t length;
  PyObject* plan;
  if (!PyArg_ParseTuple(args, "y#O", &key, &length, &plan)) return nullptr;
  if (static_cast<Py_ssize_t>(self->plans->size()) >= self->most) forget(self);
  PyObject*& slot = (*self->plans)[std::string(key, length)];
  PyObject* before = slot;
  slot = Py_NewRef(plan);
  Py_XDECREF(before);
  Py_RETURN_NONE;
}

Py_ssize_t size(PyObject* object) { return reinterpret_cast<Plans*>(object)->plans->size(); }

PyObject* make(PyTypeObject* type, PyObject* args, PyObject* keywords) {
  static const char* names[] = {"looks", "grad_mode", "most", nullptr};
  PyObject *looks, *grad_mode;
  Py_ssize_t most;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "O!On", const_cast<char**>(names), &PyTuple_Type, &looks, &grad_mode, &most))
    return nullptr;
  auto* self = reinterpret_cast<Plans*>(type->tp_alloc(type, 0));
  if (!self) return nullptr;
  self->vectorcall = call;
  self->looks = Py_NewRef(looks);
  self->grad_mode = Py_NewRef(grad_mode);
  self->plans = new std::unordered_map<std::string, PyObject*>;
  self->most = most;
  return reinterpret_cast<PyObject*>(self);
}

void destroy(PyObject* object) {
  auto* self = reinterpret_cast<Plans*>(object);
  forget(self);
  delete self->plans;
  Py_DECREF(self->looks);
  Py_DECREF(self->grad_mode);
  PyTypeObject* type = Py_TYPE(object);
  type->tp_free(object);
  Py_DECREF(type);
}

PyMethodDef METHODS[] = {{"add", add, METH_VARARGS, "add(signature, plan)"}, {}};
PyMemberDef MEMBERS[] = {{"__vectorcalloffset__", T_PYSSIZET, offsetof(Plans, vectorcall), READONLY, nullptr}, {}};
PyType_Slot SLOTS[] = {
    {Py_tp_doc, const_cast<char*>("plans(*arguments) -> results of the plan that is known for such a call, or None.")},
    {Py_tp_new, reinterpret_cast<void*>(make)},
    {Py_tp_dealloc, reinterpret_cast<void*>(destroy)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_methods, METHODS},
    {Py_tp_members, MEMBERS},
    {Py_sq_length, reinterpret_cast<void*>(size)},
    {0, nullptr},
};
PyType_Spec SPEC = {"alit_kernels._C.Plans", sizeof(Plans), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL, SLOTS};

}  // namespace

PyObject* plans_type() { return PyType_FromSpec(&SPEC); }

}  // namespace alit
