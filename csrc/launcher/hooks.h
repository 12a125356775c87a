// Settings of Triton that a launch has to respect.
#pragma once

#include <Python.h>

namespace alit {

// True if an attribute of Triton's settings is set: not None, nor an empty chain of hooks.
inline bool is_set(PyObject* object, PyObject* name) {
  PyObject* value = PyObject_GetAttr(object, name);
  if (!value) {
    PyErr_Clear();  // of a later version
    return false;
  }
  bool result = value != Py_None && value != Py_False;
  if (result) {
    static PyObject* const name_of_list = PyUnicode_InternFromString("calls");
    PyObject* calls = PyList_Check(value) ? Py_NewRef(value) : PyObject_GetAttr(value, name_of_list);
    if (!calls) PyErr_Clear();
    else {
      result = !PyList_Check(calls) || PyList_GET_SIZE(calls) > 0;
      Py_DECREF(calls);
    }
  }
  Py_DECREF(value);
  return result;
}

// True if something wants to see a launch, or to change how it is compiled.
inline bool watched(PyObject* runtime, PyObject* kernel) {
  static PyObject* const settings[] = {PyUnicode_InternFromString("launch_enter_hook"), PyUnicode_InternFromString("launch_exit_hook"),
                                       PyUnicode_InternFromString("add_stages_inspection_hook"), PyUnicode_InternFromString("debug")};
  static PyObject* const hooks = PyUnicode_InternFromString("pre_run_hooks");
  for (PyObject* name : settings)
    if (is_set(runtime, name)) return true;
  return is_set(kernel, hooks);
}

}  // namespace alit
