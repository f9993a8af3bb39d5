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

inline void product(const Weight& weight, const Input* x, int count, int64_t first, int64_t last, float* const* out) {
  const auto block = weight.bits == 4 ? block_int4 : block_int8;
  float factors[kSpan];
  for (int64_t row = first; row < last; ++row) {
    for (int n = 0; n < count; ++n) {
      float sum = 0;
      for (int64_t start = 0; start < weight.blocks(); start += kSpan) {
        const int64_t blocks = std::min(kSpan, weight.blocks() - start);
        sum += block_factors(weight, row, x[n], start, blocks, factors);
        for (int64_t b = 0; b < blocks; ++b) sum += factors[b] * float(block(weight.row(row), x[n], start + b));
      }
      out[n][row] = sum;
    }
  }
}

}  // namespace llama_jax::portable
