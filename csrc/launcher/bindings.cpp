// The launcher's types and functions, in the extension.

#include "../bindings.h"
#include "launcher.h"
#include "signature.h"

namespace {

py::object taken(PyObject* made) {
  if (!made) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

PyMethodDef SIGNATURE = {"signature", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(alit::signature)), METH_FASTCALL,
                         "signature(*arguments) -> bytes: equal for calls that differ in tensors' contents and addresses alone; None where an"
                         " argument is none of torch's own tensors, None, bool, int, float, str or dtype."};

}  // namespace

void bind_launcher(py::module_& module) {
  module.add_object("Launcher", taken(alit::launcher_type()));
  module.add_object("Plan", taken(alit::plan_type()));
  module.add_object("Calls", taken(alit::calls_type()));
  module.add_object("signature", taken(PyCFunction_New(&SIGNATURE, nullptr)));
}
