// For 64-bit ARM with the dot product instructions (ARMv8.2).
#pragma once

#if defined(__aarch64__)
#include <arm_neon.h>

#include "product.h"

#if defined(__clang__)
#define DOTPROD __attribute__((target("dotprod")))
#else
#define DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
#endif

namespace llama_jax::neon {

template <int kCount>
DOTPROD void rows(const Weight& weight, const Input* x, int64_t first, int64_t last, float* const* out) {
  const int32x4_t none = vdupq_n_s32(0);
  float factors[kCount][kSpan];
  for (int64_t row = first; row < last; ++row) {
    float32x4_t sums[kCount];
    float rest[kCount] = {};
    for (int n = 0; n < kCount; ++n) sums[n] = vdupq_n_f32(0);
    for (int64_t start = 0; start < weight.blocks(); start += kSpan) {
      const int64_t blocks = std::min(kSpan, weight.blocks() - start);
      for (int n = 0; n < kCount; ++n) rest[n] += block_factors(weight, row, x[n], start, blocks, factors[n]);
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t b = start + i;
        const uint8_t* at = weight.row(row) + b * kBlock * weight.bits / 8;
        int8x16_t w0, w1;
        if (weight.bits == 4) {
          const uint8x16_t both = veorq_u8(vld1q_u8(at), vdupq_n_u8(0x88));
          w0 = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
          w1 = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
        } else {
          w0 = vld1q_s8(reinterpret_cast<const int8_t*>(at));
          w1 = vld1q_s8(reinterpret_cast<const int8_t*>(at) + 16);
        }
        for (int n = 0; n < kCount; ++n) {
          const int8_t* x0 = weight.bits == 4 ? x[n].codes + b * kBlock / 2 : x[n].codes + b * kBlock;
          const int8_t* x1 = weight.bits == 4 ? x[n].odd + b * kBlock / 2 : x0 + 16;
          const int32x4_t whole = vdotq_s32(vdotq_s32(none, w0, vld1q_s8(x0)), w1, vld1q_s8(x1));
          sums[n] = vfmaq_n_f32(sums[n], vcvtq_f32_s32(whole), factors[n][i]);
        }
      }
    }
    for (int n = 0; n < kCount; ++n) out[n][row] = vaddvq_f32(sums[n]) + rest[n];
  }
}

inline void product(const Weight& weight, const Input* x, int count, int64_t first, int64_t last, float* const* out) {
  if (count == kInputs) return rows<kInputs>(weight, x, first, last, out);
  for (int n = 0; n < count; ++n) rows<1>(weight, x + n, first, last, out + n);
}

}  // namespace llama_jax::neon

#undef DOTPROD
#endif
