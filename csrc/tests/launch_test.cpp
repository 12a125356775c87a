// A launch reports its own errors alone: not what other code left behind, which also stays for that code to find.
#define __CUDACC__
#include "../launch.h"

#include <cstdio>

namespace {

int failures = 0;

void expect(bool held, const char* what) {
  if (held) return;
  std::printf("failed: %s\n", what);
  ++failures;
}

__global__ void twice(int index, const float* in, float* out) { out[index] = 2 * in[index]; }

int call(unsigned launches, cudaError_t device_error, cudaError_t launch_error) {
  const float in[] = {1, 2};
  float out[2] = {};
  next = device_error;
  if (const int code = alit::device::begin(0)) return code;
  next = launch_error;
  for (unsigned i = 0; i < launches; ++i) LAUNCH(twice, 3, 32, 0, 0, 1, in, out);
  expect(launches == (launch_error != cudaSuccess) || out[1] == 4, "arguments arrive");
  return alit::device::end();
}

}  // namespace

int main() {
  expect(call(1, cudaSuccess, cudaSuccess) == 0 && launched == 3, "a launch is reported as one");

  last = cudaErrorInvalidValue;
  expect(call(1, cudaSuccess, cudaSuccess) == 0, "an error of other code is not reported");
  expect(cudaGetLastError() == cudaErrorInvalidValue, "and is left for it");

  const cudaError_t bad = cudaErrorInvalidConfiguration;
  expect(call(2, cudaSuccess, bad) == bad, "the first error is reported");
  expect(cudaGetLastError() == cudaSuccess, "and left for nobody");
  expect(call(1, cudaSuccess, cudaSuccess) == 0, "nor for the next call");

  expect(call(1, cudaErrorInvalidDevice, cudaSuccess) == cudaErrorInvalidDevice, "no such device is reported");
  expect(cudaGetLastError() == cudaSuccess && call(1, cudaSuccess, cudaSuccess) == 0, "once");
  return failures;
}
