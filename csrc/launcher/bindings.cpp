// The launcher as a type of the extension.

#include <pybind11/pybind11.h>

#include "launcher.h"

namespace py = pybind11;

void bind_launcher(py::module_& module) {
  PyObject* type = alit::launcher_type();
  if (!type) throw py::error_already_set();
  module.add_object("Launcher", py::reinterpret_steal<py::object>(type));
}
