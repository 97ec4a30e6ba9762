// The loops behind `Isa`, in GCC's and clang's vector types. A file that includes this sets WIDTH (floats of a vector) and
// the instruction set, and a namespace around it. Nothing of the standard library may be called from here: what a
// template of it became under one instruction set, the linker could take for all.

typedef float vf __attribute__((vector_size(4 * WIDTH)));
typedef float vf_any __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * WIDTH)));
typedef int32_t vi __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t vh __attribute__((vector_size(2 * WIDTH)));
typedef uint16_t vh_any __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));

#define INLINE_MEMBER inline __attribute__((always_inline))
#define INLINE static INLINE_MEMBER

INLINE vf load(const float *p) { return *reinterpret_cast<const vf_any *>(p); }
INLINE vf load(const bf16 *p) {
#if WIDTH == 16 && defined(__GNUC__) && !defined(__clang__)  // GCC 12 makes five instructions of the conversion
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))), 16);
#else
  const vh h = *reinterpret_cast<const vh_any *>(p);
  return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}
INLINE void store(float *p, vf x) { *reinterpret_cast<vf_any *>(p) = x; }
INLINE vf broadcast(float x) { return x - (vf){}; }
INLINE float scalar(float x) { return x; }
INLINE float scalar(bf16 x) {
  union {
    uint32_t u;
    float f;
  } y = {uint32_t(x.bits) << 16};
  return y.f;
}
INLINE float sum(vf x) {
  float y[WIDTH];
  store(y, x);
  for (int width = WIDTH / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) y[i] += y[i + width];
  return y[0];
}
INLINE void ahead(const char *p) { __builtin_prefetch(p); }

// Weights are read as fast as memory gives them only in one run from front to back, a line at a time, and with what comes
// next asked for early: hardware looks no further than the end of a page.
constexpr int kLine = 64;
constexpr int kNumbersOfStep = 32;  // a line of bf16
constexpr int64_t kAhead = 8 << 10;

// Dot products -------------------------------------------------------------------------------------------------------

// TR rows of x with NR rows of w at once, while the next NR rows are asked for. One row of x takes one row of w: its sum is
// split, so that no addition has to wait.
template <class W, int TR, int NR>
INLINE void dot_tile(int64_t k, const float *x, int64_t ldx, const W *w, int64_t ldw, float *y, int64_t ldy,
                     bool accumulate) {
  constexpr int U = TR * NR == 1 ? kNumbersOfStep / WIDTH : TR * NR <= 4 ? 2 : 1;
  const int64_t next = NR == 1 ? kAhead / int64_t(sizeof(W)) : NR * ldw;
  vf sums[TR][NR][U] = {};
  int64_t i = 0;
  for (; i + U * WIDTH <= k; i += U * WIDTH) {
    for (int u = 0; u < U; ++u) {
      vf weights[NR];
      for (int n = 0; n < NR; ++n) weights[n] = load(w + n * ldw + i + u * WIDTH);
      for (int t = 0; t < TR; ++t) {
        const vf numbers = load(x + t * ldx + i + u * WIDTH);
        for (int n = 0; n < NR; ++n) sums[t][n][u] += numbers * weights[n];
      }
    }
    for (int n = 0; n < NR; ++n)
      for (int64_t line = 0; line < int64_t(U * WIDTH * sizeof(W)); line += kLine)
        ahead(reinterpret_cast<const char *>(w + n * ldw + i + next) + line);
  }
  for (int t = 0; t < TR; ++t)
    for (int n = 0; n < NR; ++n) {
      vf total = sums[t][n][0];
      for (int u = 1; u < U; ++u) total += sums[t][n][u];
      float rest = 0;
      for (int64_t j = i; j < k; ++j) rest += x[t * ldx + j] * scalar(w[n * ldw + j]);
      float *to = y + t * ldy + n;
      *to = (accumulate ? *to : 0.f) + (sum(total) + rest);
    }
}

