#include "experts.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "memory.h"
#include "pool.h"
#include "products.h"

namespace kimi {
namespace {

// Tokens of one expert, or some of them: rows [first, first + count) of what is computed, and which of the t * k places of
// `indices` each of them is. Each expert's weights are read where they lie, for however many tokens chose it.
struct Group {
  int64_t expert, first, count;
};

constexpr int64_t kRowsOfGroup = 512;

struct Routing {
  std::vector<Group> groups;      // the largest first, so that no thread is left with one at the end
  std::vector<int64_t> places;    // of each row: token * k + number among the token's experts
  std::vector<int64_t> rows;      // of each place
};

bool route(int64_t places, int64_t e, const int32_t *indices, Routing &routing) {
  std::vector<int64_t> first(e + 1, 0);
  for (int64_t p = 0; p < places; ++p) {
    if (indices[p] < 0 || indices[p] >= e) return false;
    ++first[indices[p] + 1];
  }
  for (int64_t i = 0; i < e; ++i) first[i + 1] += first[i];
  routing.places.resize(places);
  routing.rows.resize(places);
  std::vector<int64_t> next(first.begin(), first.end() - 1);
  for (int64_t p = 0; p < places; ++p) {
    const int64_t row = next[indices[p]]++;
    routing.places[row] = p;
    routing.rows[p] = row;
  }
  for (int64_t i = 0; i < e; ++i)
    for (int64_t at = first[i]; at < first[i + 1]; at += kRowsOfGroup)
      routing.groups.push_back({i, at, std::min(kRowsOfGroup, first[i + 1] - at)});
  std::stable_sort(routing.groups.begin(), routing.groups.end(),
                   [](const Group &a, const Group &b) { return a.count > b.count; });
  return true;
}

// Parts of a matrix's columns, so that a few groups keep all threads busy.
int64_t parts(int64_t groups, int64_t columns) {
  constexpr int64_t kNarrowest = 256;
  int64_t parts = 1;
  while (groups * parts < 8 * threads() && groups * parts % threads() != 0 && columns % (2 * parts * kPackedStep) == 0 &&
         columns / (2 * parts) >= kNarrowest)
    parts *= 2;
  return parts;
}

// From one row of what is kept between two products to the next: rows of a power of two, one right after the other, would
// fall into the same few lines of a cache.
int64_t spaced(int64_t width) { return width + 32; }

// A group's rows of x.
template <class A>
void gather(const Routing &routing, const Group &g, int64_t k, int64_t h, const A *x, A *to, int64_t ld) {
  for (int64_t r = 0; r < g.count; ++r)
    std::memcpy(to + r * ld, x + routing.places[g.first + r] / k * h, h * sizeof(A));
}

// y [count, n] = x [count, k] w. Rows up to `padded` may be written in y, and exist in x.
template <class W>
void multiply(int64_t count, int64_t, int64_t n, int64_t k, const float *x, int64_t ldx, const W *w, int64_t ldw, float *y,
              int64_t ldy) {
  for (int64_t r = 0; r < count; ++r) std::fill_n(y + r * ldy, n, 0.f);
  add_rows(count, n, k, x, ldx, w, ldw, y, ldy);
}
void multiply(int64_t, int64_t padded, int64_t n, int64_t k, const bf16 *x, int64_t ldx, const bf16 *w, int64_t ldw,
              float *y, int64_t ldy) {
  packed_product(padded, n, k, x, ldx, w, ldw, y, ldy);
}

// A is what rows are multiplied in: float, or bf16 with packed weights.
template <class A, class W>
void compute(const Routing &routing, int64_t t, int64_t h, int64_t i, int64_t k, const A *x, const W *gate_up,
             const W *down, float *out) {
  const int64_t step = sizeof(A) == sizeof(bf16) ? isa().packed_rows : 1;
  const int64_t groups = int64_t(routing.groups.size());
  const int64_t ldx = spaced(h), ldh = spaced(i), ldo = spaced(h);
  auto hidden = scratch<A>(t * k * ldh);

  const int64_t up_parts = parts(groups, i), up_width = i / up_parts;
  parallel(groups * up_parts, [&](int64_t unit) {
    const Group &g = routing.groups[unit / up_parts];
    const int64_t padded = rounded_up(g.count, step), column = unit % up_parts * up_width;
    auto rows = scratch<A>(padded * ldx);
    gather(routing, g, k, h, x, rows.get(), ldx);
    std::fill_n(rows.get() + g.count * ldx, (padded - g.count) * ldx, A{});
    const int64_t ldb = spaced(2 * up_width);
    auto both = scratch<float>(padded * ldb);
    const W *w = gate_up + g.expert * h * 2 * i;
    if (up_parts == 1) {
      multiply(g.count, padded, 2 * i, h, rows.get(), ldx, w, 2 * i, both.get(), ldb);
    } else {
      multiply(g.count, padded, up_width, h, rows.get(), ldx, w + column, 2 * i, both.get(), ldb);
      multiply(g.count, padded, up_width, h, rows.get(), ldx, w + i + column, 2 * i, both.get() + up_width, ldb);
    }
    for (int64_t r = 0; r < g.count; ++r) {
      float *gate = both.get() + r * ldb;
      isa().swiglu(up_width, gate, gate + up_width, gate);
      put(up_width, gate, hidden.get() + (g.first + r) * ldh + column);
    }
  });

  const int64_t down_parts = parts(groups, h), down_width = h / down_parts;
  parallel(groups * down_parts, [&](int64_t unit) {
    const Group &g = routing.groups[unit / down_parts];
    const int64_t padded = rounded_up(g.count, step), column = unit % down_parts * down_width;
    const W *w = down + g.expert * i * h + column;
    const A *rows = hidden.get() + g.first * ldh;
    if (padded == g.count) {
      multiply(g.count, padded, down_width, i, rows, ldh, w, h, out + g.first * ldo + column, ldo);
      return;
    }
    auto copy = scratch<A>(padded * ldh);
    std::copy_n(rows, g.count * ldh, copy.get());
    std::fill_n(copy.get() + g.count * ldh, (padded - g.count) * ldh, A{});
    const int64_t ldr = spaced(down_width);
    auto result = scratch<float>(padded * ldr);
    multiply(g.count, padded, down_width, i, copy.get(), ldh, w, h, result.get(), ldr);
    for (int64_t r = 0; r < g.count; ++r)
      std::memcpy(out + (g.first + r) * ldo + column, result.get() + r * ldr, down_width * sizeof(float));
  });
}

bool compute_rounded(const Routing &routing, int64_t t, int64_t h, int64_t i, int64_t k, const float *x,
                     const bf16 *gate_up, const bf16 *down, float *out) {
  if (t <= kFewRows || !packs(2 * i, h) || !packs(h, i)) return false;
  auto rounded = scratch<bf16>(t * h);
  round_rows(t, h, x, rounded.get());
  compute(routing, t, h, i, k, rounded.get(), gate_up, down, out);
  return true;
}
bool compute_rounded(const Routing &, int64_t, int64_t, int64_t, int64_t, const float *, const float *, const float *,
                     float *) {
  return false;
}

}  // namespace

template <class W>
bool experts(int64_t t, int64_t h, int64_t i, int64_t e, int64_t k, const float *x, const W *gate_up, const W *down,
             const int32_t *indices, const float *weights, float *y) {
  Routing routing;
  if (!route(t * k, e, indices, routing)) return false;
  const int64_t ldo = spaced(h);
  auto out = scratch<float>(t * k * ldo);
  if (!compute_rounded(routing, t, h, i, k, x, gate_up, down, out.get()))
    compute(routing, t, h, i, k, x, gate_up, down, out.get());
  const int64_t tokens = t < 16 ? std::max<int64_t>(1, t) : 8;
  parallel((t + tokens - 1) / tokens, [&](int64_t unit) {
    for (int64_t r = unit * tokens; r < std::min(t, (unit + 1) * tokens); ++r) {
      float *to = y + r * h;
      std::fill_n(to, h, 0.f);
      for (int64_t s = 0; s < k; ++s)
        isa().multiply_add(h, weights[r * k + s], out.get() + routing.rows[r * k + s] * ldo, to);
    }
  });
  return true;
}
template bool experts(int64_t, int64_t, int64_t, int64_t, int64_t, const float *, const bf16 *, const bf16 *,
                      const int32_t *, const float *, float *);
template bool experts(int64_t, int64_t, int64_t, int64_t, int64_t, const float *, const float *, const float *,
                      const int32_t *, const float *, float *);

}  // namespace kimi
