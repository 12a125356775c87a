// Stand-in for what csrc/launch.h takes of CUDA's runtime; its calls fail when a test says so (launch_test.cpp).
#pragma once

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
};
using cudaStream_t = void*;

struct dim3 {
  explicit dim3(unsigned x) : x(x) {}
  unsigned x;
};

#define __global__

// The error that the next call makes, and the last one that was made.
inline cudaError_t next = cudaSuccess, last = cudaSuccess;
inline unsigned launched = 0;

inline cudaError_t made() {
  const cudaError_t code = next;
  next = cudaSuccess;
  if (code != cudaSuccess) last = code;
  return code;
}

inline cudaError_t cudaGetLastError() {
  const cudaError_t code = last;
  last = cudaSuccess;
  return code;
}

inline cudaError_t cudaSetDevice(int) { return made(); }

// Runs the kernel, void(int, const float*, float*), once.
inline cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3, void** arguments, unsigned long, cudaStream_t) {
  const cudaError_t code = made();
  if (code != cudaSuccess) return code;
  launched += grid.x;
  reinterpret_cast<void (*)(int, const float*, float*)>(const_cast<void*>(kernel))(
      *static_cast<int*>(arguments[0]), *static_cast<const float**>(arguments[1]), *static_cast<float**>(arguments[2]));
  return code;
}
