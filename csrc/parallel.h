// Thread pool shared by all CPU kernels.
//
// parallel_for cuts a range into equal pieces, so that the partition, and with it every result, depends on the range, the
// grain and the thread count alone. There are several pieces for each thread, and each free thread takes the next: a
// worker whose core is busy elsewhere (with the spinning threads of an OpenMP library, say) delays little.
// Workers are started on first use and sleep between jobs. A call from inside a piece, or while another caller has the
// pool, runs its pieces on the calling thread. After fork() the child starts workers of its own.
//
// Beside an OpenMP library that has the cores already, the pool borrows its threads instead (use_team): such threads wait
// for their next job by spinning, up to tens of milliseconds, and would take the core from workers of ours.
#pragma once

#ifndef _WIN32
#include <pthread.h>
#endif

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <system_error>
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
      pthread_atfork(nullptr, nullptr, [] {
        current() = new ThreadPool;
        borrowed() = nullptr;
      });
#endif
    });
    return *current();
  }

  // Runs body(data) on `threads` threads or fewer, the calling one among them, and returns when all have: GOMP_parallel,
  // the entry that GCC's, LLVM's and Intel's OpenMP libraries share.
  using Team = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

  // From now on, jobs run on threads of `team`; on workers of the pool again with null, and in a child after fork(),
  // where the team's threads are gone.
  static void use_team(Team team) {
    instance();
    borrowed() = team;
  }

  // Runs piece(0) ... piece(count - 1) on at most `threads` threads, the calling one among them; rethrows the first
  // exception after all have ended.
  void run(int count, int threads, const std::function<void(int)>& piece) {
    if (const Team team = borrowed(); team != nullptr && count > 1 && threads > 1 && !inside()) {
      Shared job{piece, count};
      // Always all threads, also for fewer pieces: the libraries end and start threads when the number changes.
      team([](void* data) { static_cast<Shared*>(data)->work(); }, &job, static_cast<unsigned>(threads), 0);
      if (job.error) std::rethrow_exception(job.error);
      return;
    }
    // The pool is locked only where it is needed: a small or nested call must not keep others from the workers.
    std::unique_lock<std::mutex> caller(callers_, std::defer_lock);
    if (count <= 1 || threads <= 1 || inside() || !caller.try_lock()) {
      const Inside guard;
      for (int i = 0; i < count; ++i) piece(i);
      return;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    active_ = std::min(threads, count) - 1;
    try {
      for (; workers_ < active_; ++workers_) std::thread(&ThreadPool::work, this, workers_).detach();
    } catch (const std::system_error&) {  // the system gives no more threads: those there are, the caller at least
      active_ = workers_;
    }
    piece_ = &piece;
    next_ = 0;
    count_ = pending_ = count;
    error_ = nullptr;
    start_.notify_all();
    while (next_ < count_) take(lock);
    done_.wait(lock, [this] { return pending_ == 0; });
    if (error_) std::rethrow_exception(error_);
  }

 private:
  static ThreadPool*& current() {
    static ThreadPool* pool = nullptr;
    return pool;
  }

  static std::atomic<Team>& borrowed() {
    static std::atomic<Team> team{nullptr};
    return team;
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

  // A job of a borrowed team: each free thread takes the next piece.
  struct Shared {
    void work() {
      const Inside guard;
      for (int index = next++; index < count; index = next++) {
        try {
          piece(index);
        } catch (...) {
          const std::lock_guard<std::mutex> lock(mutex);
          if (!error) error = std::current_exception();
        }
      }
    }

    const std::function<void(int)>& piece;
    const int count;
    std::atomic<int> next{0};
    std::mutex mutex{};  // guards error
    std::exception_ptr error{};
  };

  // Runs the next piece with the lock released.
  void take(std::unique_lock<std::mutex>& lock) {
    const int index = next_++;
    lock.unlock();
    std::exception_ptr error;
    try {
      const Inside guard;
      (*piece_)(index);
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    if (error && !error_) error_ = error;
    if (--pending_ == 0) done_.notify_one();
  }

  void work(int worker) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      start_.wait(lock, [&] { return worker < active_ && next_ < count_; });
      take(lock);
    }
  }

  std::mutex callers_;  // held by the caller that has the workers
  std::mutex mutex_;    // guards everything below
  std::condition_variable start_, done_;
  const std::function<void(int)>* piece_ = nullptr;  // of the job under way: valid while pieces are pending
  int workers_ = 0, active_ = 0;                     // started; those that may help in this job
  int next_ = 0, count_ = 0, pending_ = 0;           // pieces: the next to take, all, not yet ended
  std::exception_ptr error_;
};

constexpr int kPiecesPerThread = 8;

// Calls body(begin, end) for consecutive pieces of [0, total), equal to within one: one for a single thread, else at most
// kPiecesPerThread for each, and no more than pieces of `grain` would be.
template <typename Body>
void parallel_for(std::int64_t total, std::int64_t grain, int threads, const Body& body) {
  if (total <= 0) return;
  const std::int64_t most = (total + std::max<std::int64_t>(grain, 1) - 1) / std::max<std::int64_t>(grain, 1);
  const int pieces = static_cast<int>(std::min<std::int64_t>(threads > 1 ? threads * kPiecesPerThread : 1, most));
  const std::int64_t quotient = total / pieces, rest = total % pieces;
  const auto start = [&](std::int64_t i) { return i * quotient + std::min(i, rest); };
  ThreadPool::instance().run(pieces, threads, [&](int i) { body(start(i), start(i + 1)); });
}

}  // namespace alit
