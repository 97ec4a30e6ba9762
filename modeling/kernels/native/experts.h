#pragma once
#include <cstdint>

namespace kimi {

// y [t, h] = sum over the k experts of a token of weight * down(silu(gate(x)) * up(x)).
// x [t, h], gate_up [e, h, 2 i] with gate's columns first, down [e, i, h], indices and weights [t, k].
// False: an index is no expert.
template <class W>
bool experts(int64_t t, int64_t h, int64_t i, int64_t e, int64_t k, const float *x, const W *gate_up, const W *down,
             const int32_t *indices, const float *weights, float *y);

}  // namespace kimi
