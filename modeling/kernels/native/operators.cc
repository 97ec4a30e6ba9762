// The operators as MindSpore calls them (custom operators of type "aot"): pointers to inputs, then outputs, with their
// shapes and dtypes. A function gives 0, or what it found wrong: 1 a shape or a dtype, 2 an index, 3 no memory. The graph
// that called it is then unusable, so hosts check ids and positions before. `cpu.py` says what each one computes.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <new>

#include "attention.h"
#include "experts.h"
#include "isa.h"
#include "memory.h"
#include "onednn.h"
#include "pool.h"
#include "products.h"
#include "router.h"

using namespace kimi;

#define OPERATOR(name)                                                                                             \
  extern "C" __attribute__((visibility("default"))) int kimi_##name(int count, void **data, int *ndims, int64_t **shapes, \
                                                                    const char **dtypes, void *, void *)

namespace {

constexpr int kOk = 0, kBadShape = 1, kBadIndex = 2, kNoMemory = 3;
constexpr int64_t kAny = -1;

class Call {
 public:
  Call(int count, void **data, int *ndims, int64_t **shapes, const char **dtypes)
      : count_(count), data_(data), ndims_(ndims), shapes_(shapes), dtypes_(dtypes) {}

  int count() const { return count_; }
  int64_t dim(int i, int axis) const { return shapes_[i][axis]; }
  template <class T>
  T *at(int i) const {
    return static_cast<T *>(data_[i]);
  }
  bool is(int i, const char *dtype) const { return std::strcmp(dtypes_[i], dtype) == 0; }
  bool is_bf16(int i) const { return is(i, "bfloat16"); }

  bool has(int i, const char *dtype, std::initializer_list<int64_t> shape) const {
    return is(i, dtype) && has_shape(i, shape);
  }
  // A weight is bf16 or fp32.
  bool has_weight(int i, std::initializer_list<int64_t> shape) const {
    return (is_bf16(i) || is(i, "float32")) && has_shape(i, shape);
  }

 private:
  // There may be no rows, but rows of nothing are refused: nobody has them, and much divides by a width.
  bool has_shape(int i, std::initializer_list<int64_t> shape) const {
    if (ndims_[i] != int(shape.size())) return false;
    return std::equal(shape.begin(), shape.end(), shapes_[i],
                      [](int64_t expected, int64_t found) { return expected == kAny || expected == found; }) &&
           std::all_of(shapes_[i] + 1, shapes_[i] + shape.size(), [](int64_t found) { return found > 0; });
  }

