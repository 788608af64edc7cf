// Work for torch's threads, handed to torch-free sources as a function: no second pool of threads.
#pragma once

#include <atomic>
#include <cstdint>

namespace nybble {

// Calls body(begin, end, context) on pieces of [0, count) of at least `grain`, on several threads, and waits for all.
using Parallel = void (*)(int64_t count, int64_t grain, void (*body)(int64_t begin, int64_t end, void*), void* context);

// f(begin, end) on pieces of [0, count), all about as long.
template <typename F>
void in_parallel(Parallel parallel, int64_t count, int64_t grain, const F& f) {
  parallel(count, grain, [](int64_t begin, int64_t end, void* g) { (*static_cast<const F*>(g))(begin, end); },
           const_cast<F*>(&f));
}

// Items of unequal sizes, each taken by the next thread that is free: f(next) once on each of at most `threads`, where
// next() gives the number of an item, and `count` when there are no more.
template <typename F>
void take_turns(Parallel parallel, int64_t threads, int64_t count, const F& f) {
  std::atomic<int64_t> taken{0};
  auto next = [&] {
    int64_t item = taken.fetch_add(1, std::memory_order_relaxed);
    return item < count ? item : count;
  };
  in_parallel(parallel, threads < count ? threads : count, 1, [&](int64_t, int64_t) { f(next); });
}

}  // namespace nybble
