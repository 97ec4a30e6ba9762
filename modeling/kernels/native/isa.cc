#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <vector>

#include "isa_sets.h"
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kimi {
namespace {

#if defined(__x86_64__)
uint32_t cpuid7(int leaf, int reg) {
  uint32_t r[4] = {};
  __get_cpuid_count(7, leaf, &r[0], &r[1], &r[2], &r[3]);
  return r[reg];
}
bool has_avx512_bf16() { return cpuid7(1, 0) >> 5 & 1; }

// AMX's registers are so large that Linux wants to be asked before a process uses them.
bool has_amx() {
  constexpr long kRequest = 0x1023, kTileData = 18;
  const uint32_t edx = cpuid7(0, 3);
  const bool there = (edx >> 22 & 1) && (edx >> 24 & 1);  // amx-bf16, amx-tile
  return there && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

// Of this machine, the best last.
const std::vector<Isa> &sets() {
  static const std::vector<Isa> *all = [] {
    auto *found = new std::vector<Isa>{plain_isa()};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found->push_back(avx2_isa());
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      found->push_back(avx512_isa());
      if (has_avx512_bf16()) {
        Isa isa = avx512_isa();
        add_avx512_bf16(isa);
        found->push_back(isa);
        if (has_amx()) {
          add_amx(isa);
          found->push_back(isa);
        }
      }
    }
#endif
    return found;
  }();
  return *all;
}

std::atomic<const Isa *> &chosen() {
  static std::atomic<const Isa *> isa{&sets().back()};
  return isa;
}

}  // namespace

const Isa &isa() { return *chosen().load(std::memory_order_relaxed); }

bool set_isa(const char *name) {
  for (const Isa &set : sets())
    if (std::strcmp(set.name, name) == 0) {
      chosen() = &set;
      return true;
    }
  return false;
}

}  // namespace kimi
