// Numbers as they are stored: bfloat16 is the upper half of a float.
#pragma once
#include <cstdint>
#include <cstring>

namespace kimi {

struct bf16 {
  uint16_t bits;
};

inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}
inline float to_float(float x) { return x; }

}  // namespace kimi
