// Products of bf16 numbers with instructions for it, over weights that are packed right before they are used.
//
// The experts' weights are [k, n]. oneDNN brings such a matrix into its own order at 5 GB/s a thread, once for every
// call; packing some of its rows at a time keeps up with the memory, and what is packed stays in the second cache. For the
// few rows of x that most experts have in a short prompt, even that costs more than putting two rows of w together in
// registers, each time they are used.
#include "isa_sets.h"

#if defined(__x86_64__)
#define TARGET "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"
#include "target_begin.h"
namespace kimi::bf16_512 {

static void pack(int64_t n, int64_t k, const bf16 *w, int64_t ldw, bf16 *packed) {
  constexpr int kRowsAhead = 4;
  for (int64_t i = 0; i < k; i += 2) {
    const bf16 *even = w + i * ldw, *odd = even + ldw;
    for (int64_t j = 0; j < n; j += kPackedStep) {
      _mm_prefetch(reinterpret_cast<const char *>(even + kRowsAhead * ldw + j), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char *>(odd + kRowsAhead * ldw + j), _MM_HINT_T0);
      bf16 *to = packed + j * (k + 1) + i * kPackedStep;
      for (int part = 0; part < kPackedStep; part += 16) {
        const __m512i a =
            _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(even + j + part)));
        const __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(odd + j + part)));
        _mm512_storeu_si512(to + 2 * part, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
      }
    }
  }
}

// 8 rows by 32 columns: 16 sums. `pairs(i)` gives rows i and i + 1 of w as pairs, for columns 0 to 15 and 16 to 31.
template <class Pairs>
static inline __attribute__((always_inline)) void tile(int64_t k, const bf16 *x, int64_t ldx, float *y, int64_t ldy,
                                                       bool accumulate, Pairs pairs) {
  __m512 sums[8][2];
  for (int t = 0; t < 8; ++t)
    for (int h = 0; h < 2; ++h) sums[t][h] = accumulate ? _mm512_loadu_ps(y + t * ldy + 16 * h) : _mm512_setzero_ps();
  for (int64_t i = 0; i < k; i += 2) {
    __m512bh w[2];
    pairs(i, w);
    for (int t = 0; t < 8; ++t) {
      int pair;
      __builtin_memcpy(&pair, x + t * ldx + i, sizeof pair);
      const __m512bh numbers = (__m512bh)_mm512_set1_epi32(pair);
      for (int h = 0; h < 2; ++h) sums[t][h] = _mm512_dpbf16_ps(sums[t][h], w[h], numbers);
    }
  }
  for (int t = 0; t < 8; ++t)
    for (int h = 0; h < 2; ++h) _mm512_storeu_ps(y + t * ldy + 16 * h, sums[t][h]);
}

struct PackedPairs {
  const bf16 *w;
  inline __attribute__((always_inline)) void operator()(int64_t i, __m512bh *pairs) const {
    for (int h = 0; h < 2; ++h) pairs[h] = (__m512bh)_mm512_loadu_si512(w + i * kPackedStep + 32 * h);
  }
};

static void packed(int64_t m, int64_t n, int64_t k, const bf16 *x, int64_t ldx, const bf16 *w, float *y, int64_t ldy,
                   bool accumulate) {
  for (int64_t j = 0; j < n; j += kPackedStep)
    for (int64_t r = 0; r < m; r += 8)
      tile(k, x + r * ldx, ldx, y + r * ldy + j, ldy, accumulate, PackedPairs{w + j * (k + 1)});
}

struct RowsInPlace {
  const bf16 *w;
  int64_t ldw;
  __m512i low, high;
  inline __attribute__((always_inline)) void operator()(int64_t i, __m512bh *pairs) const {
    const __m512i even = _mm512_loadu_si512(w + i * ldw), odd = _mm512_loadu_si512(w + (i + 1) * ldw);
    pairs[0] = (__m512bh)_mm512_permutex2var_epi16(even, low, odd);
    pairs[1] = (__m512bh)_mm512_permutex2var_epi16(even, high, odd);
  }
};