  int count_;
  void **data_;
  int *ndims_;
  int64_t **shapes_;
  const char **dtypes_;
};

template <class F>
int guarded(F f) {
  try {
    return f();
  } catch (const std::bad_alloc &) {
    return kNoMemory;
  }
}

// A weight in fp32.
Scratch<float> widened(const Call &c, int i, int64_t n) {
  auto wide = scratch<float>(n);
  if (c.is_bf16(i))
    isa().widen(n, c.at<bf16>(i), wide.get());
  else
    std::memcpy(wide.get(), c.at<float>(i), n * sizeof(float));
  return wide;
}

// Calls f(row) for every row; over the pool where there is enough to do.
template <class F>
void for_rows(int64_t rows, int64_t width, F f) {
  constexpr int64_t kWorth = 16 << 10;
  const int64_t step = std::max<int64_t>(1, kWorth / width);
  parallel((rows + step - 1) / step, [&](int64_t unit) {
    for (int64_t r = unit * step; r < std::min(rows, (unit + 1) * step); ++r) f(r);
  });
}

void rms_norm(int64_t n, const float *x, const float *w, float eps, float *y) {
  const float mean = isa().sum_squares(n, 0.f, x) / float(n);
  isa().normalise(n, x, 0.f, 1.f / std::sqrt(mean + eps), w, nullptr, y);
}

void layer_norm(int64_t n, const float *x, const float *w, const float *b, float eps, float *y) {
  const float mean = isa().sum(n, x) / float(n);
  const float variance = isa().sum_squares(n, mean, x) / float(n);
  isa().normalise(n, x, mean, 1.f / std::sqrt(variance + eps), w, b, y);
}

// y = f(x w^T + bias)
int linear_operator(const Call &c, Activation f) {
  const int out = c.count() - 1;
  if ((out != 2 && out != 3) || !c.has(0, "float32", {kAny, kAny}) || !c.has_weight(1, {kAny, c.dim(0, 1)}) ||
      !c.has(out, "float32", {c.dim(0, 0), c.dim(1, 0)}))
    return kBadShape;
  const int64_t t = c.dim(0, 0), k = c.dim(0, 1), n = c.dim(1, 0);
  const bool biased = out == 3;
  if (biased && (!c.has_weight(2, {n}) || c.is_bf16(2) != c.is_bf16(1))) return kBadShape;
  if (c.is_bf16(1))
    linear(t, n, k, c.at<float>(0), c.at<bf16>(1), biased ? c.at<bf16>(2) : nullptr, f, c.at<float>(out));
  else
    linear(t, n, k, c.at<float>(0), c.at<float>(1), biased ? c.at<float>(2) : nullptr, f, c.at<float>(out));
  return kOk;
}

int attend_image(const Call &c, bool rounded) {
  if (c.count() != 5 || !c.has(0, "float32", {kAny, kAny}) || !c.has(1, "float32", {c.dim(0, 0), kAny})) return kBadShape;
  const int64_t n = c.dim(0, 0), dim = 2 * c.dim(1, 1), heads = c.dim(0, 1) / (3 * dim);
  if (c.dim(0, 1) != 3 * heads * dim || !c.has(2, "float32", {n, dim / 2}) || !c.has(3, "int32", {1}) ||
      !c.has(4, "float32", {n, heads * dim}))
    return kBadShape;
  const int64_t valid = *c.at<int32_t>(3);
  if (n == 0) return kOk;
  if (valid < 1 || valid > n) return kBadIndex;
  vision_attention(n, heads, dim, valid, c.at<float>(0), c.at<float>(1), c.at<float>(2), rounded, c.at<float>(4));
  return kOk;
}

}  // namespace

// x [R, in], weight [out, in] (, bias [out]) -> [R, out], and GELU of it: the tanh form, and the one by the error function
OPERATOR(linear) {
  return guarded([&] { return linear_operator(Call(count, data, ndims, shapes, dtypes), nullptr); });
}
OPERATOR(linear_gelu_tanh) {
  return guarded([&] { return linear_operator(Call(count, data, ndims, shapes, dtypes), isa().gelu_tanh); });
}
OPERATOR(linear_gelu_erf) {
  return guarded([&] { return linear_operator(Call(count, data, ndims, shapes, dtypes), isa().gelu_erf); });
}

// table [V, H], ids [R] -> [R, H]
OPERATOR(embedding) {
  return guarded([&] {
    const Call c(count, data, ndims, shapes, dtypes);
    if (count != 3 || !c.has_weight(0, {kAny, kAny}) || !c.has(1, "int32", {kAny}) ||
        !c.has(2, "float32", {c.dim(1, 0), c.dim(0, 1)}))
      return kBadShape;
    const int64_t v = c.dim(0, 0), h = c.dim(0, 1), rows = c.dim(1, 0);
    const int32_t *ids = c.at<int32_t>(1);
    for (int64_t r = 0; r < rows; ++r)
      if (ids[r] < 0 || ids[r] >= v) return kBadIndex;
    for_rows(rows, h, [&](int64_t r) {
      float *to = c.at<float>(2) + r * h;
      if (c.is_bf16(0))
        isa().widen(h, c.at<bf16>(0) + ids[r] * h, to);
      else
        std::memcpy(to, c.at<float>(0) + ids[r] * h, h * sizeof(float));
    });
    return kOk;
  });
}

// x [R, H], weight [H], eps [1] -> [R, H]
OPERATOR(rms_norm) {
  return guarded([&] {
    const Call c(count, data, ndims, shapes, dtypes);
    if (count != 4 || !c.has(0, "float32", {kAny, kAny}) || !c.has_weight(1, {c.dim(0, 1)}) || !c.has(2, "float32", {1}) ||
        !c.has(3, "float32", {c.dim(0, 0), c.dim(0, 1)}))
      return kBadShape;
    const int64_t n = c.dim(0, 1);
    const auto w = widened(c, 1, n);
    for_rows(c.dim(0, 0), n, [&](int64_t r) {
      rms_norm(n, c.at<float>(0) + r * n, w.get(), *c.at<float>(2), c.at<float>(3) + r * n);
    });
    return kOk;
  });
}

