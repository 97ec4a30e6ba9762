#include "products.h"

#include <algorithm>
#include <atomic>

#include "memory.h"
#include "onednn.h"
#include "pool.h"

namespace kimi {
namespace {

std::atomic<bool> exact{false};

// Rows of weights that one thread takes at a time: long runs of memory, but short enough that the last one is not waited
// for.
int64_t rows_of_unit(int64_t n, int64_t k, size_t itemsize) {
  const int64_t fair = std::max<int64_t>(1, n / (8 * threads()));
  const int64_t bytes = std::max<int64_t>(4, (1 << 20) / int64_t(k * itemsize));
  return rounded_up(std::min(fair, bytes), 4);
}

bool fits_onednn(bf16) { return rounds(); }
bool fits_onednn(float) { return onednn::available(); }

// oneDNN on slices of the columns of y, one thread each, and `finish` on what it made.
template <class W, class F>
bool linear_onednn(int64_t t, int64_t n, int64_t k, const W *x, const W *w, float *y, F finish) {
  const int64_t slice = rounded_up((n + threads() - 1) / threads(), 64);
  std::atomic<bool> done{true};
  parallel((n + slice - 1) / slice, [&](int64_t unit) {
    const int64_t first = unit * slice, count = std::min(slice, n - first);
    if (onednn::matmul(t, count, k, x, k, w + first * k, k, true, y + first, n, false))
      finish(t, y, first, count);
    else
      done = false;
  });
  return done;
}

template <class F>
bool linear_many(int64_t t, int64_t n, int64_t k, const float *x, const bf16 *w, float *y, F finish) {
  // Some rows at a time, equally many: of a large picture the rounded copy would be the largest array there is.
  constexpr int64_t kRows = 1024;
  const int64_t parts = (t + kRows - 1) / kRows, step = (t + parts - 1) / parts;
  auto rounded = scratch<bf16>(step * k);
  for (int64_t first = 0; first < t; first += step) {
    const int64_t rows = std::min(step, t - first);
    round_rows(rows, k, x + first * k, rounded.get());
    if (!linear_onednn(rows, n, k, rounded.get(), w, y + first * n, finish)) return false;
  }
  return true;
}
template <class F>
bool linear_many(int64_t t, int64_t n, int64_t k, const float *x, const float *w, float *y, F finish) {
  return linear_onednn(t, n, k, x, w, y, finish);
}

// `product` without oneDNN.
template <class W>
void own_product(int64_t m, int64_t n, int64_t k, const float *a, int64_t lda, const W *b, int64_t ldb, bool transposed,
                 float *c, int64_t ldc, bool accumulate) {
  if (transposed) return dot(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
  if (!accumulate)
    for (int64_t i = 0; i < m; ++i) std::fill_n(c + i * ldc, n, 0.f);
  add_rows(m, n, k, a, lda, b, ldb, c, ldc);
}

}  // namespace

bool can_round() { return onednn::has_bf16() && isa().packed; }
bool rounds() { return can_round() && !exact; }
bool is_exact() { return exact; }
void set_exact(bool value) { exact = value; }

void round_rows(int64_t t, int64_t k, const float *x, bf16 *y) {
  const int64_t rows = std::max<int64_t>(1, (32 << 10) / k);
  parallel((t + rows - 1) / rows, [&](int64_t unit) {
    const int64_t first = unit * rows, count = std::min(rows, t - first);
    isa().round(count * k, x + first * k, y + first * k);
  });
}

template <class W>
void linear(int64_t t, int64_t n, int64_t k, const float *x, const W *w, const W *bias, Activation f, float *y) {
  auto wide = scratch<float>(bias ? n : 0);
  if (bias)
    for (int64_t i = 0; i < n; ++i) wide[i] = to_float(bias[i]);
  const auto finish = [&](int64_t rows, float *to, int64_t first, int64_t count) {
    for (int64_t r = 0; r < rows; ++r) {
      float *row = to + r * n + first;
      if (bias) isa().add(count, row, wide.get() + first, row);
      if (f) f(count, row, row);
    }
  };
  if (t > kFewRows && fits_onednn(W{}) && linear_many(t, n, k, x, w, y, finish)) return;
  const int64_t rows = rows_of_unit(n, k, sizeof(W));
  parallel((n + rows - 1) / rows, [&](int64_t unit) {
    const int64_t first = unit * rows, count = std::min(rows, n - first);
    dot(t, count, k, x, k, w + first * k, k, y + first, n);
    finish(t, y, first, count);
  });
}
template void linear(int64_t, int64_t, int64_t, const float *, const bf16 *, const bf16 *, Activation, float *);
template void linear(int64_t, int64_t, int64_t, const float *, const float *, const float *, Activation, float *);

template <>
void product(int64_t m, int64_t n, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, bool transposed,
             float *c, int64_t ldc, bool accumulate) {
  if (m > 1 && onednn::matmul(m, n, k, a, lda, b, ldb, transposed, c, ldc, accumulate)) return;
  own_product(m, n, k, a, lda, b, ldb, transposed, c, ldc, accumulate);
}

template <>
void product(int64_t m, int64_t n, int64_t k, const bf16 *a, int64_t lda, const bf16 *b, int64_t ldb, bool transposed,
             float *c, int64_t ldc, bool accumulate) {
  if (onednn::matmul(m, n, k, a, lda, b, ldb, transposed, c, ldc, accumulate)) return;
  auto wide = scratch<float>(m * k);
  for (int64_t i = 0; i < m; ++i) isa().widen(k, a + i * lda, wide.get() + i * k);
  own_product(m, n, k, wide.get(), k, b, ldb, transposed, c, ldc, accumulate);
}

template <class W>
void add_rows(int64_t m, int64_t n, int64_t k, const float *x, int64_t ldx, const W *w, int64_t ldw, float *y,
              int64_t ldy) {
  // All rows of x take some rows of w while these are in the second cache.
  const int64_t step = m <= 4 ? k : std::max<int64_t>(8, (256 << 10) / int64_t(n * sizeof(W)) / 8 * 8);
  for (int64_t i = 0; i < k; i += step) axpy(m, n, std::min(step, k - i), x + i, ldx, w + i * ldw, ldw, y, ldy);
}
template void add_rows(int64_t, int64_t, int64_t, const float *, int64_t, const bf16 *, int64_t, float *, int64_t);
template void add_rows(int64_t, int64_t, int64_t, const float *, int64_t, const float *, int64_t, float *, int64_t);

bool packs(int64_t n, int64_t k) { return rounds() && n % kPackedStep == 0 && k % kPackedStep == 0; }

void packed_product(int64_t m, int64_t n, int64_t k, const bf16 *x, int64_t ldx, const bf16 *w, int64_t ldw, float *y,
                    int64_t ldy) {
  constexpr int64_t kInPlace = 16;
  if (isa().in_place && m <= kInPlace) return isa().in_place(m, n, k, x, ldx, w, ldw, y, ldy);
  // What is packed stays in the second cache. Few rows: whole rows of w at a time, which is how memory reads fastest, and y
  // is small. Many: some columns of w over its whole height, so that y is written once.
  constexpr int64_t kPacked = 360 << 10;  // numbers
  const bool by_rows = m < 96;
  const int64_t columns = by_rows ? n : std::clamp(kPacked / k / kPackedStep * kPackedStep, kPackedStep, n);
  const int64_t rows = by_rows ? std::clamp(kPacked / n / kPackedStep * kPackedStep, kPackedStep, k) : k;
  auto packed = scratch<bf16>((rows + 1) * columns);
  for (int64_t j = 0; j < n; j += columns)
    for (int64_t i = 0; i < k; i += rows) {
      const int64_t wide = std::min(columns, n - j), high = std::min(rows, k - i);
      isa().pack(wide, high, w + i * ldw + j, ldw, packed.get());
      isa().packed(m, wide, high, x + i, ldx, packed.get(), y + j, ldy, i > 0);
    }
}

}  // namespace kimi