template <class W, int TR>
INLINE void dot_rows(int64_t n, int64_t k, const float *x, int64_t ldx, const W *w, int64_t ldw, float *y, int64_t ldy,
                     bool accumulate) {
  constexpr int NR = TR == 1 ? 1 : WIDTH == 16 ? 4 : 2;
  int64_t i = 0;
  for (; i + NR <= n; i += NR) dot_tile<W, TR, NR>(k, x, ldx, w + i * ldw, ldw, y + i, ldy, accumulate);
  for (; i < n; ++i) dot_tile<W, TR, 1>(k, x, ldx, w + i * ldw, ldw, y + i, ldy, accumulate);
}

template <class W>
INLINE void dot_all(int64_t t, int64_t n, int64_t k, const float *x, int64_t ldx, const W *w, int64_t ldw, float *y,
                    int64_t ldy, bool accumulate) {
  for (; t >= 4; t -= 4, x += 4 * ldx, y += 4 * ldy) dot_rows<W, 4>(n, k, x, ldx, w, ldw, y, ldy, accumulate);
  if (t == 3) dot_rows<W, 3>(n, k, x, ldx, w, ldw, y, ldy, accumulate);
  if (t == 2) dot_rows<W, 2>(n, k, x, ldx, w, ldw, y, ldy, accumulate);
  if (t == 1) dot_rows<W, 1>(n, k, x, ldx, w, ldw, y, ldy, accumulate);
}
static void dot_bf16(int64_t t, int64_t n, int64_t k, const float *x, int64_t ldx, const bf16 *w, int64_t ldw, float *y,
                     int64_t ldy, bool accumulate) {
  dot_all(t, n, k, x, ldx, w, ldw, y, ldy, accumulate);
}
static void dot_f32(int64_t t, int64_t n, int64_t k, const float *x, int64_t ldx, const float *w, int64_t ldw, float *y,
                    int64_t ldy, bool accumulate) {
  dot_all(t, n, k, x, ldx, w, ldw, y, ldy, accumulate);
}

// Sums of rows -------------------------------------------------------------------------------------------------------

// KR rows of w at once into TR rows of y, which stay in the first cache: the more rows of y, the more it pays to read and
// write them less often.
template <class W, int TR, int KR>
INLINE void axpy_tile(int64_t n, const float *x, int64_t ldx, const W *w, int64_t ldw, float *y, int64_t ldy) {
  constexpr int U = kNumbersOfStep / WIDTH;
  const int64_t next = KR == 1 ? kAhead / int64_t(sizeof(W)) : KR * ldw;
  int64_t i = 0;
  for (; i + U * WIDTH <= n; i += U * WIDTH) {
    for (int u = 0; u < U; ++u) {
      const int64_t at = i + u * WIDTH;
      vf sums[TR];
      for (int t = 0; t < TR; ++t) sums[t] = load(y + t * ldy + at);
      for (int k = 0; k < KR; ++k) {
        const vf weights = load(w + k * ldw + at);
        for (int t = 0; t < TR; ++t) sums[t] += weights * x[t * ldx + k];
      }
      for (int t = 0; t < TR; ++t) store(y + t * ldy + at, sums[t]);
    }
    for (int k = 0; k < KR; ++k)
      for (int64_t line = 0; line < int64_t(kNumbersOfStep * sizeof(W)); line += kLine)
        ahead(reinterpret_cast<const char *>(w + k * ldw + i + next) + line);
  }
  for (; i < n; ++i)
    for (int t = 0; t < TR; ++t)
      for (int k = 0; k < KR; ++k) y[t * ldy + i] += scalar(w[k * ldw + i]) * x[t * ldx + k];
}