// x, y [R, H], weight [H], eps [1] -> x + y, its norm
OPERATOR(add_rms_norm) {
  return guarded([&] {
    const Call c(count, data, ndims, shapes, dtypes);
    if (count != 6 || !c.has(0, "float32", {kAny, kAny})) return kBadShape;
    const auto like_x = {c.dim(0, 0), c.dim(0, 1)};
    if (!c.has(1, "float32", like_x) ||
        !c.has_weight(2, {c.dim(0, 1)}) || !c.has(3, "float32", {1}) || !c.has(4, "float32", like_x) ||
        !c.has(5, "float32", like_x))
      return kBadShape;
    const int64_t n = c.dim(0, 1);
    const auto w = widened(c, 2, n);
    for_rows(c.dim(0, 0), n, [&](int64_t r) {
      float *total = c.at<float>(4) + r * n;
      isa().add(n, c.at<float>(0) + r * n, c.at<float>(1) + r * n, total);
      rms_norm(n, total, w.get(), *c.at<float>(3), c.at<float>(5) + r * n);
    });
    return kOk;
  });
}

// x [R, H], weight, bias [H], eps [1] -> [R, H]
OPERATOR(layer_norm) {
  return guarded([&] {
    const Call c(count, data, ndims, shapes, dtypes);
    if (count != 5 || !c.has(0, "float32", {kAny, kAny}) || !c.has_weight(1, {c.dim(0, 1)}) ||
        !c.has_weight(2, {c.dim(0, 1)}) || !c.has(3, "float32", {1}) ||
        !c.has(4, "float32", {c.dim(0, 0), c.dim(0, 1)}))
      return kBadShape;
    const int64_t n = c.dim(0, 1);
    const auto w = widened(c, 1, n), b = widened(c, 2, n);
    for_rows(c.dim(0, 0), n, [&](int64_t r) {
      layer_norm(n, c.at<float>(0) + r * n, w.get(), b.get(), *c.at<float>(3), c.at<float>(4) + r * n);
    });
    return kOk;
  });
}

// x, y [R, H], weight, bias [H], eps [1] -> x + y, its norm
OPERATOR(add_layer_norm) {
  return guarded([&] {
    const Call c(count, data, ndims, shapes, dtypes);
    if (count != 7 || !c.has(0, "float32", {kAny, kAny})) return kBadShape;
    const auto like_x = {c.dim(0, 0), c.dim(0, 1)};
    if (!c.has(1, "float32", like_x) || !c.has_weight(2, {c.dim(0, 1)}) || !c.has_weight(3, {c.dim(0, 1)}) ||
        !c.has(4, "float32", {1}) || !c.has(5, "float32", like_x) || !c.has(6, "float32", like_x))
      return kBadShape;
    const int64_t n = c.dim(0, 1);
    const auto w = widened(c, 2, n), b = widened(c, 3, n);
    for_rows(c.dim(0, 0), n, [&](int64_t r) {
      float *total = c.at<float>(5) + r * n;
      isa().add(n, c.at<float>(0) + r * n, c.at<float>(1) + r * n, total);
      layer_norm(n, total, w.get(), b.get(), *c.at<float>(4), c.at<float>(6) + r * n);
    });
    return kOk;
  });
}

// [..., a + b] -> [..., a], [..., b]
OPERATOR(split) {
  return guarded([&] {
    const Call c(count, data, ndims, shapes, dtypes);
    if (count != 3 || ndims[0] < 1) return kBadShape;
    const int last = ndims[0] - 1;
    int64_t rows = 1;
    for (int axis = 0; axis < last; ++axis) rows *= c.dim(0, axis);
    for (int i = 0; i < 3; ++i)
      if (!c.is(i, "float32") || ndims[i] != ndims[0] || !std::equal(shapes[0], shapes[0] + last, shapes[i]))
        return kBadShape;
    const int64_t n = c.dim(0, last), a = c.dim(1, last), b = c.dim(2, last);
    if (a < 1 || b < 1 || a + b != n) return kBadShape;
    for_rows(rows, n, [&](int64_t r) {
      const float *x = c.at<float>(0) + r * n;
      std::memcpy(c.at<float>(1) + r * a, x, a * sizeof(float));
      std::memcpy(c.at<float>(2) + r * b, x + a, b * sizeof(float));
    });
    return kOk;
  });
}

