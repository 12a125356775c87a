// DLPack 1.x's exchange API (https://dmlc.github.io/dlpack/latest/c_api.html), by which torch gives another library the
// addresses of tensors and the current stream, without the headers of either; as much of it as is used here.
#pragma once

#include <Python.h>

#include <cstdint>

namespace alit::exchange {

enum DeviceType : std::int32_t { CUDA = 2 };

struct Device {
  std::int32_t type;
  std::int32_t id;
};

struct Type {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {  // DLTensor
  void* data;
  Device device;
  std::int32_t ndim;
  Type type;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct Api {  // DLPackExchangeAPI
  struct {
    std::uint32_t major, minor;
    void* previous;
  } header;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  // Fills in a view of the tensor that lives as long as the object does. 0, or -1 with a Python error.
  int (*tensor_from_object)(void* object, Tensor* out);
  // The stream that work of this thread goes to.
  int (*current_stream)(std::int32_t device_type, std::int32_t device, void** out);
};

constexpr std::uint32_t MAJOR = 1, MINOR = 3;

}  // namespace alit::exchange
