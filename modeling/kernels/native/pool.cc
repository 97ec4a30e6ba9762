#include "pool.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace kimi {
namespace {

// A graph's operators follow each other within microseconds: a worker that slept between them would wake too late. It
// sleeps when nothing came for this long, so that an idle process takes no core from others.
constexpr auto kSpin = std::chrono::microseconds(100);

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int usable_cores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

class Pool {
 public:
  explicit Pool(int count) {
    for (int i = 1; i < count; ++i) workers_.emplace_back([this] { serve(); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      round_.fetch_add(1);
    }
    wake_.notify_all();
    for (auto &worker : workers_) worker.join();
  }

  void run(int64_t units, const std::function<void(int64_t)> &work) {
    if (units <= 1 || workers_.empty()) {
      for (int64_t i = 0; i < units; ++i) work(i);
      return;
    }
    work_ = &work;
    units_ = units;
    next_.store(0, std::memory_order_relaxed);
    busy_.store(int(workers_.size()), std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      round_.fetch_add(1, std::memory_order_release);
    }
    if (sleeping_.load() > 0) wake_.notify_all();
    take();
    while (busy_.load(std::memory_order_acquire) > 0) relax();
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

 private:
  void take() {
    try {
      for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < units_;) (*work_)(i);
    } catch (...) {  // for the caller, when no thread works for it any more
      std::lock_guard<std::mutex> lock(mutex_);
      failure_ = std::current_exception();
    }
  }

  void serve() {
    uint64_t seen = 0;
    for (;;) {
      wait(seen);
      seen = round_.load(std::memory_order_acquire);
      if (stop_) return;
      take();
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  void wait(uint64_t seen) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    for (int i = 1; round_.load(std::memory_order_acquire) == seen; ++i) {
      relax();
      if (i % 64 == 0 && std::chrono::steady_clock::now() > until) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1);
        wake_.wait(lock, [&] { return round_.load() != seen; });
        sleeping_.fetch_sub(1);
        return;
      }
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> round_{0};
  std::atomic<int> sleeping_{0}, busy_{0};
  std::atomic<int64_t> next_{0};
  int64_t units_ = 0;
  const std::function<void(int64_t)> *work_ = nullptr;
  std::exception_ptr failure_;
  bool stop_ = false;
};

struct Shared {
  std::mutex mutex;  // held by whoever uses the pool
  std::unique_ptr<Pool> pool;
  std::atomic<int> count{usable_cores()};
};
Shared &shared() {
  static Shared *s = new Shared();  // not destroyed: workers may run while the process ends
  return *s;
}

}  // namespace

void parallel(int64_t units, const std::function<void(int64_t)> &work) {
  Shared &s = shared();
  std::lock_guard<std::mutex> lock(s.mutex);
  if (!s.pool) s.pool = std::make_unique<Pool>(s.count);
  s.pool->run(units, work);
}

int threads() { return shared().count; }

void set_threads(int count) {
  Shared &s = shared();
  std::lock_guard<std::mutex> lock(s.mutex);
  s.count = std::max(1, count);
  s.pool.reset();
}

}  // namespace kimi