template <class W, int TR>
INLINE void axpy_rows(int64_t n, int64_t k, const float *x, int64_t ldx, const W *w, int64_t ldw, float *y, int64_t ldy) {
  constexpr int KR = TR == 1 ? 1 : TR == 2 ? 2 : 8;
  int64_t i = 0;
  for (; i + KR <= k; i += KR) axpy_tile<W, TR, KR>(n, x + i, ldx, w + i * ldw, ldw, y, ldy);
  for (; i < k; ++i) axpy_tile<W, TR, 1>(n, x + i, ldx, w + i * ldw, ldw, y, ldy);
}

template <class W>
INLINE void axpy_all(int64_t t, int64_t n, int64_t k, const float *x, int64_t ldx, const W *w, int64_t ldw, float *y,
                     int64_t ldy) {
  for (; t >= 4; t -= 4, x += 4 * ldx, y += 4 * ldy) axpy_rows<W, 4>(n, k, x, ldx, w, ldw, y, ldy);
  if (t == 3) axpy_rows<W, 3>(n, k, x, ldx, w, ldw, y, ldy);
  if (t == 2) axpy_rows<W, 2>(n, k, x, ldx, w, ldw, y, ldy);
  if (t == 1) axpy_rows<W, 1>(n, k, x, ldx, w, ldw, y, ldy);
}
static void axpy_bf16(int64_t t, int64_t n, int64_t k, const float *x, int64_t ldx, const bf16 *w, int64_t ldw, float *y,
                      int64_t ldy) {
  axpy_all(t, n, k, x, ldx, w, ldw, y, ldy);
}
static void axpy_f32(int64_t t, int64_t n, int64_t k, const float *x, int64_t ldx, const float *w, int64_t ldw, float *y,
                     int64_t ldy) {
  axpy_all(t, n, k, x, ldx, w, ldw, y, ldy);
}

// Functions of single numbers ----------------------------------------------------------------------------------------

// e^x to about one unit in the last place: x = n ln 2 + r, e^r by Cephes' polynomial (expf, S. Moshier). Overflows to
// infinity, underflows through denormals to 0, keeps NaN.
INLINE vf exp(vf x) {
  const vf low = broadcast(-104.f), high = broadcast(88.8f);
  const vf clamped = x < low ? low : x > high ? high : x;
  const vf magic = broadcast(12582912.f);  // 1.5 * 2^23: adding and taking it away rounds to an integer
  const vf n = (clamped * 1.44269504088896341f + magic) - magic;
  const vf r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  // 2^n as a product of two, because n goes from -150 to 128.
  const vi whole = __builtin_convertvector(n, vi), half = whole >> 1;
  const vf first = (vf)((half + 127) << 23), second = (vf)((whole - half + 127) << 23);
  const vf y = p * first * second;
  return x == x ? y : x;
}

// Calls f on n numbers, WIDTH at a time; the last ones from a padded copy.
template <class F>
INLINE void each(int64_t n, const float *x, float *y, F f) {
  int64_t i = 0;
  for (; i + WIDTH <= n; i += WIDTH) store(y + i, f(load(x + i)));
  if (i < n) {
    float part[WIDTH] = {};
    for (int64_t j = i; j < n; ++j) part[j - i] = x[j];
    store(part, f(load(part)));
    for (int64_t j = i; j < n; ++j) y[j] = part[j - i];
  }
}
INLINE vf silu(vf x) { return x / (1.f + exp(-x)); }

