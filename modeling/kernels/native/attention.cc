#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "memory.h"
#include "pool.h"
#include "products.h"

namespace kimi {
namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();

// Flash attention ----------------------------------------------------------------------------------------------------

constexpr int64_t kQueries = 128;  // rows of a block of scores
constexpr int64_t kKeys = 512;     // and columns: 256 KB of them, which stay in the second cache
constexpr int64_t kStep = 64;      // keys are padded to multiples, so that oneDNN meets few sizes

// One head: y [m, value] of q [m, dim], scaled already, k [padded, dim] and v_t [value, padded], in blocks, with one pass
// over the keys (the online softmax of Dao et al., "FlashAttention"). Row r sees the first seen(r) keys, at least one.
template <class E, class Seen>
void attend(int64_t m, int64_t dim, int64_t value, int64_t padded, const E *q, const E *k, const E *v_t, Seen seen,
            float *y, int64_t ldy) {
  auto scores = scratch<float>(kQueries * kKeys);
  auto shares = scratch<E>(kQueries * kKeys);
  auto sums = scratch<float>(kQueries * value);
  float largest[kQueries], total[kQueries];
  for (int64_t first = 0; first < m; first += kQueries) {
    const int64_t rows = std::min(kQueries, m - first);
    std::fill_n(largest, rows, kNothing);
    std::fill_n(total, rows, 0.f);
    std::fill_n(sums.get(), rows * value, 0.f);
    const int64_t last = rounded_up(seen(first + rows - 1), kStep);
    for (int64_t at = 0; at < last; at += kKeys) {
      const int64_t keys = std::min(kKeys, last - at);
      product(rows, keys, dim, q + first * dim, dim, k + at * dim, dim, true, scores.get(), keys, false);
      for (int64_t r = 0; r < rows; ++r) {
        float *row = scores.get() + r * keys;
        int64_t n = std::clamp<int64_t>(seen(first + r) - at, 0, keys);
        const float before = largest[r], found = isa().max(n, row);
        largest[r] = found > before || found != found ? found : before;
        if (largest[r] == kNothing) n = 0;  // every score so far is -inf: minus itself it would be NaN for good
        if (n > 0) {
          if (largest[r] != before && at > 0) {
            const float shrink = std::exp(before - largest[r]);
            isa().scale(value, shrink, sums.get() + r * value);
            total[r] *= shrink;
          }
          total[r] += isa().exp_sum(n, largest[r], row, row);
        }
        std::fill_n(row + n, keys - n, 0.f);
        put(keys, row, shares.get() + r * keys);
      }
      product(rows, value, keys, shares.get(), keys, v_t + at, padded, true, sums.get(), value, true);
    }
    for (int64_t r = 0; r < rows; ++r) {
      float *to = y + (first + r) * ldy;
      std::memcpy(to, sums.get() + r * value, value * sizeof(float));
      isa().scale(value, 1.f / total[r], to);
    }
  }
}

// Queries are shared out too where there are more threads than heads, in whole blocks: how many rows are multiplied at once
// decides how oneDNN adds, so it must not depend on the number of threads.
int64_t queries_of_part(int64_t queries, int64_t heads) {
  const int64_t parts = (threads() + heads - 1) / heads;
  return rounded_up((queries + parts - 1) / parts, kQueries);
}

// Latent attention ---------------------------------------------------------------------------------------------------

// Few tokens: queries are brought into latent space and the cache is read as it is, once, in blocks of slots. What the
// blocks give is put together at the end.
template <class W>
void absorbed(const LatentSizes &s, int64_t t, int64_t start, const float *q_nope, const float *q_rope,
              const float *cache, const W *k_b, const W *v_b, float *y) {
  const int64_t width = s.lora + s.rope, rows = t * s.heads, length = start + t;
  const float scale = 1.f / std::sqrt(float(s.nope + s.rope));
  auto queries = scratch<float>(rows * width);
  parallel(s.heads, [&](int64_t h) {
    for (int64_t r = 0; r < t; ++r) {
      float *to = queries.get() + (r * s.heads + h) * width;
      std::fill_n(to, s.lora, 0.f);
      std::memcpy(to + s.lora, q_rope + (r * s.heads + h) * s.rope, s.rope * sizeof(float));
    }
    axpy(t, s.lora, s.nope, q_nope + h * s.nope, s.heads * s.nope, k_b + h * s.nope * s.lora, s.lora,
         queries.get() + h * width, s.heads * width);
    for (int64_t r = 0; r < t; ++r) isa().scale(width, scale, queries.get() + (r * s.heads + h) * width);
  });

  // By the length alone, so that a result does not depend on the number of threads.
  const int64_t block = std::clamp<int64_t>(rounded_up(length / 32, 16), 32, 128);
  const int64_t blocks = (length + block - 1) / block;
  auto sums = scratch<float>(blocks * rows * s.lora);
  auto largest = scratch<float>(blocks * rows), total = scratch<float>(blocks * rows);
  parallel(blocks, [&](int64_t b) {
    const int64_t first = b * block, slots = std::min(block, length - first);
    const float *from = cache + first * width;
    auto scores = scratch<float>(rows * slots);
    dot(rows, slots, width, queries.get(), width, from, width, scores.get(), slots);
    for (int64_t r = 0; r < rows; ++r) {
      float *row = scores.get() + r * slots;
      const int64_t seen = std::clamp<int64_t>(start + r / s.heads + 1 - first, 0, slots);
      const float most = seen > 0 ? isa().max(seen, row) : kNothing;
      largest[b * rows + r] = most;
      total[b * rows + r] = seen > 0 ? isa().exp_sum(seen, most, row, row) : 0.f;
      std::fill_n(row + seen, slots - seen, 0.f);
    }
    float *to = sums.get() + b * rows * s.lora;
    std::fill_n(to, rows * s.lora, 0.f);
    axpy(rows, s.lora, slots, scores.get(), slots, from, width, to, s.lora);
  });

  parallel(s.heads, [&](int64_t h) {
    auto latent = scratch<float>(s.lora);
    for (int64_t r = h; r < rows; r += s.heads) {
      float most = kNothing, all = 0.f;
      for (int64_t b = 0; b < blocks; ++b) {
        const float x = largest[b * rows + r];
        most = x > most || x != x ? x : most;
      }
      std::fill_n(latent.get(), s.lora, 0.f);
      for (int64_t b = 0; b < blocks; ++b) {
        if (largest[b * rows + r] == kNothing) continue;
        const float share = std::exp(largest[b * rows + r] - most);
        all += share * total[b * rows + r];
        isa().multiply_add(s.lora, share, sums.get() + (b * rows + r) * s.lora, latent.get());
      }
      isa().scale(s.lora, 1.f / all, latent.get());
      dot(1, s.value, s.lora, latent.get(), s.lora, v_b + h * s.value * s.lora, s.lora, y + r * s.value, s.value);
    }
  });
}

// Many tokens: keys and values of what they see are expanded, head by head.
template <class E, class W>
void expanded(const LatentSizes &s, int64_t t, int64_t start, const float *q_nope, const float *q_rope,
              const float *cache, const W *k_b, const W *v_b, float *y) {
  const int64_t width = s.lora + s.rope, dim = s.nope + s.rope, length = start + t, padded = rounded_up(length, kStep);
  const float scale = 1.f / std::sqrt(float(dim));
  auto latent = scratch<E>(padded * s.lora), rope = scratch<E>(padded * s.rope);
  parallel(padded / kStep, [&](int64_t unit) {
    for (int64_t r = unit * kStep; r < (unit + 1) * kStep; ++r) {
      if (r < length) {
        put(s.lora, cache + r * width, latent.get() + r * s.lora);
        put(s.rope, cache + r * width + s.lora, rope.get() + r * s.rope);
      } else {
        std::fill_n(latent.get() + r * s.lora, s.lora, E{});
        std::fill_n(rope.get() + r * s.rope, s.rope, E{});
      }
    }
  });

  const int64_t per_part = queries_of_part(t, s.heads), parts = (t + per_part - 1) / per_part;
  parallel(s.heads * parts, [&](int64_t unit) {
    const int64_t h = unit / parts, first = unit % parts * per_part, rows = std::min(per_part, t - first);
    auto keys = scratch<E>(padded * dim), values = scratch<E>(s.value * padded);
    auto wide = scratch<float>(kKeys * std::max(s.nope, s.value));
    for (int64_t at = 0; at < padded; at += kKeys) {
      const int64_t n = std::min(kKeys, padded - at);
      product(n, s.nope, s.lora, latent.get() + at * s.lora, s.lora, k_b + h * s.nope * s.lora, s.lora, true, wide.get(),
              s.nope, false);
      for (int64_t r = 0; r < n; ++r) {
        E *to = keys.get() + (at + r) * dim;
        put(s.nope, wide.get() + r * s.nope, to);
        std::memcpy(to + s.nope, rope.get() + (at + r) * s.rope, s.rope * sizeof(E));
      }
      // values^T = v_b latent^T: the order in which the second product reads them
      product(s.value, n, s.lora, v_b + h * s.value * s.lora, s.lora, latent.get() + at * s.lora, s.lora, true,
              wide.get(), n, false);
      for (int64_t r = 0; r < s.value; ++r) put(n, wide.get() + r * n, values.get() + r * padded + at);
    }
    auto queries = scratch<E>(rows * dim);
    auto row = scratch<float>(dim);
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(row.get(), q_nope + ((first + r) * s.heads + h) * s.nope, s.nope * sizeof(float));
      std::memcpy(row.get() + s.nope, q_rope + ((first + r) * s.heads + h) * s.rope, s.rope * sizeof(float));
      isa().scale(dim, scale, row.get());
      put(dim, row.get(), queries.get() + r * dim);
    }
    attend(rows, dim, s.value, padded, queries.get(), keys.get(), values.get(),
           [&](int64_t r) { return start + first + r + 1; }, y + (first * s.heads + h) * s.value, s.heads * s.value);
  });
}

