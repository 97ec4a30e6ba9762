// Scratch memory of one call: aligned, not initialised. The C library keeps what is freed, so the next call finds its pages.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace kimi {

struct Free {
  void operator()(void *p) const { std::free(p); }
};
template <class T>
using Scratch = std::unique_ptr<T[], Free>;

template <class T>
Scratch<T> scratch(int64_t count) {
  const size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64 + 64;
  void *p = std::aligned_alloc(64, bytes);
  if (!p) throw std::bad_alloc();
  return Scratch<T>(static_cast<T *>(p));
}

}  // namespace kimi