struct Sigmoid {
  INLINE_MEMBER vf operator()(vf x) const { return 1.f / (1.f + exp(-x)); }
};
static void sigmoid(int64_t n, const float *x, float *y) { each(n, x, y, Sigmoid()); }
static void swiglu(int64_t n, const float *gate, const float *up, float *y) {
  int64_t i = 0;
  for (; i + WIDTH <= n; i += WIDTH) store(y + i, silu(load(gate + i)) * load(up + i));
  for (; i < n; ++i) {
    float part[WIDTH] = {gate[i]};
    store(part, silu(load(part)));
    y[i] = part[0] * up[i];
  }
}
// 0.5 x (1 + tanh(z)) = x / (1 + e^(-2 z)), z = sqrt(2 / pi) (x + 0.044715 x^3)
struct GeluTanh {
  INLINE_MEMBER vf operator()(vf x) const {
    const vf z = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    return x / (1.f + exp(-2.f * z));
  }
};
static void gelu_tanh(int64_t n, const float *x, float *y) { each(n, x, y, GeluTanh()); }
// 0.5 x (1 + erf(x / sqrt 2)) = x (1 - q), or x q where x < 0: q = erfc(z) / 2 with z = |x| / sqrt 2, which is e^(-z^2) times
// a polynomial of t = 1 / (1 + z / 2). Its coefficients are fitted to keep the relative error of q below 5e-8 as far as
// e^(-z^2) is a number in fp32. Nothing cancels, so small results are accurate too; what is left is rounding.
struct GeluErf {
  INLINE_MEMBER vf operator()(vf x) const {
    const vf zero = {}, size = x < zero ? -x : x;
    const vf t = 1.f / (1.f + 0.353553391f * size);
    vf p = broadcast(-0.0296928249f);
    p = p * t + 0.143060029f;
    p = p * t - 0.245199218f;
    p = p * t + 0.140862197f;
    p = p * t - 0.0145712728f;
    p = p * t + 0.10187503f;
    p = p * t + 0.121417858f;
    p = p * t + 0.141206011f;
    p = p * t + 0.141042173f;
    const vf q = p * t * exp(-0.5f * x * x);
    return x * (x < zero ? q : 1.f - q);
  }
};
static void gelu_erf(int64_t n, const float *x, float *y) { each(n, x, y, GeluErf()); }
static float max(int64_t n, const float *x) {
  float largest = -__builtin_inff();
  int64_t i = 0;
  if (n >= WIDTH) {
    vf most = load(x), bad = (vf){};
    for (; i + WIDTH <= n; i += WIDTH) {
      const vf v = load(x + i);
      most = v > most ? v : most;
      bad += v - v;  // NaN for NaN and infinity
    }
    float part[WIDTH];
    store(part, most);
    for (int j = 0; j < WIDTH; ++j) largest = part[j] > largest ? part[j] : largest;
    const float doubt = sum(bad);
    if (!(doubt == 0.f))
      for (int64_t j = 0; j < i; ++j)
        if (x[j] != x[j]) return x[j];
  }
  for (; i < n; ++i) {
    if (x[i] != x[i]) return x[i];
    largest = x[i] > largest ? x[i] : largest;
  }
  return largest;
}
static float exp_sum(int64_t n, float shift, const float *x, float *y) {
  vf total = {};
  int64_t i = 0;
  for (; i + WIDTH <= n; i += WIDTH) {
    const vf e = exp(load(x + i) - shift);
    store(y + i, e);
    total += e;
  }
  float rest = 0;
  for (; i < n; ++i) {
    float part[WIDTH] = {x[i] - shift};
    store(part, exp(load(part)));
    y[i] = part[0];
    rest += part[0];
  }
  return sum(total) + rest;
}

// Rows ---------------------------------------------------------------------------------------------------------------

