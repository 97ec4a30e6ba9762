// For any machine: vectors of four floats, which are SSE2's on x86-64 and NEON's on aarch64.
#include "isa_sets.h"

#define WIDTH 4
namespace kimi::plain {
#include "isa_loops.h"
}  // namespace kimi::plain

namespace kimi {
Isa plain_isa() { return plain::table("plain"); }
}  // namespace kimi
