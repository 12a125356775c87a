// Thread pool shared by all CPU kernels.
//
// parallel_for cuts a range into equal pieces, one per thread, so that the partition, and with it every result, depends
// on the range, the grain and the thread count alone. Workers are started on first use and sleep between jobs.
// A call from inside a piece, or while another caller has the pool, runs its pieces on the calling thread. After fork()
// the child starts workers of its own.
#pragma once

#ifndef _WIN32
#include <pthread.h>
#endif

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

namespace alit {

class ThreadPool {
 public:
  // The pool of this process. Never destroyed: workers may outlive static destruction.
  static ThreadPool& instance() {
    static std::once_flag once;
    std::call_once(once, [] {
      current() = new ThreadPool;
#ifndef _WIN32
      // Threads do not survive fork(); the parent's pool is left as it is.
      pthread_atfork(nullptr, nullptr, [] { current() = new ThreadPool; });
#endif
    });
    return *current();
  }

  // Runs piece(0) ... piece(count - 1), the last on the calling thread; rethrows the first exception after all have ended.
  void run(int count, const std::function<void(int)>& piece) {
    // Asked for only where it is needed: a small or nested call must not keep others from the workers.
    std::unique_lock<std::mutex> caller(callers_, std::defer_lock);
    if (count <= 1 || inside() || !caller.try_lock()) {
      const Inside guard;
      for (int i = 0; i < count; ++i) piece(i);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (; workers_ < count - 1; ++workers_) std::thread(&ThreadPool::work, this, workers_).detach();
      piece_ = &piece;
      active_ = pending_ = count - 1;
      error_ = nullptr;
      ++job_;
    }
    start_.notify_all();
    guarded(piece, count - 1);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return pending_ == 0; });
    piece_ = nullptr;
    if (error_) std::rethrow_exception(error_);
  }

 private:
  static ThreadPool*& current() {
    static ThreadPool* pool = nullptr;
    return pool;
  }

  static bool& inside() {
    thread_local bool value = false;
    return value;
  }

  // Marks this thread as running a piece, until the end of the scope.
  struct Inside {
    const bool before = std::exchange(inside(), true);
    ~Inside() { inside() = before; }
  };

  void guarded(const std::function<void(int)>& piece, int index) {
    const Inside guard;
    try {
      piece(index);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }

  void work(int index) {
    std::uint64_t seen = 0;
    for (;;) {
      const std::function<void(int)>* piece = nullptr;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        start_.wait(lock, [&] { return job_ != seen; });
        seen = job_;
        if (index < active_) piece = piece_;
      }
      if (piece == nullptr) continue;
      guarded(*piece, index);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--pending_ == 0) done_.notify_one();
    }
  }

  std::mutex callers_;  // held by the caller that has the workers
  std::mutex mutex_;    // guards everything below
  std::condition_variable start_, done_;
  const std::function<void(int)>* piece_ = nullptr;
  int workers_ = 0, active_ = 0, pending_ = 0;
  std::uint64_t job_ = 0;
  std::exception_ptr error_;
};

// Calls body(begin, end) for consecutive pieces of [0, total), equal to within one: at most `threads` of them, and no more
// than pieces of `grain` would be.
template <typename Body>
void parallel_for(std::int64_t total, std::int64_t grain, int threads, const Body& body) {
  if (total <= 0) return;
  const std::int64_t most = (total + std::max<std::int64_t>(grain, 1) - 1) / std::max<std::int64_t>(grain, 1);
  const int pieces = static_cast<int>(std::min<std::int64_t>(std::max(threads, 1), most));
  const std::int64_t quotient = total / pieces, rest = total % pieces;
  const auto start = [&](std::int64_t i) { return i * quotient + std::min(i, rest); };
  ThreadPool::instance().run(pieces, [&](int i) { body(start(i), start(i + 1)); });
}

}  // namespace alit
