// Matrix products by oneDNN, which MindSpore brings along: found in the process at run time, not linked.
#pragma once
#include <cstdint>

#include "numbers.h"

namespace kimi::onednn {

// Whether there is a oneDNN whose interface is known here.
bool available();

// Whether it multiplies bf16 with instructions for it (elsewhere it refuses, or is slower than fp32).
bool has_bf16();

// Version, or why there is none.
const char *description();

// C [m, n] = A [m, k] B, or C += A B with `accumulate`; B is [k, n], or [n, k] if it is `transposed`. On the calling thread
// alone. Leading dimensions in elements. False: oneDNN refused.
bool matmul(int64_t m, int64_t n, int64_t k, const bf16 *a, int64_t lda, const bf16 *b, int64_t ldb, bool transposed,
            float *c, int64_t ldc, bool accumulate);
bool matmul(int64_t m, int64_t n, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, bool transposed,
            float *c, int64_t ldc, bool accumulate);

}  // namespace kimi::onednn
