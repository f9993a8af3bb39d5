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

constexpr int64_t kSixteen = 16;  // blocks whose factors fill a register

// Of 16 factors those of step `step` (4 blocks of int4, 2 of int8, in 64 bytes), each where the sums of its block are.
template <int kBits>
AVX512 inline __m512 spread(__m512 factors, int step) {
  const __m512i first = kBits == 4 ? _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3)
                                   : _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  return _mm512_permutexvar_ps(_mm512_add_epi32(first, _mm512_set1_epi32(step * (kBits == 4 ? 4 : 2))), factors);
}

// Sums of products of 64 bytes of codes, from block `b` on, with a row of activations; four codes in each.
template <int kBits>
AVX512 inline __m512i dot(__m512i codes, const Input& x, int64_t b) {
  if (kBits == 4) {
    const __m512i low = _mm512_set1_epi8(15), counted = _mm512_xor_si512(codes, _mm512_set1_epi8(char(0x88)));
    const __m512i even = _mm512_and_si512(counted, low), odd = _mm512_and_si512(_mm512_srli_epi16(counted, 4), low);
    const __m512i sums =
        _mm512_dpbusd_epi32(_mm512_setzero_si512(), even, _mm512_loadu_si512(x.codes + b * kBlock / 2));
    return _mm512_dpbusd_epi32(sums, odd, _mm512_loadu_si512(x.odd + b * kBlock / 2));
  }
  // The sign turned, a code counts 128 more.
  const __m512i counted = _mm512_xor_si512(codes, _mm512_set1_epi8(char(0x80)));
  return _mm512_dpbusd_epi32(_mm512_loadu_si512(x.shifted + b * kBlock / 4), counted,
                             _mm512_loadu_si512(x.codes + b * kBlock));
}

// Factors of up to 16 blocks from `b` on; what minima add goes to `sums`. `usual`: a block is a group with a scale, and
// perhaps a minimum, in 16 bits; else factors have been made.
template <int kBits>
AVX512 inline __m512 factors_from(const Weight& weight, bool usual, int64_t row, int64_t b, __mmask16 there,
                                  const Input& x, const float* factors, __m512& sums) {
  if (!usual) return _mm512_maskz_loadu_ps(there, factors + b);
  const int64_t at = row * weight.groups() + b;
  const __m512 scales =
      _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, static_cast<const uint16_t*>(weight.scales) + at));
  if (kBits == 4) {
    const __m512 more =
        weight.offset == Offset::kMinimum
            ? _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, static_cast<const uint16_t*>(weight.offsets) + at))
            : _mm512_mul_ps(scales, _mm512_set1_ps(-8));
    sums = _mm512_fmadd_ps(more, _mm512_maskz_loadu_ps(there, x.sums + b), sums);
  }
  return _mm512_mul_ps(scales, _mm512_maskz_loadu_ps(there, x.scales + b));
}

template <int kBits, int kCount>
AVX512 void rows(const Weight& weight, const Input* x, int64_t first, int64_t last, float* factors, int64_t stride,
                 float* const* out) {
  constexpr int64_t kStepBlocks = kBits == 4 ? 4 : 2, kSteps = kSixteen / kStepBlocks;
  const int64_t blocks = weight.blocks();
  const bool usual =
      weight.group == kBlock && weight.scale_type == Scales::kF16 && weight.offset != Offset::kZero;
  for (int64_t row = first; row < last; ++row) {
    __m512 sums[kCount], sixteen[kCount];
    float rest[kCount];
    for (int n = 0; n < kCount; ++n) {
      sums[n] = _mm512_setzero_ps();
      rest[n] = usual ? 0 : block_factors(weight, row, x[n], factors + n * stride);
    }
    const uint8_t* codes = weight.row(row);
    int64_t b = 0;
    for (; b + kSixteen <= blocks; b += kSixteen) {
      for (int n = 0; n < kCount; ++n) {
        sixteen[n] = factors_from<kBits>(weight, usual, row, b, 0xffff, x[n], factors + n * stride, sums[n]);
      }
#pragma GCC unroll 8
      for (int step = 0; step < kSteps; ++step) {
        const int64_t at = b + step * kStepBlocks;
        const __m512i w = _mm512_loadu_si512(codes + at * 64 / kStepBlocks);
        for (int n = 0; n < kCount; ++n) {
          sums[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot<kBits>(w, x[n], at)), spread<kBits>(sixteen[n], step), sums[n]);
        }
      }
    }
    if (b < blocks) {
      for (int n = 0; n < kCount; ++n) {
        const auto there = __mmask16((1 << (blocks - b)) - 1);
        sixteen[n] = factors_from<kBits>(weight, usual, row, b, there, x[n], factors + n * stride, sums[n]);
      }
      for (int step = 0; b < blocks; b += kStepBlocks, ++step) {
        const int64_t bytes = (blocks - b < kStepBlocks ? blocks - b : kStepBlocks) * 64 / kStepBlocks;
        const __m512i w = _mm512_maskz_loadu_epi8(~uint64_t(0) >> (64 - bytes), codes + b * 64 / kStepBlocks);
        for (int n = 0; n < kCount; ++n) {
          sums[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot<kBits>(w, x[n], b)), spread<kBits>(sixteen[n], step), sums[n]);
        }
      }
    }
    for (int n = 0; n < kCount; ++n) out[n][row] = _mm512_reduce_add_ps(sums[n]) + rest[n];
  }
}

template <int kBits>
inline void product_of(const Weight& weight, const Input* x, int count, int64_t first, int64_t last, float* factors,
                       int64_t stride, float* const* out) {
  if (count == kInputs) return rows<kBits, kInputs>(weight, x, first, last, factors, stride, out);
  for (int n = 0; n < count; ++n) rows<kBits, 1>(weight, x + n, first, last, factors, stride, out + n);
}

inline void product(const Weight& weight, const Input* x, int count, int64_t first, int64_t last, float* factors,
                    int64_t stride, float* const* out) {
  return (weight.bits == 4 ? product_of<4> : product_of<8>)(weight, x, count, first, last, factors, stride, out);
}

}  // namespace llama_jax::avx512

#undef AVX2
#undef AVX512
#endif
