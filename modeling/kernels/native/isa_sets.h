// One table per instruction set; what a machine lacks must not be called, only asked for.
#pragma once
#include "isa.h"
#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own header
#endif
#include <immintrin.h>
#endif

namespace kimi {
Isa plain_isa();
#if defined(__x86_64__)
Isa avx2_isa();
Isa avx512_isa();
void add_avx512_bf16(Isa &isa);  // on top of avx512
void add_amx(Isa &isa);          // on top of avx512
#endif
}  // namespace kimi
