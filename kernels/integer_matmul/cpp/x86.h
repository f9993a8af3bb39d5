// For x86-64: AVX2, and AVX-512 with VNNI. Functions name their instructions, so that one file compiles for all.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>

#include "product.h"

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))

namespace llama_jax::avx2 {

AVX2 inline float sum_of(__m256 x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

// `block_factors` for the usual kind: a scale and a minimum in 16 bits for each block.
AVX2 inline float factors_of_blocks(const Weight& weight, int64_t row, const Input& x, float* factors) {
  if (weight.group != kBlock || weight.scale_type != Scales::kF16 || weight.offset == Offset::kZero) {
    return block_factors(weight, row, x, factors);
  }
  const int64_t groups = weight.groups();
  const auto* scales = static_cast<const uint16_t*>(weight.scales) + row * groups;
  const auto* minima = static_cast<const uint16_t*>(weight.offsets) + row * groups;
  const bool asymmetric = weight.offset == Offset::kMinimum;
  const __m256 minus_eight = _mm256_set1_ps(weight.bits == 4 ? -8.0f : 0.0f);
  __m256 rest = _mm256_setzero_ps();
  int64_t g = 0;
  for (; g + 8 <= groups; g += 8) {
    const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + g)));
    const __m256 more = asymmetric ? _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(minima + g)))
                                   : _mm256_mul_ps(minus_eight, scale);
    rest = _mm256_fmadd_ps(more, _mm256_loadu_ps(x.sums + g), rest);
    _mm256_storeu_ps(factors + g, _mm256_mul_ps(scale, _mm256_loadu_ps(x.scales + g)));
  }
  float last = sum_of(rest);
  for (; g < groups; ++g) {
    const float scale = _cvtsh_ss(scales[g]);
    const float more = weight.bits == 8 ? 0.0f : asymmetric ? _cvtsh_ss(minima[g]) : -8.0f * scale;
    last += more * x.sums[g];
    factors[g] = scale * x.scales[g];
  }
  return last;
}

template <int kCount>
AVX2 void rows(const Weight& weight, const Input* x, int64_t first, int64_t last, float* factors, int64_t stride,
               float* const* out) {
  const int64_t blocks = weight.blocks();
  const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(15), flip = _mm256_set1_epi8(char(0x88));
  const __m256i spread = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  for (int64_t row = first; row < last; ++row) {
    __m256 sums[kCount];
    float rest[kCount];
    for (int n = 0; n < kCount; ++n) {
      sums[n] = _mm256_setzero_ps();
      rest[n] = factors_of_blocks(weight, row, x[n], factors + n * stride);
    }
    const uint8_t* codes = weight.row(row);
    if (weight.bits == 4) {
      for (int64_t b = 0; b < blocks; b += 2) {  // two blocks: 32 bytes
        const auto* at = reinterpret_cast<const __m128i*>(codes + b * kBlock / 2);
        __m256i both = b + 1 < blocks ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))
                                      : _mm256_zextsi128_si256(_mm_loadu_si128(at));
        both = _mm256_xor_si256(both, flip);
        const __m256i even = _mm256_and_si256(both, low), odd = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
        for (int n = 0; n < kCount; ++n) {
          const auto* of_even = reinterpret_cast<const __m256i*>(x[n].codes + b * kBlock / 2);
          const auto* of_odd = reinterpret_cast<const __m256i*>(x[n].odd + b * kBlock / 2);
          const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(even, _mm256_loadu_si256(of_even)),
                                                 _mm256_maddubs_epi16(odd, _mm256_loadu_si256(of_odd)));
          const __m256 whole = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, ones));
          const __m128 two = _mm_loadu_ps(factors + n * stride + b);
          sums[n] = _mm256_fmadd_ps(whole, _mm256_permutevar_ps(_mm256_set_m128(two, two), spread), sums[n]);
        }
      }
    } else {
      for (int64_t b = 0; b < blocks; ++b) {
        const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + b * kBlock));
        const __m256i size = _mm256_abs_epi8(w);
        for (int n = 0; n < kCount; ++n) {
          const __m256i of_x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x[n].codes + b * kBlock));
          const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(of_x, w));
          const __m256 whole = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, ones));
          sums[n] = _mm256_fmadd_ps(whole, _mm256_set1_ps(factors[n * stride + b]), sums[n]);
        }
      }
    }
    for (int n = 0; n < kCount; ++n) out[n][row] = sum_of(sums[n]) + rest[n];
  }
}

