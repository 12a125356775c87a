// One source for CUDA kernels and for the CPU: LAUNCH is a launch under nvcc, and an emulation under any other compiler.
//
//   LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...)    one-dimensional grid and block
//   DYNAMIC_SHARED(T, name)                                            T* name: the shared memory of the launch
//   UNROLL for (...)                                                   a loop whose every step is written out
//
// The emulation runs blocks in turn and the threads of a block as fibers that change at __syncthreads(), so that a race
// is not seen but everything else is: every read and write, under a sanitizer too. With ALIT_EMULATE_THREADS the threads
// of a block are threads indeed and __syncthreads() is a barrier: slow, and made for ThreadSanitizer. Kernels keep to
// threadIdx.x, blockIdx.x, blockDim.x, gridDim.x, __syncthreads() reached by all threads, atomicOr() and __popc().
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__

#include <cuda_runtime.h>

#include <tuple>
#include <utility>

#define DYNAMIC_SHARED(T, name)                                       \
  extern __shared__ __align__(16) unsigned char alit_shared_memory[]; \
  T* const name = reinterpret_cast<T*>(alit_shared_memory)
#define UNROLL _Pragma("unroll")
#define LAUNCH(kernel, grid, block, shared, stream, ...) \
  alit::device::launch(kernel, static_cast<unsigned>(grid), block, shared, stream, __VA_ARGS__)

namespace alit::device {

// The first error of this thread's launches since begin().
inline thread_local cudaError_t failure = cudaSuccess;

// Keeps an error of ours, and clears it from cudaGetLastError(). An error that other code left there stays: it is not
// ours, nor ours to clear.
inline int noted(cudaError_t code) {
  if (code != cudaSuccess) {
    cudaGetLastError();
    if (failure == cudaSuccess) failure = code;
  }
  return static_cast<int>(code);
}

// Makes the device current; 0 or an error code of CUDA.
inline int begin(int device) {
  failure = cudaSuccess;
  return noted(cudaSetDevice(device));
}

// 0, or the error code of the first launch since that failed.
inline int end() { return static_cast<int>(failure); }

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), unsigned grid, unsigned block, std::size_t shared, std::int64_t stream,
            Arguments&&... arguments) {
  std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  std::apply(
      [&](Parameters&... value) {
        void* addresses[] = {const_cast<void*>(static_cast<const volatile void*>(&value))...};
        noted(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(grid), dim3(block), addresses, shared,
                               reinterpret_cast<cudaStream_t>(stream)));
      },
      values);
}

}  // namespace alit::device

#else

#include <ucontext.h>

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__

namespace alit::emulation {

struct Index {
  unsigned x = 0;
};

inline thread_local Index thread_index, block_index, block_size, grid_size;

// The shared memory of the block that runs; sized for each launch, so that a sanitizer sees its end.
inline std::unique_ptr<std::max_align_t[]>& shared_memory() {
  static std::unique_ptr<std::max_align_t[]> memory;
  return memory;
}

#ifdef ALIT_EMULATE_THREADS

class Block {
 public:
  static Block*& current() {
    static Block* block = nullptr;
    return block;
  }

