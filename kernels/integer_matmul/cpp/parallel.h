// A loop shared by the calling thread and those of a pool that come in time.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace llama_jax {

// Calls body(i) for i in 0..count-1. Nobody waits for a thread that has not begun: the caller works until all is taken,
// so that a pool whose threads are all busy, perhaps with this very loop, cannot block it.
// A pool has num_threads() and Schedule(task), as xla::ffi::ThreadPool.
template <typename Pool, typename Body>
void parallel_for(Pool& pool, int64_t count, const Body& body) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  // `body` is alive while an index is left, and is not touched without one.
  auto work = [shared, count, &body] {
    for (int64_t i; (i = shared->next.fetch_add(1)) < count;) {
      body(i);
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(work)(work));
  work();
  for (int spins = 0; shared->done.load(std::memory_order_acquire) < count; ++spins) {
    if (spins > 4000) std::this_thread::yield();
  }
}

}  // namespace llama_jax
