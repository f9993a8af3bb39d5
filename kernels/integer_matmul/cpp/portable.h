// For any processor: plain loops.
#pragma once

#include "product.h"

namespace llama_jax::portable {

inline int32_t block_int8(const uint8_t* codes, const Input& x, int64_t block) {
  int32_t sum = 0;
  for (int64_t i = block * kBlock; i < (block + 1) * kBlock; ++i) sum += int32_t(int8_t(codes[i])) * x.codes[i];
  return sum;
}

inline int32_t block_int4(const uint8_t* codes, const Input& x, int64_t block) {
  int32_t sum = 0;
  for (int64_t i = block * kBlock / 2; i < (block + 1) * kBlock / 2; ++i) {
    const uint8_t both = codes[i] ^ 0x88;
    sum += int32_t(both & 15) * x.codes[i] + int32_t(both >> 4) * x.odd[i];
  }
  return sum;
}

inline void product(const Weight& weight, const Input* x, int count, int64_t first, int64_t last, float* factors,
                    int64_t, float* const* out) {
  const auto block = weight.bits == 4 ? block_int4 : block_int8;
  for (int64_t row = first; row < last; ++row) {
    for (int n = 0; n < count; ++n) {
      float sum = block_factors(weight, row, x[n], factors);
      for (int64_t b = 0; b < weight.blocks(); ++b) sum += factors[b] * float(block(weight.row(row), x[n], b));
      out[n][row] = sum;
    }
  }
}

}  // namespace llama_jax::portable
