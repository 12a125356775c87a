// launcher(kernel, grid, name=value, ...) stands for kernel[grid](name=value, ...) of a triton.jit function.
//
// Triton looks at every argument of a call, in Python, to find the machine code that was specialized for it. Here a call is
// described by a key of a few words, and what Triton compiled for it is remembered under that key. Where the key is known,
// the parameters are written into one array and cuLaunchKernel gets them. All else goes to Triton, and is remembered if
// it can be.
//
// The key is at least as fine as Triton's own: type, device and 16-byte alignment of a tensor; width of an integer, and
// whether it is 1 or a multiple of 16, unless the kernel does not specialize on it; type and value of a constant or
// a launch option. Arguments are known by their names, which Python keeps in one tuple for each place of a call.

#define PY_SSIZE_T_CLEAN
#include "launcher.h"

#include <structmember.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <string>
#include <unordered_map>
#include <vector>

#include "driver.h"
#include "exchange.h"
#include "hooks.h"
#include "signature.h"

namespace alit {
namespace {

constexpr int MOST_ARGUMENTS = 64;
constexpr Py_ssize_t MOST_TEXT = 24;  // bytes of a constant
// Most plans remembered for one site, and most sites; beyond that all is forgotten and found anew.
constexpr std::size_t MOST_PLANS = 256, MOST_SITES = 256;
// Most tuples of names by which a site is found at once.
constexpr std::size_t MOST_TUPLES = 8;

// ---- What is remembered ----

// Part of an argument that counts for a kernel: value (constants and launch options), Triton's specialization, or type.
enum class Look : char { VALUE = 'v', SPECIALIZED = 's', UNALIGNED = 'u', TYPE = 't' };

// A compiled kernel for one key.
struct Plan {
  CUfunction function;
  unsigned threads, shared;
  std::vector<std::int8_t> argument;  // parameter of the machine code -> argument of the call; -1: a null pointer
  PyObject* compiled;                 // keeps the machine code loaded
  int users = 0;                      // launches under way without the interpreter's lock
  bool forgotten = false;
};

// The calls with one kernel and the same names.
struct Site {
  PyObject *kernel, *caches;        // caches: Triton's own, which a user may clear
  std::vector<PyObject*> names;     // equal tuples
  std::string looks;
  std::unordered_map<std::string, Plan*> plans;
};

struct PairHash {
  std::size_t operator()(const std::pair<PyObject*, PyObject*>& p) const {
    return std::hash<void*>()(p.first) * 31 + std::hash<void*>()(p.second);
  }
};

struct Launcher {
  PyObject_HEAD
  vectorcallfunc vectorcall;
  PyObject *looks, *launch, *plan, *runtime;
  const TorchTensors* torch;
  const Driver* driver;
  std::vector<Site*>* sites;
  std::unordered_map<std::pair<PyObject*, PyObject*>, Site*, PairHash>* by_tuple;  // kernel, names
  long long hits, misses;
};

void drop(Plan* plan) {
  plan->forgotten = true;
  if (plan->users) return;
  Py_DECREF(plan->compiled);
  delete plan;
}

void forget_plans(Site* site) {
  auto plans = std::move(site->plans);  // dropping one runs Python code
  site->plans.clear();
  for (auto& [key, plan] : plans) drop(plan);
}

void forget_sites(Launcher* self) {
  auto sites = std::move(*self->sites);
  self->sites->clear();
  self->by_tuple->clear();
  for (Site* site : sites) {
    forget_plans(site);
    for (PyObject* names : site->names) Py_DECREF(names);
    Py_DECREF(site->kernel);
    Py_DECREF(site->caches);
    delete site;
  }
}

// ---- Keys ----

enum Tag : std::uint64_t { NONE = 1, TENSOR, INT, FLOAT, BOOL, TEXT };
constexpr std::uint64_t tagged(Tag tag, std::uint64_t more = 0) { return (static_cast<std::uint64_t>(tag) << 56) | more; }

struct Call {
  std::uint64_t key[(1 + MOST_TEXT / 8) * MOST_ARGUMENTS];
  std::uint64_t value[MOST_ARGUMENTS];  // as a parameter of the machine code, in its low bytes
  int words = 0;
  int device = -1;

