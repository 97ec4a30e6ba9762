#pragma once
#include <cstdint>

namespace kimi {

// Sigmoid scores in fp32; bias takes part in the choice only. x [t, h], w [e, h], bias [e] -> the k experts of each token,
// the best first and of equal ones the first, and their scores [t, k], as shares of their sum if `normalised`, times factor.
void route_tokens(int64_t t, int64_t h, int64_t e, int64_t k, const float *x, const float *w, const float *bias,
                  bool normalised, float factor, int32_t *indices, float *weights);

}  // namespace kimi
