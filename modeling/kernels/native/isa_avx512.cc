#include "isa_sets.h"

#if defined(__x86_64__)
#define TARGET "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"
#include "target_begin.h"
#define WIDTH 16
namespace kimi::avx512 {
#include "isa_loops.h"
}  // namespace kimi::avx512

namespace kimi {
Isa avx512_isa() { return avx512::table("avx512"); }
}  // namespace kimi
#include "target_end.h"
#endif