  void add(std::uint64_t word) { key[words++] = word; }
};

// Adds argument i to the key. Returns 1; 0 where only Triton can tell; -1 with a Python error.
int describe(Launcher* self, Call& call, int i, PyObject* argument, Look look) {
  PyTypeObject* type = Py_TYPE(argument);
  call.value[i] = 0;
  if (argument == Py_None) {
    call.add(tagged(NONE));
    return 1;
  }
  if (self->torch->holds(argument)) {
    exchange::Tensor tensor;
    if (self->torch->api->tensor_from_object(argument, &tensor)) {
      PyErr_Clear();
      return 0;
    }
    if (tensor.device.type != exchange::CUDA || look == Look::VALUE) return 0;
    if (call.device < 0) call.device = tensor.device.id;
    if (tensor.device.id != call.device) return 0;
    const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(tensor.data) + tensor.byte_offset;
    call.value[i] = address;
    const bool aligned = look == Look::SPECIALIZED && address % 16 == 0;
    call.add(tagged(TENSOR, (std::uint64_t{tensor.type.code} << 32) | (std::uint64_t{tensor.type.bits} << 16) |
                                (static_cast<std::uint64_t>(tensor.device.id) << 1) | aligned));
    return 1;
  }
  if (type == &PyLong_Type) {
    int overflow;
    const long long value = PyLong_AsLongLongAndOverflow(argument, &overflow);
    if (value == -1 && PyErr_Occurred()) return -1;
    if (overflow) return 0;
    call.value[i] = static_cast<std::uint64_t>(value);
    if (look == Look::VALUE) {
      call.add(tagged(INT, 1));
      call.add(static_cast<std::uint64_t>(value));
      return 1;
    }
    const bool narrow = value >= INT32_MIN && value <= INT32_MAX;
    const bool one = look != Look::TYPE && value == 1, aligned = look == Look::SPECIALIZED && value % 16 == 0;
    call.add(tagged(INT, 2 | (narrow << 2) | (one << 3) | (aligned << 4)));
    return 1;
  }
  if (type == &PyFloat_Type) {
    const double value = PyFloat_AS_DOUBLE(argument);
    if (look == Look::VALUE) {
      call.add(tagged(FLOAT, 1));
      std::memcpy(&call.key[call.words++], &value, 8);
      return 1;
    }
    const float narrow = static_cast<float>(value);
    std::memcpy(&call.value[i], &narrow, 4);
    call.add(tagged(FLOAT));
    return 1;
  }
  if (look != Look::VALUE) return 0;
  if (type == &PyBool_Type) {
    call.add(tagged(BOOL, argument == Py_True));
    return 1;
  }
  if (type != &PyUnicode_Type) return 0;  // equal objects of other types may mean different machine code
  Py_ssize_t length;
  const char* text = PyUnicode_AsUTF8AndSize(argument, &length);
  if (!text) return -1;
  if (length > MOST_TEXT) return 0;
  call.add(tagged(TEXT, length));
  std::uint64_t words[MOST_TEXT / 8] = {};
  std::memcpy(words, text, length);
  for (std::uint64_t word : words) call.add(word);
  return 1;
}

// ---- Triton's side ----

// False if the user has cleared the caches that hold the kernel's compiled forms.
bool caches_stand(const Site* site) { return !PyDict_Check(site->caches) || PyDict_GET_SIZE(site->caches) > 0; }

// Launches through Triton, and remembers the compiled kernel under the key where there is one.
PyObject* through_triton(Launcher* self, PyObject* const* args, PyObject* kwnames, Site* site, const std::string* key) {
  self->misses++;
  PyObject* compiled = PyObject_Vectorcall(self->launch, args, 2, kwnames);
  if (!compiled) return nullptr;
  if (!site || !key || compiled == Py_None) {
    Py_DECREF(compiled);
    Py_RETURN_NONE;
  }
  PyObject* kernel = args[0];  // the site may be gone: Python code has run
  PyObject* found = PyObject_CallFunctionObjArgs(self->plan, kernel, compiled, kwnames, nullptr);
  if (!found || found == Py_None) {
    Py_DECREF(compiled);
    if (!found) return nullptr;
    Py_DECREF(found);
    Py_RETURN_NONE;
  }
  unsigned long long function;
  Plan* plan = new Plan;
  Py_buffer arguments;
  const bool parsed = PyArg_ParseTuple(found, "KIIy*", &function, &plan->threads, &plan->shared, &arguments);
  if (parsed) {
    plan->function = reinterpret_cast<CUfunction>(function);
    const auto* first = static_cast<const std::int8_t*>(arguments.buf);
    plan->argument.assign(first, first + arguments.len);
    PyBuffer_Release(&arguments);
    plan->compiled = compiled;
    if (std::find(self->sites->begin(), self->sites->end(), site) == self->sites->end()) {
      drop(plan);
    } else {
      if (site->plans.size() >= MOST_PLANS) forget_plans(site);
      Plan*& slot = site->plans[*key];
      Plan* before = slot;
      slot = plan;
      if (before) drop(before);
    }
  } else {
    Py_DECREF(compiled);
    delete plan;
  }
  Py_DECREF(found);
  if (!parsed) return nullptr;
  Py_RETURN_NONE;
}

// The site of a call, made on the first one; null where there is none, with a Python error or without.
Site* site_of(Launcher* self, PyObject* kernel, PyObject* names) {
  const auto found = self->by_tuple->find({kernel, names});
  if (found != self->by_tuple->end()) return found->second;
  for (Site* site : *self->sites) {
    if (site->kernel != kernel) continue;
    const int equal = PyObject_RichCompareBool(names, site->names[0], Py_EQ);
    if (equal < 0) return nullptr;
    if (!equal) continue;
    if (site->names.size() < MOST_TUPLES) {  // f(**arguments) makes a new tuple in every call
      site->names.push_back(Py_NewRef(names));
      (*self->by_tuple)[{kernel, names}] = site;
    }
    return site;
  }
  if (PyTuple_GET_SIZE(names) > MOST_ARGUMENTS) return nullptr;
  PyObject* told = PyObject_CallFunctionObjArgs(self->looks, kernel, names, nullptr);
  PyObject *looks, *caches;
  if (!told || told == Py_None || !PyArg_ParseTuple(told, "SO", &looks, &caches)) {
    Py_XDECREF(told);
    return nullptr;
  }
  if (self->sites->size() >= MOST_SITES) forget_sites(self);
  Site* site = new Site{Py_NewRef(kernel), Py_NewRef(caches), {Py_NewRef(names)}, PyBytes_AS_STRING(looks), {}};
  Py_DECREF(told);
  self->sites->push_back(site);
  (*self->by_tuple)[{kernel, names}] = site;
  return site;
}

// Sizes of the grid: 1, 0 where Triton has to look, -1 with a Python error.
int sizes_of(PyObject* grid, unsigned* size) {
  if (!PyTuple_CheckExact(grid) || PyTuple_GET_SIZE(grid) < 1 || PyTuple_GET_SIZE(grid) > 3) return 0;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(grid); ++i) {
    if (Py_TYPE(PyTuple_GET_ITEM(grid, i)) != &PyLong_Type) return 0;
    const unsigned long given = PyLong_AsUnsignedLong(PyTuple_GET_ITEM(grid, i));
    if (given > INT32_MAX) {
      PyErr_Clear();
      return 0;  // Triton says what is wrong with it
    }
    size[i] = static_cast<unsigned>(given);
  }
  return 1;
}

PyObject* call(PyObject* object, PyObject* const* args, std::size_t nargsf, PyObject* kwnames) {
  auto* self = reinterpret_cast<Launcher*>(object);
  if (PyVectorcall_NARGS(nargsf) != 2 || !kwnames) {
    PyErr_SetString(PyExc_TypeError, "expected a kernel, a grid, and the kernel's arguments by name");
    return nullptr;
  }
  PyObject *kernel = args[0], *grid = args[1];
  unsigned size[3] = {1, 1, 1};
  const int plain = sizes_of(grid, size);
  if (plain && !(size[0] && size[1] && size[2])) Py_RETURN_NONE;
  Site* site = plain ? site_of(self, kernel, kwnames) : nullptr;
  if (!site) return PyErr_Occurred() ? nullptr : through_triton(self, args, kwnames, nullptr, nullptr);
  Call described;
  const Py_ssize_t count = PyTuple_GET_SIZE(kwnames);
  for (int i = 0; i < count; ++i) {
    const int known = describe(self, described, i, args[2 + i], static_cast<Look>(site->looks[i]));
    if (known < 0) return nullptr;
    if (!known) return through_triton(self, args, kwnames, nullptr, nullptr);
  }
  int current;
  if (described.device < 0 || self->driver->current_device(&current) || current != described.device || watched(self->runtime, kernel))
    return through_triton(self, args, kwnames, nullptr, nullptr);
  if (!caches_stand(site)) forget_plans(site);
  const std::string key(reinterpret_cast<const char*>(described.key), 8 * described.words);
  const auto place = site->plans.find(key);
  if (place == site->plans.end()) return through_triton(self, args, kwnames, site, &key);
  Plan* plan = place->second;
  self->hits++;
  std::uint64_t null = 0;
  void* parameters[MOST_ARGUMENTS + 8];
  for (std::size_t i = 0; i < plan->argument.size(); ++i)
    parameters[i] = plan->argument[i] < 0 ? &null : &described.value[plan->argument[i]];
  CUstream stream;
  if (self->torch->api->current_stream(exchange::CUDA, described.device, &stream)) return nullptr;
  int error;
  plan->users++;
  Py_BEGIN_ALLOW_THREADS;  // a full queue makes the launch wait
  error = self->driver->launch(plan->function, size[0], size[1], size[2], plan->threads, 1, 1, plan->shared, stream, parameters, nullptr);
  Py_END_ALLOW_THREADS;
  plan->users--;
  if (plan->forgotten) drop(plan);
  if (error) {
    return self->driver->raise(error);
  }
  Py_RETURN_NONE;
}

// ---- The type ----

PyObject* make(PyTypeObject* type, PyObject* args, PyObject* keywords) {
  static const char* names[] = {"looks", "launch", "plan", "runtime", nullptr};
  PyObject *looks, *launch, *plan, *runtime;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOOO", const_cast<char**>(names), &looks, &launch, &plan, &runtime)) return nullptr;
  const TorchTensors* torch = torch_tensors();
  if (!torch) return nullptr;
  const Driver* driver = Driver::get();
  if (!driver) {
    PyErr_SetString(PyExc_RuntimeError, "libcuda.so.1 is not there");
    return nullptr;
  }
  auto* self = reinterpret_cast<Launcher*>(type->tp_alloc(type, 0));
  if (!self) return nullptr;
  self->vectorcall = call;
  self->looks = Py_NewRef(looks);
  self->launch = Py_NewRef(launch);
  self->plan = Py_NewRef(plan);
  self->runtime = Py_NewRef(runtime);
  self->torch = torch;
  self->driver = driver;
  self->sites = new std::vector<Site*>;
  self->by_tuple = new std::unordered_map<std::pair<PyObject*, PyObject*>, Site*, PairHash>;
  return reinterpret_cast<PyObject*>(self);
}

void destroy(PyObject* object) {
  auto* self = reinterpret_cast<Launcher*>(object);
  forget_sites(self);
  delete self->sites;
  delete self->by_tuple;
  for (PyObject* each : {self->looks, self->launch, self->plan, self->runtime}) Py_XDECREF(each);
  PyTypeObject* type = Py_TYPE(object);
  type->tp_free(object);
  Py_DECREF(type);
}

PyObject* counts(PyObject* object, PyObject*) {
  auto* self = reinterpret_cast<Launcher*>(object);
  Py_ssize_t plans = 0;
  for (const Site* site : *self->sites) plans += site->plans.size();
  return Py_BuildValue("LLn", self->hits, self->misses, plans);
}

PyMethodDef METHODS[] = {{"counts", counts, METH_NOARGS, "Launches of its own, launches through Triton, remembered forms of kernels."}, {}};
PyMemberDef MEMBERS[] = {{"__vectorcalloffset__", T_PYSSIZET, offsetof(Launcher, vectorcall), READONLY, nullptr}, {}};
PyType_Slot SLOTS[] = {
    {Py_tp_doc, const_cast<char*>("launcher(kernel, grid, name=value, ...): as kernel[grid](name=value, ...) of a triton.jit function, on the"
                                  " device of its tensors, on the current stream.")},
    {Py_tp_new, reinterpret_cast<void*>(make)},
    {Py_tp_dealloc, reinterpret_cast<void*>(destroy)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_methods, METHODS},
    {Py_tp_members, MEMBERS},
    {0, nullptr},
};
PyType_Spec SPEC = {"alit_kernels._C.Launcher", sizeof(Launcher), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL, SLOTS};

}  // namespace

PyObject* launcher_type() { return PyType_FromSpec(&SPEC); }

}  // namespace alit