// Some rows of w at a time, each in a run of columns for which the sums stay in the first cache.
static void in_place(int64_t m, int64_t n, int64_t k, const bf16 *x, int64_t ldx, const bf16 *w, int64_t ldw, float *y,
                     int64_t ldy) {
  constexpr int64_t kRows = 16, kColumns = 22 * kPackedStep;
  uint16_t order[2][32];
  for (int i = 0; i < 32; ++i)
    for (int h = 0; h < 2; ++h) order[h][i] = uint16_t(16 * h + i / 2 + 32 * (i % 2));
  const __m512i low = _mm512_loadu_si512(order[0]), high = _mm512_loadu_si512(order[1]);
  for (int64_t c = 0; c < n; c += kColumns) {
    const int64_t last = c + kColumns < n ? c + kColumns : n;
    for (int64_t i = 0; i < k; i += kRows)
      for (int64_t j = c; j < last; j += kPackedStep) {
        const bf16 *from = w + i * ldw + j;
        for (int64_t r = kRows; r < 2 * kRows; ++r)
          _mm_prefetch(reinterpret_cast<const char *>(from + r * ldw), _MM_HINT_T0);
        for (int64_t r = 0; r < m; r += 8)
          tile(kRows, x + r * ldx + i, ldx, y + r * ldy + j, ldy, i > 0, RowsInPlace{from, ldw, low, high});
      }
  }
}

}  // namespace kimi::bf16_512
namespace kimi {
void add_avx512_bf16(Isa &isa) {
  isa.name = "avx512_bf16";
  isa.packed_rows = 8;
  isa.pack = bf16_512::pack;
  isa.packed = bf16_512::packed;
  isa.in_place = bf16_512::in_place;
}
}  // namespace kimi
#include "target_end.h"

#define TARGET "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-bf16"
#include "target_begin.h"
namespace kimi::amx {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

// 32 rows by 32 columns at a time, in four tiles of sums: each tile that is read is used twice.
static void packed(int64_t m, int64_t n, int64_t k, const bf16 *x, int64_t ldx, const bf16 *w, float *y, int64_t ldy,
                   bool accumulate) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.bytes_per_row[tile] = 64;
    config.rows[tile] = 16;
  }
  _tile_loadconfig(&config);
  const int64_t x_step = 2 * ldx, y_step = 4 * ldy, w_step = 4 * kPackedStep;
  for (int64_t j = 0; j < n; j += kPackedStep) {
    const bf16 *block = w + j * (k + 1);
    for (int64_t r = 0; r < m; r += 32) {
      float *to = y + r * ldy + j;
      if (accumulate) {
        _tile_loadd(0, to, y_step);
        _tile_loadd(1, to + 16, y_step);
        _tile_loadd(2, to + 16 * ldy, y_step);
        _tile_loadd(3, to + 16 * ldy + 16, y_step);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int64_t i = 0; i < k; i += 32) {
        _tile_loadd(4, x + r * ldx + i, x_step);
        _tile_loadd(5, x + (r + 16) * ldx + i, x_step);
        _tile_loadd(6, block + i * kPackedStep, w_step);
        _tile_loadd(7, block + i * kPackedStep + 32, w_step);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, to, y_step);
      _tile_stored(1, to + 16, y_step);
      _tile_stored(2, to + 16 * ldy, y_step);
      _tile_stored(3, to + 16 * ldy + 16, y_step);
    }
  }
  _tile_release();
}

}  // namespace kimi::amx
namespace kimi {
void add_amx(Isa &isa) {
  isa.name = "amx";
  isa.packed_rows = 32;
  isa.packed = amx::packed;
  isa.in_place = nullptr;
}
}  // namespace kimi
#include "target_end.h"
#endif
