// Products of matrices over the whole pool, and on one thread inside other operators.
#pragma once
#include <cstdint>

#include "isa.h"
#include "numbers.h"

namespace kimi {

// Rows up to which a product is read row by row from memory, in fp32, because the weights' way from there is what takes
// the time.
constexpr int64_t kFewRows = 8;

// Whether products of more rows round their fp32 input to bf16 where the weights are bf16 too: if the machine has
// instructions for it and `set_exact(true)` was not called.
bool rounds();
bool can_round();
bool is_exact();
void set_exact(bool exact);

// Rows of x [t, k] rounded to bf16, over the pool.
void round_rows(int64_t t, int64_t k, const float *x, bf16 *y);

// A function of single numbers; y may be x.
using Activation = void (*)(int64_t n, const float *x, float *y);

// y [t, n] = f(x [t, k] w^T + bias), w [n, k]; bias and f may be null.
template <class W>
void linear(int64_t t, int64_t n, int64_t k, const float *x, const W *w, const W *bias, Activation f, float *y);

// On the calling thread: c [m, n] (+)= a b, b [k, n], or [n, k] if `transposed`.
template <class E>
void product(int64_t m, int64_t n, int64_t k, const E *a, int64_t lda, const E *b, int64_t ldb, bool transposed, float *c,
             int64_t ldc, bool accumulate);

// On the calling thread: y [m, n] += x [m, k] w, w [k, n], in fp32.
template <class W>
void add_rows(int64_t m, int64_t n, int64_t k, const float *x, int64_t ldx, const W *w, int64_t ldw, float *y, int64_t ldy);

// Whether `packed_product` can be used for a matrix of these sizes.
bool packs(int64_t n, int64_t k);

// On the calling thread: y [m, n] = x [m, k] w, w [k, n]; m is a multiple of isa().packed_rows.
void packed_product(int64_t m, int64_t n, int64_t k, const bf16 *x, int64_t ldx, const bf16 *w, int64_t ldw, float *y,
                    int64_t ldy);

inline int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

}  // namespace kimi