// x [R, heads, D], cos, sin [R, D / 2] -> x rotated in half-split pairs
OPERATOR(rotate) {
  return guarded([&] {
    const Call c(count, data, ndims, shapes, dtypes);
    if (count != 4 || !c.has(0, "float32", {kAny, kAny, kAny})) return kBadShape;
    const int64_t rows = c.dim(0, 0), heads = c.dim(0, 1), dim = c.dim(0, 2), half = dim / 2;
    if (dim % 2 || !c.has(1, "float32", {rows, half}) || !c.has(2, "float32", {rows, half}) ||
        !c.has(3, "float32", {rows, heads, dim}))
      return kBadShape;
    for_rows(rows, heads * dim, [&](int64_t r) {
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t at = (r * heads + h) * dim;
        isa().rotate(half, c.at<float>(0) + at, c.at<float>(1) + r * half, c.at<float>(2) + r * half,
                     c.at<float>(3) + at);
      }
    });
    return kOk;
  });
}

// [R, 2 I], gate's columns first -> [R, I]
OPERATOR(swiglu) {
  return guarded([&] {
    const Call c(count, data, ndims, shapes, dtypes);
    if (count != 2 || !c.has(0, "float32", {kAny, kAny}) || c.dim(0, 1) % 2 ||
        !c.has(1, "float32", {c.dim(0, 0), c.dim(0, 1) / 2}))
      return kBadShape;
    const int64_t n = c.dim(1, 1);
    for_rows(c.dim(0, 0), n, [&](int64_t r) {
      const float *gate = c.at<float>(0) + r * 2 * n;
      isa().swiglu(n, gate, gate + n, c.at<float>(1) + r * n);
    });
    return kOk;
  });
}

// x [R, H], weight [E, H], bias [E], options [2] (whether shares are normalised, the factor) -> indices, weights [R, k]
OPERATOR(router) {
  return guarded([&] {
    const Call c(count, data, ndims, shapes, dtypes);
    if (count != 6 || !c.has(0, "float32", {kAny, kAny}) || !c.has(1, "float32", {kAny, c.dim(0, 1)}) ||
        !c.has(2, "float32", {c.dim(1, 0)}) || !c.has(3, "float32", {2}) || !c.has(4, "int32", {c.dim(0, 0), kAny}) ||
        !c.has(5, "float32", {c.dim(0, 0), c.dim(4, 1)}) || c.dim(4, 1) > c.dim(1, 0))
      return kBadShape;
    const float *options = c.at<float>(3);
    route_tokens(c.dim(0, 0), c.dim(0, 1), c.dim(1, 0), c.dim(4, 1), c.at<float>(0), c.at<float>(1), c.at<float>(2),
                 options[0] != 0.f, options[1], c.at<int32_t>(4), c.at<float>(5));
    return kOk;
  });
}

// x [R, H], gate_up [E, H, 2 I], down [E, I, H], indices, weights [R, k] -> [R, H]
OPERATOR(experts) {
  return guarded([&] {
    const Call c(count, data, ndims, shapes, dtypes);
    if (count != 6 || !c.has(0, "float32", {kAny, kAny}) || !c.has_weight(2, {kAny, kAny, c.dim(0, 1)})) return kBadShape;
    const int64_t t = c.dim(0, 0), h = c.dim(0, 1), e = c.dim(2, 0), i = c.dim(2, 1);
    if (!c.has_weight(1, {e, h, 2 * i}) || c.is_bf16(1) != c.is_bf16(2) || !c.has(3, "int32", {t, kAny}) ||
        !c.has(4, "float32", {t, c.dim(3, 1)}) || !c.has(5, "float32", {t, h}))
      return kBadShape;
    const auto run = [&](auto weight) {
      using W = decltype(weight);
      return kimi::experts(t, h, i, e, c.dim(3, 1), c.at<float>(0), c.at<W>(1), c.at<W>(2), c.at<int32_t>(3),
                           c.at<float>(4), c.at<float>(5));
    };
    return (c.is_bf16(1) ? run(bf16{}) : run(0.f)) ? kOk : kBadIndex;
  });
}