  void run(unsigned block, unsigned grid, unsigned threads, const std::function<void()>& body) {
    current() = this;
    threads_ = threads;
    std::vector<std::thread> running;
    for (unsigned i = 0; i < threads; ++i)
      running.emplace_back([=, &body] {
        thread_index.x = i;
        block_index.x = block;
        block_size.x = threads;
        grid_size.x = grid;
        body();
      });
    for (std::thread& thread : running) thread.join();
  }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const unsigned generation = generation_;
    if (++waiting_ == threads_) {
      waiting_ = 0;
      ++generation_;
      all_.notify_all();
    } else {
      all_.wait(lock, [&] { return generation_ != generation; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_;
  unsigned threads_ = 0, waiting_ = 0, generation_ = 0;
};

#else

// Fibers that take turns: each runs to the next barrier or to its end before the next one does.
class Block {
 public:
  static Block*& current() {
    static Block* block = nullptr;
    return block;
  }

  void run(unsigned block, unsigned grid, unsigned threads, const std::function<void()>& body) {
    current() = this;
    body_ = &body;
    block_index.x = block;
    grid_size.x = grid;
    block_size.x = threads;
    fibers_.resize(threads);
    for (Fiber& fiber : fibers_) {
      if (!fiber.stack) fiber.stack.reset(new char[kStack]);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = &scheduler_;
      fiber.done = false;
      makecontext(&fiber.context, &Block::enter, 0);
    }
    for (unsigned left = threads; left > 0;)
      for (unsigned i = 0; i < threads; ++i) {
        if (fibers_[i].done) continue;
        thread_index.x = running_ = i;
        switch_to(fibers_[i].context, fibers_[i].stack.get(), kStack);
        left -= fibers_[i].done;
      }
  }

  // Called by a fiber: returns to the scheduler until all other fibers have come as far.
  void wait() {
    Fiber& fiber = fibers_[running_];
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, scheduler_stack_, scheduler_size_);
    swapcontext(&fiber.context, &scheduler_);
    __sanitizer_finish_switch_fiber(fake, &scheduler_stack_, &scheduler_size_);
#else
    swapcontext(&fiber.context, &scheduler_);
#endif
  }

 private:
  static constexpr std::size_t kStack = 1 << 16;

  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
  };

  static void enter() {
    Block& block = *current();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack_, &block.scheduler_size_);
#endif
    (*block.body_)();
    block.fibers_[block.running_].done = true;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(nullptr, block.scheduler_stack_, block.scheduler_size_);
#endif
  }

  void switch_to(ucontext_t& context, [[maybe_unused]] const void* stack, [[maybe_unused]] std::size_t size) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack, size);
    swapcontext(&scheduler_, &context);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    swapcontext(&scheduler_, &context);
#endif
  }

  std::vector<Fiber> fibers_;
  const std::function<void()>* body_ = nullptr;
  ucontext_t scheduler_;
  unsigned running_ = 0;
  const void* scheduler_stack_ = nullptr;
  std::size_t scheduler_size_ = 0;
};

#endif

// Emulates a launch, one at a time: memory that a block shares is global here.
inline void launch(std::int64_t grid, unsigned threads, std::size_t shared, const std::function<void()>& body) {
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  Block block;
  for (std::int64_t b = 0; b < grid; ++b) {
    const std::size_t count = (shared + sizeof(std::max_align_t) - 1) / sizeof(std::max_align_t);
    shared_memory().reset(new std::max_align_t[count]);
    block.run(static_cast<unsigned>(b), static_cast<unsigned>(grid), threads, body);
  }
}

inline void synchronize_block() { Block::current()->wait(); }

}  // namespace alit::emulation

#define threadIdx (alit::emulation::thread_index)
#define blockIdx (alit::emulation::block_index)
#define blockDim (alit::emulation::block_size)
#define gridDim (alit::emulation::grid_size)
#ifdef ALIT_EMULATE_WITHOUT_BARRIERS  // so that a test can see that races are found
#define __syncthreads() ((void)0)
#else
#define __syncthreads() alit::emulation::synchronize_block()
#endif
#define DYNAMIC_SHARED(T, name) T* const name = reinterpret_cast<T*>(alit::emulation::shared_memory().get())
#define UNROLL
#define LAUNCH(kernel, grid, block, shared, stream, ...) \
  ((void)(stream), alit::emulation::launch(grid, block, shared, [&] { (kernel)(__VA_ARGS__); }))

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int atomicOr(int* address, int value) { return __atomic_fetch_or(address, value, __ATOMIC_RELAXED); }

namespace alit::device {

inline int begin(int) { return 0; }
inline int end() { return 0; }

}  // namespace alit::device

#endif
