#pragma once
#include <cstdint>

namespace kimi {

struct LatentSizes {
  int64_t heads, nope, rope, value, lora;
};

// Causal multi-head latent attention of t new tokens over the cache of one sequence, the new tokens' rows included.
// q_nope [t, heads, nope], q_rope [t, heads, rope] rotated, cache [slots, lora + rope], k_b [heads, nope, lora],
// v_b [heads, value, lora] -> y [t, heads, value]. Token r sees slots 0 to start + r.
template <class W>
void latent_attention(const LatentSizes &sizes, int64_t t, int64_t start, const float *q_nope, const float *q_rope,
                      const float *cache, const W *k_b, const W *v_b, float *y);

// Attention of the first `valid` patches of one image over each other: qkv [n, 3, heads, dim], cos and sin [n, dim / 2], by
// which q and k are rotated, y [n, heads, dim]. The others are padding: their y is 0. `rounded` as products of bf16 weights
// are.
void vision_attention(int64_t n, int64_t heads, int64_t dim, int64_t valid, const float *qkv, const float *cos,
                      const float *sin, bool rounded, float *y);

}  // namespace kimi
