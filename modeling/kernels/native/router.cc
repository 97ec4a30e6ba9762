#include "router.h"

#include "memory.h"
#include "products.h"

namespace kimi {

void route_tokens(int64_t t, int64_t h, int64_t e, int64_t k, const float *x, const float *w, const float *bias,
                  bool normalised, float factor, int32_t *indices, float *weights) {
  constexpr float kSmallestSum = 1e-20f;  // as in the other backends
  auto scores = scratch<float>(t * e), choice = scratch<float>(e);
  linear<float>(t, e, h, x, w, nullptr, isa().sigmoid, scores.get());
  for (int64_t r = 0; r < t; ++r) {
    const float *score = scores.get() + r * e;
    auto taken = scratch<bool>(e);
    for (int64_t i = 0; i < e; ++i) {
      choice[i] = score[i] + bias[i];
      taken[i] = false;
    }
    float sum = 0;
    for (int64_t s = 0; s < k; ++s) {
      int64_t best = -1;
      for (int64_t i = 0; i < e; ++i) {
        if (taken[i]) continue;
        const bool first = best < 0, larger = !first && choice[i] > choice[best];
        const bool nan = !first && choice[i] != choice[i] && choice[best] == choice[best];  // counts as the largest
        if (first || larger || nan) best = i;
      }
      taken[best] = true;
      indices[r * k + s] = int32_t(best);
      weights[r * k + s] = score[best];
      sum += score[best];
    }
    for (int64_t s = 0; s < k; ++s) {
      float &weight = weights[r * k + s];
      weight = (normalised ? weight / (sum + kSmallestSum) : weight) * factor;
    }
  }
}

}  // namespace kimi
