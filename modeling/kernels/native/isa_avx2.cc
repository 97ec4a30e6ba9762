#include "isa_sets.h"

#if defined(__x86_64__)
#define TARGET "avx2,fma"
#include "target_begin.h"
#define WIDTH 8
namespace kimi::avx2 {
#include "isa_loops.h"
}  // namespace kimi::avx2

namespace kimi {
Isa avx2_isa() { return avx2::table("avx2"); }
}  // namespace kimi
#include "target_end.h"
#endif
