// The inner loops, once per instruction set; `isa()` is the best that this machine has.
#pragma once
#include <cstdint>

#include "numbers.h"

namespace kimi {

struct Isa {
  const char *name;

  // y [t, n] (+)= x [t, k] w^T, w [n, k]. Products and sums in fp32.
  void (*dot_bf16)(int64_t t, int64_t n, int64_t k, const float *x, int64_t ldx, const bf16 *w, int64_t ldw, float *y,
                   int64_t ldy, bool accumulate);
  void (*dot_f32)(int64_t t, int64_t n, int64_t k, const float *x, int64_t ldx, const float *w, int64_t ldw, float *y,
                  int64_t ldy, bool accumulate);

  // y [t, n] += x [t, k] w, w [k, n].
  void (*axpy_bf16)(int64_t t, int64_t n, int64_t k, const float *x, int64_t ldx, const bf16 *w, int64_t ldw, float *y,
                    int64_t ldy);
  void (*axpy_f32)(int64_t t, int64_t n, int64_t k, const float *x, int64_t ldx, const float *w, int64_t ldw, float *y,
                   int64_t ldy);

  void (*widen)(int64_t n, const bf16 *x, float *y);
  void (*round)(int64_t n, const float *x, bf16 *y);  // to nearest, ties to even

  float (*sum)(int64_t n, const float *x);
  float (*sum_squares)(int64_t n, float mean, const float *x);  // of x - mean
  void (*add)(int64_t n, const float *x, const float *y, float *z);
  void (*multiply_add)(int64_t n, float a, const float *x, float *y);  // y += a x
  void (*multiply_add_bf16)(int64_t n, float a, const bf16 *x, float *y);
  void (*scale)(int64_t n, float a, float *x);
  void (*normalise)(int64_t n, const float *x, float mean, float inverse, const float *w, const float *b, float *y);
  void (*rotate)(int64_t half, const float *x, const float *cos, const float *sin, float *y);
  void (*swiglu)(int64_t n, const float *gate, const float *up, float *y);
  void (*gelu_tanh)(int64_t n, const float *x, float *y);
  void (*gelu_erf)(int64_t n, const float *x, float *y);
  void (*sigmoid)(int64_t n, const float *x, float *y);
  float (*max)(int64_t n, const float *x);                         // NaN if any is
  float (*exp_sum)(int64_t n, float shift, const float *x, float *y);  // y = exp(x - shift), its sum

  // Products of bf16 with sums in fp32, by instructions for it; null where there are none. `pack` brings w [k, n] into
  // the order that `packed` reads: blocks of 32 columns, within them pairs of rows, with a gap of 32 numbers after each
  // block so that not all fall into the same lines of a cache. k and n are multiples of 32, m of `packed_rows`.
  int64_t packed_rows;
  void (*pack)(int64_t n, int64_t k, const bf16 *w, int64_t ldw, bf16 *packed);
  void (*packed)(int64_t m, int64_t n, int64_t k, const bf16 *x, int64_t ldx, const bf16 *w, float *y, int64_t ldy,
                 bool accumulate);
  // The same with w [k, n] as it lies, for few rows of x; null where `packed` is faster for any number of rows.
  void (*in_place)(int64_t m, int64_t n, int64_t k, const bf16 *x, int64_t ldx, const bf16 *w, int64_t ldw, float *y,
                   int64_t ldy);
};

constexpr int64_t kPackedStep = 32;

const Isa &isa();

// Which of "plain", "avx2", "avx512", "avx512_bf16", "amx" to use from now on; false: unknown, or not on this machine.
bool set_isa(const char *name);

inline void dot(int64_t t, int64_t n, int64_t k, const float *x, int64_t ldx, const bf16 *w, int64_t ldw, float *y,
                int64_t ldy, bool accumulate = false) {
  isa().dot_bf16(t, n, k, x, ldx, w, ldw, y, ldy, accumulate);
}
inline void dot(int64_t t, int64_t n, int64_t k, const float *x, int64_t ldx, const float *w, int64_t ldw, float *y,
                int64_t ldy, bool accumulate = false) {
  isa().dot_f32(t, n, k, x, ldx, w, ldw, y, ldy, accumulate);
}
inline void axpy(int64_t t, int64_t n, int64_t k, const float *x, int64_t ldx, const bf16 *w, int64_t ldw, float *y,
                 int64_t ldy) {
  isa().axpy_bf16(t, n, k, x, ldx, w, ldw, y, ldy);
}
inline void axpy(int64_t t, int64_t n, int64_t k, const float *x, int64_t ldx, const float *w, int64_t ldw, float *y,
                 int64_t ldy) {
  isa().axpy_f32(t, n, k, x, ldx, w, ldw, y, ldy);
}

// n numbers in the type that a product takes.
inline void put(int64_t n, const float *x, float *y) { std::memcpy(y, x, n * sizeof(float)); }
inline void put(int64_t n, const float *x, bf16 *y) { isa().round(n, x, y); }

}  // namespace kimi