static void widen(int64_t n, const bf16 *x, float *y) {
  int64_t i = 0;
  for (; i + WIDTH <= n; i += WIDTH) store(y + i, load(x + i));
  for (; i < n; ++i) y[i] = scalar(x[i]);
}
static void round(int64_t n, const float *x, bf16 *y) {
  int64_t i = 0;
  for (; i + WIDTH <= n; i += WIDTH) {
    const vf v = load(x + i);
    const vu u = (vu)v;
    const vu nearest = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const vu quiet = (u >> 16) | 0x40;  // rounding could carry a NaN over into infinity
    *reinterpret_cast<vh_any *>(y + i) = __builtin_convertvector(v == v ? nearest : quiet, vh);
  }
  for (; i < n; ++i) {
    union {
      float f;
      uint32_t u;
    } v = {x[i]};
    y[i].bits = v.f == v.f ? uint16_t((v.u + 0x7fff + ((v.u >> 16) & 1)) >> 16) : uint16_t(v.u >> 16 | 0x40);
  }
}
static float sum_of(int64_t n, const float *x) {
  vf a = {}, b = {};
  int64_t i = 0;
  for (; i + 2 * WIDTH <= n; i += 2 * WIDTH) {
    a += load(x + i);
    b += load(x + i + WIDTH);
  }
  float rest = 0;
  for (; i < n; ++i) rest += x[i];
  return sum(a + b) + rest;
}
static float sum_squares(int64_t n, float mean, const float *x) {
  vf a = {}, b = {};
  int64_t i = 0;
  for (; i + 2 * WIDTH <= n; i += 2 * WIDTH) {
    const vf u = load(x + i) - mean, v = load(x + i + WIDTH) - mean;
    a += u * u;
    b += v * v;
  }
  float rest = 0;
  for (; i < n; ++i) rest += (x[i] - mean) * (x[i] - mean);
  return sum(a + b) + rest;
}
static void add(int64_t n, const float *x, const float *y, float *z) {
  int64_t i = 0;
  for (; i + WIDTH <= n; i += WIDTH) store(z + i, load(x + i) + load(y + i));
  for (; i < n; ++i) z[i] = x[i] + y[i];
}
template <class W>
INLINE void multiply_add_any(int64_t n, float a, const W *x, float *y) {
  int64_t i = 0;
  for (; i + WIDTH <= n; i += WIDTH) store(y + i, load(y + i) + a * load(x + i));
  for (; i < n; ++i) y[i] += a * scalar(x[i]);
}
static void multiply_add(int64_t n, float a, const float *x, float *y) { multiply_add_any(n, a, x, y); }
static void multiply_add_bf16(int64_t n, float a, const bf16 *x, float *y) { multiply_add_any(n, a, x, y); }
static void scale(int64_t n, float a, float *x) {
  int64_t i = 0;
  for (; i + WIDTH <= n; i += WIDTH) store(x + i, a * load(x + i));
  for (; i < n; ++i) x[i] *= a;
}
static void normalise(int64_t n, const float *x, float mean, float inverse, const float *w, const float *b, float *y) {
  int64_t i = 0;
  if (b)
    for (; i + WIDTH <= n; i += WIDTH) store(y + i, (load(x + i) - mean) * inverse * load(w + i) + load(b + i));
  else
    for (; i + WIDTH <= n; i += WIDTH) store(y + i, (load(x + i) - mean) * inverse * load(w + i));
  for (; i < n; ++i) y[i] = (x[i] - mean) * inverse * w[i] + (b ? b[i] : 0.f);
}
static void rotate(int64_t half, const float *x, const float *cos, const float *sin, float *y) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    y[i] = a * cos[i] - b * sin[i];
    y[half + i] = b * cos[i] + a * sin[i];
  }
}

static Isa table(const char *name) {
  Isa isa = {};
  isa.name = name;
  isa.dot_bf16 = dot_bf16;
  isa.dot_f32 = dot_f32;
  isa.axpy_bf16 = axpy_bf16;
  isa.axpy_f32 = axpy_f32;
  isa.widen = widen;
  isa.round = round;
  isa.sum = sum_of;
  isa.sum_squares = sum_squares;
  isa.add = add;
  isa.multiply_add = multiply_add;
  isa.multiply_add_bf16 = multiply_add_bf16;
  isa.scale = scale;
  isa.normalise = normalise;
  isa.rotate = rotate;
  isa.swiglu = swiglu;
  isa.gelu_tanh = gelu_tanh;
  isa.gelu_erf = gelu_erf;
  isa.sigmoid = sigmoid;
  isa.max = max;
  isa.exp_sum = exp_sum;
  return isa;
}