// q_nope [T, heads, nope], q_rope [T, heads, rope], cache [S, lora + rope], start [1], k_b [heads, nope, lora],
// v_b [heads, value, lora] -> [T, heads * value]
OPERATOR(latent_attention) {
  return guarded([&] {
    const Call c(count, data, ndims, shapes, dtypes);
    if (count != 7 || !c.has(0, "float32", {kAny, kAny, kAny}) || !c.has_weight(4, {c.dim(0, 1), c.dim(0, 2), kAny}))
      return kBadShape;
    const int64_t t = c.dim(0, 0);
    LatentSizes s = {c.dim(0, 1), c.dim(0, 2), 0, 0, c.dim(4, 2)};
    if (!c.has(1, "float32", {t, s.heads, kAny}) || !c.has_weight(5, {s.heads, kAny, s.lora}) ||
        c.is_bf16(4) != c.is_bf16(5))
      return kBadShape;
    s.rope = c.dim(1, 2);
    s.value = c.dim(5, 1);
    if (!c.has(2, "float32", {kAny, s.lora + s.rope}) || !c.has(3, "int32", {1}) ||
        !c.has(6, "float32", {t, s.heads * s.value}))
      return kBadShape;
    const int64_t start = *c.at<int32_t>(3);
    if (start < 0 || start + t > c.dim(2, 0)) return kBadIndex;
    const auto run = [&](auto weight) {
      using W = decltype(weight);
      kimi::latent_attention(s, t, start, c.at<float>(0), c.at<float>(1), c.at<float>(2), c.at<W>(4), c.at<W>(5),
                             c.at<float>(6));
    };
    if (c.is_bf16(4))
      run(bf16{});
    else
      run(0.f);
    return kOk;
  });
}

// q, k, v [N, 3 * heads * D], cos, sin [N, D / 2], valid [1] -> [N, heads * D], q and k rotated as by `rotate`: in fp32, and
// as products with bf16 weights are
OPERATOR(vision_attention) {
  return guarded([&] { return attend_image(Call(count, data, ndims, shapes, dtypes), false); });
}
OPERATOR(vision_attention_rounded) {
  return guarded([&] { return attend_image(Call(count, data, ndims, shapes, dtypes), true); });
}

// table [entries, D], taps [N, K], weights [N, K] -> each row the weighted sum of K entries, in their order
OPERATOR(interpolate) {
  return guarded([&] {
    const Call c(count, data, ndims, shapes, dtypes);
    if (count != 4 || !c.has_weight(0, {kAny, kAny}) || !c.has(1, "int32", {kAny, kAny})) return kBadShape;
    const int64_t entries = c.dim(0, 0), d = c.dim(0, 1), n = c.dim(1, 0), taps = c.dim(1, 1);
    if (!c.has(2, "float32", {n, taps}) || !c.has(3, "float32", {n, d})) return kBadShape;
    const int32_t *tap = c.at<int32_t>(1);
    for (int64_t i = 0; i < n * taps; ++i)
      if (tap[i] < 0 || tap[i] >= entries) return kBadIndex;
    for_rows(n, d * taps, [&](int64_t r) {
      float *to = c.at<float>(3) + r * d;
      std::fill_n(to, d, 0.f);
      for (int64_t i = r * taps; i < (r + 1) * taps; ++i) {
        const float weight = c.at<float>(2)[i];
        if (c.is_bf16(0))
          isa().multiply_add_bf16(d, weight, c.at<bf16>(0) + tap[i] * d, to);
        else
          isa().multiply_add(d, weight, c.at<float>(0) + tap[i] * d, to);
      }
    });
    return kOk;
  });
}

// What the library is and does, for its loader ------------------------------------------------------------------------

#define SETTING extern "C" __attribute__((visibility("default")))

// Grows with every change of an operator's arguments or of these functions; library.py expects the same one.
SETTING int kimi_version() { return 4; }
SETTING int kimi_threads() { return threads(); }
SETTING void kimi_set_threads(int count) { set_threads(count); }
SETTING const char *kimi_isa() { return isa().name; }
SETTING int kimi_set_isa(const char *name) { return set_isa(name); }
SETTING const char *kimi_onednn() { return onednn::description(); }
SETTING int kimi_can_round() { return can_round(); }
SETTING int kimi_rounds() { return rounds(); }
SETTING int kimi_exact() { return is_exact(); }
SETTING void kimi_set_exact(int exact) { set_exact(exact != 0); }