// k_b and v_b in fp32, for fp32 arithmetic over bf16 weights.
void expanded_fp32(const LatentSizes &s, int64_t t, int64_t start, const float *q_nope, const float *q_rope,
                   const float *cache, const float *k_b, const float *v_b, float *y) {
  expanded<float>(s, t, start, q_nope, q_rope, cache, k_b, v_b, y);
}
void expanded_fp32(const LatentSizes &s, int64_t t, int64_t start, const float *q_nope, const float *q_rope,
                   const float *cache, const bf16 *k_b, const bf16 *v_b, float *y) {
  const int64_t n_k = s.heads * s.nope * s.lora, n_v = s.heads * s.value * s.lora;
  auto k = scratch<float>(n_k), v = scratch<float>(n_v);
  isa().widen(n_k, k_b, k.get());
  isa().widen(n_v, v_b, v.get());
  expanded<float>(s, t, start, q_nope, q_rope, cache, k.get(), v.get(), y);
}

void expanded_rounded(const LatentSizes &s, int64_t t, int64_t start, const float *q_nope, const float *q_rope,
                      const float *cache, const bf16 *k_b, const bf16 *v_b, float *y) {
  expanded<bf16>(s, t, start, q_nope, q_rope, cache, k_b, v_b, y);
}
void expanded_rounded(const LatentSizes &s, int64_t t, int64_t start, const float *q_nope, const float *q_rope,
                      const float *cache, const float *k_b, const float *v_b, float *y) {
  expanded<float>(s, t, start, q_nope, q_rope, cache, k_b, v_b, y);
}