inline void product(const Weight& weight, const Input* x, int count, int64_t first, int64_t last, float* factors,
                    int64_t stride, float* const* out) {
  if (count == kInputs) return rows<kInputs>(weight, x, first, last, factors, stride, out);
  for (int n = 0; n < count; ++n) rows<1>(weight, x + n, first, last, factors, stride, out + n);
}

}  // namespace llama_jax::avx2

namespace llama_jax::avx512 {

template <int kCount>
AVX512 void rows(const Weight& weight, const Input* x, int64_t first, int64_t last, float* factors, int64_t stride,
                 float* const* out) {
  const int64_t blocks = weight.blocks();
  const __m512i low = _mm512_set1_epi8(15);
  const __m512i flip = _mm512_set1_epi8(char(weight.bits == 4 ? 0x88 : 0x80));
  // Of a step's four (two) factors, which lie in each 128 bits: the one that the sums there belong to.
  const __m512i four = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  const __m512i two = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  for (int64_t row = first; row < last; ++row) {
    __m512 sums[kCount];
    float rest[kCount];
    for (int n = 0; n < kCount; ++n) {
      sums[n] = _mm512_setzero_ps();
      rest[n] = avx2::factors_of_blocks(weight, row, x[n], factors + n * stride);
    }
    const uint8_t* codes = weight.row(row);
    const int64_t step = weight.bits == 4 ? 4 : 2;  // blocks in 64 bytes
    for (int64_t b = 0; b < blocks; b += step) {
      const int64_t bytes = (blocks - b < step ? blocks - b : step) * (64 / step);
      const __mmask64 there = bytes == 64 ? ~__mmask64(0) : (__mmask64(1) << bytes) - 1;
      const __m512i w = _mm512_xor_si512(_mm512_maskz_loadu_epi8(there, codes + b * 64 / step), flip);
      const __m512i even = _mm512_and_si512(w, low), odd = _mm512_and_si512(_mm512_srli_epi16(w, 4), low);
      for (int n = 0; n < kCount; ++n) {
        __m512i whole;
        if (weight.bits == 4) {
          whole = _mm512_dpbusd_epi32(_mm512_setzero_si512(), even, _mm512_loadu_si512(x[n].codes + b * kBlock / 2));
          whole = _mm512_dpbusd_epi32(whole, odd, _mm512_loadu_si512(x[n].odd + b * kBlock / 2));
        } else {  // the sign turned, a code counts 128 more
          whole = _mm512_loadu_si512(x[n].shifted + b * kBlock / 4);
          whole = _mm512_dpbusd_epi32(whole, w, _mm512_loadu_si512(x[n].codes + b * kBlock));
        }
        const __m512 factor = _mm512_broadcast_f32x4(_mm_loadu_ps(factors + n * stride + b));
        const __m512 spread = _mm512_permutevar_ps(factor, weight.bits == 4 ? four : two);
        sums[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), spread, sums[n]);
      }
    }
    for (int n = 0; n < kCount; ++n) out[n][row] = _mm512_reduce_add_ps(sums[n]) + rest[n];
  }
}

inline void product(const Weight& weight, const Input* x, int count, int64_t first, int64_t last, float* factors,
                    int64_t stride, float* const* out) {
  if (count == kInputs) return rows<kInputs>(weight, x, first, last, factors, stride, out);
  for (int n = 0; n < count; ++n) rows<1>(weight, x + n, first, last, factors, stride, out + n);
}

}  // namespace llama_jax::avx512

#undef AVX2
#undef AVX512
#endif