// Vision -------------------------------------------------------------------------------------------------------------

template <class E>
void attend_image(int64_t n, int64_t heads, int64_t dim, int64_t valid, const float *qkv, const float *cos, const float *sin,
                  float *y) {
  const int64_t ld = heads * dim, half = dim / 2, padded = rounded_up(valid, kStep);
  const float scale = 1.f / std::sqrt(float(dim));
  std::fill_n(y + valid * ld, (n - valid) * ld, 0.f);
  const int64_t per_part = queries_of_part(valid, heads), parts = (valid + per_part - 1) / per_part;
  parallel(heads * parts, [&](int64_t unit) {
    const int64_t h = unit / parts, first = unit % parts * per_part, rows = std::min(per_part, valid - first);
    auto queries = scratch<E>(rows * dim), keys = scratch<E>(padded * dim), values = scratch<E>(dim * padded);
    auto turned = scratch<float>(dim * kStep), row = scratch<float>(dim);
    const float *q = qkv + h * dim, *k = q + ld, *v = k + ld;  // of this head, 3 * ld from patch to patch
    const auto rotate = [&](const float *part, int64_t r) {
      isa().rotate(half, part + r * 3 * ld, cos + r * half, sin + r * half, row.get());
    };
    for (int64_t at = 0; at < padded; at += kStep) {
      const int64_t held = std::min(kStep, valid - at);
      if (held < kStep) {
        std::fill_n(turned.get(), dim * kStep, 0.f);
        std::fill_n(keys.get() + (at + held) * dim, (kStep - held) * dim, E{});
      }
      for (int64_t r = 0; r < held; ++r) {
        const float *from = v + (at + r) * 3 * ld;
        for (int64_t i = 0; i < dim; ++i) turned[i * kStep + r] = from[i];
        rotate(k, at + r);
        put(dim, row.get(), keys.get() + (at + r) * dim);
      }
      for (int64_t i = 0; i < dim; ++i) put(kStep, turned.get() + i * kStep, values.get() + i * padded + at);
    }
    for (int64_t r = 0; r < rows; ++r) {
      rotate(q, first + r);
      isa().scale(dim, scale, row.get());
      put(dim, row.get(), queries.get() + r * dim);
    }
    attend(rows, dim, dim, padded, queries.get(), keys.get(), values.get(), [&](int64_t) { return valid; },
           y + first * ld + h * dim, ld);
  });
}

}  // namespace

template <class W>
void latent_attention(const LatentSizes &s, int64_t t, int64_t start, const float *q_nope, const float *q_rope,
                      const float *cache, const W *k_b, const W *v_b, float *y) {
  if (t <= kFewRows)
    absorbed(s, t, start, q_nope, q_rope, cache, k_b, v_b, y);
  else if (rounds())
    expanded_rounded(s, t, start, q_nope, q_rope, cache, k_b, v_b, y);
  else
    expanded_fp32(s, t, start, q_nope, q_rope, cache, k_b, v_b, y);
}
template void latent_attention(const LatentSizes &, int64_t, int64_t, const float *, const float *, const float *,
                               const bf16 *, const bf16 *, float *);
template void latent_attention(const LatentSizes &, int64_t, int64_t, const float *, const float *, const float *,
                               const float *, const float *, float *);

void vision_attention(int64_t n, int64_t heads, int64_t dim, int64_t valid, const float *qkv, const float *cos,
                      const float *sin, bool rounded, float *y) {
  if (rounded && rounds())
    attend_image<bf16>(n, heads, dim, valid, qkv, cos, sin, y);
  else
    attend_image<float>(n, heads, dim, valid, qkv, cos, sin, y);
}

}  // namespace kimi
