// For x86-64: AVX2, and AVX-512 with VNNI. Functions name their instructions, so that one file compiles for all.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>

#include "product.h"

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))

namespace llama_jax {

// Asks for codes a page ahead: the processor's own prefetching stops at the end of a page.
inline void prefetch(const uint8_t* codes) { _mm_prefetch(reinterpret_cast<const char*>(codes + 4096), _MM_HINT_T0); }

}  // namespace llama_jax

namespace llama_jax::avx2 {

constexpr int64_t kRoom = kSpan + 8;  // for the factors of a span, and zeros behind them

AVX2 inline __m256 eight_halves(const uint16_t* at) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}

// The last `count` < 8 of at least 8 halves, from `at` on, and zeros behind them.
AVX2 inline __m256 last_halves(const uint16_t* at, int64_t count) {
  static constexpr uint8_t kMoved[32] = {0,   1,   2,   3,   4,   5,   6,   7,   8,   9,   10,  11,  12,  13,  14,  15,
                                         128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128};
  const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + count - 8));
  const __m128i moved = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kMoved + 16 - 2 * count));
  return _mm256_cvtph_ps(_mm_shuffle_epi8(eight, moved));
}

AVX2 inline __m256i load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }

// The sums of four registers.
AVX2 inline __m128 sums_of(const __m256* each) {
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(each[0], each[1]), _mm256_hadd_ps(each[2], each[3]));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

// `block_factors` of a usual weight with at least 8 groups, and zeros up to a multiple of 8; what it returns, in parts.
// None of the stores overlap: what is loaded from the factors soon is forwarded from one of them.
template <int kBits>
AVX2 inline __m256 usual_factors(const Weight& weight, int64_t row, const Input& x, int64_t first, int64_t count,
                                 float* factors) {
  const auto* scales = static_cast<const uint16_t*>(weight.scales) + row * weight.groups() + first;
  const auto* minima = static_cast<const uint16_t*>(weight.offsets) + row * weight.groups() + first;
  __m256 rest = _mm256_setzero_ps();
  for (int64_t b = 0; b < count; b += 8) {
    const bool whole = b + 8 <= count;
    const __m256 scale = whole ? eight_halves(scales + b) : last_halves(scales + b, count - b);
    _mm256_storeu_ps(factors + b, _mm256_mul_ps(scale, _mm256_loadu_ps(x.scales + first + b)));
    if (kBits == 4) {
      __m256 more = _mm256_mul_ps(scale, _mm256_set1_ps(-8));
      if (weight.offset == Offset::kMinimum) more = whole ? eight_halves(minima + b) : last_halves(minima + b, count - b);
      rest = _mm256_fmadd_ps(more, _mm256_loadu_ps(x.sums + first + b), rest);
    }
  }
  return rest;
}

// Sums of products of 32 bytes of codes, from block `b` on, with a row of activations.
template <int kBits>
AVX2 inline __m256 dot(__m256i codes, const Input& x, int64_t b) {
  __m256i pairs;
  if (kBits == 4) {
    const __m256i low = _mm256_set1_epi8(15), counted = _mm256_xor_si256(codes, _mm256_set1_epi8(char(0x88)));
    const __m256i even = _mm256_and_si256(counted, low), odd = _mm256_and_si256(_mm256_srli_epi16(counted, 4), low);
    pairs = _mm256_add_epi16(_mm256_maddubs_epi16(even, load(x.codes + b * kBlock / 2)),
                             _mm256_maddubs_epi16(odd, load(x.odd + b * kBlock / 2)));
  } else {
    pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(load(x.codes + b * kBlock), codes));
  }
  return _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// Adds the products of 32 bytes of codes with each row of activations to `sums`. factors: of block `b`, kRoom for each.
template <int kBits, int kCount>
AVX2 inline void add_products(__m256i codes, const Input* x, int64_t b, const float* factors, __m256* sums) {
#pragma GCC unroll 4
  for (int n = 0; n < kCount; ++n, factors += kRoom) {
    __m256 factor;
    if (kBits == 4) {  // a block's sums are in a half of the register
      const __m256d both = _mm256_broadcast_sd(reinterpret_cast<const double*>(factors));
      factor = _mm256_permutevar_ps(_mm256_castpd_ps(both), _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
    } else {
      factor = _mm256_broadcast_ss(factors);
    }
    sums[n] = _mm256_fmadd_ps(dot<kBits>(codes, x[n], b), factor, sums[n]);
  }
}

// kRows rows of the weight with kCount of activations; one of both is 1, the other 1 or 4. Rows are read one after the
// other, as memory is fastest, and their sums are added up together.
template <int kBits, int kRows, int kCount>
AVX2 void tile(const Weight& weight, const Input* x, int64_t row, float* const* out) {
  constexpr int64_t kBlocks = kBits == 4 ? 2 : 1;  // in 32 bytes
  float factors[kCount][kRoom], rest[4] = {}, found[4];
  __m256 sums[4] = {};
  for (int r = 0; r < kRows; ++r) {
    __m256 own[kCount] = {};
    for (int64_t start = 0; start < weight.blocks(); start += kSpan) {
      const int64_t blocks = std::min(kSpan, weight.blocks() - start);
#pragma GCC unroll 4
      for (int n = 0; n < kCount; ++n) {
        if (weight.usual() && weight.groups() >= 8) {
          own[n] = _mm256_add_ps(own[n], usual_factors<kBits>(weight, row + r, x[n], start, blocks, factors[n]));
        } else {
          rest[r * kCount + n] += block_factors(weight, row + r, x[n], start, blocks, factors[n]);
          _mm_storeu_ps(factors[n] + blocks, _mm_setzero_ps());
        }
      }
      const uint8_t* codes = weight.row(row + r) + start * 32 / kBlocks;
      int64_t b = 0;
#pragma GCC unroll 4
      for (; b + kBlocks <= blocks; b += kBlocks, codes += 32) {
        if (kCount == 1) prefetch(codes);
        add_products<kBits, kCount>(load(codes), x, start + b, factors[0] + b, own);
      }
      if (b < blocks) {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
        add_products<kBits, kCount>(_mm256_zextsi128_si256(half), x, start + b, factors[0] + b, own);
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < kCount; ++n) sums[r * kCount + n] = own[n];
  }
  _mm_storeu_ps(found, _mm_add_ps(sums_of(sums), _mm_loadu_ps(rest)));
  for (int i = 0; i < kRows * kCount; ++i) out[i % kCount][row + i / kCount] = found[i];
}

template <int kBits>
inline void product_of(const Weight& weight, const Input* x, int count, int64_t first, int64_t last, float* const* out) {
  if (count == kInputs) {
    for (int64_t row = first; row < last; ++row) tile<kBits, 1, kInputs>(weight, x, row, out);
    return;
  }
  for (int n = 0; n < count; ++n) {
    int64_t row = first;
    for (; row + 4 <= last; row += 4) tile<kBits, 4, 1>(weight, x + n, row, out + n);
    for (; row < last; ++row) tile<kBits, 1, 1>(weight, x + n, row, out + n);
  }
}

inline void product(const Weight& weight, const Input* x, int count, int64_t first, int64_t last, float* const* out) {
  return (weight.bits == 4 ? product_of<4> : product_of<8>)(weight, x, count, first, last, out);
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

// Factors of up to 16 blocks from `b` on; what minima add goes to `sums`, or of an unusual weight to `rest`.
template <int kBits>
AVX512 inline __m512 factors_from(const Weight& weight, bool usual, int64_t row, int64_t b, __mmask16 there,
                                  const Input& x, __m512& sums, float& rest) {
  if (!usual) {
    float factors[kSixteen] = {};
    rest += block_factors(weight, row, x, b, std::min(kSixteen, weight.blocks() - b), factors);
    return _mm512_loadu_ps(factors);
  }
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
AVX512 void rows(const Weight& weight, const Input* x, int64_t first, int64_t last, float* const* out) {
  constexpr int64_t kStepBlocks = kBits == 4 ? 4 : 2, kSteps = kSixteen / kStepBlocks;
  const int64_t blocks = weight.blocks();
  const bool usual = weight.usual();
  for (int64_t row = first; row < last; ++row) {
    __m512 sums[kCount], sixteen[kCount];
    float rest[kCount] = {};
    for (int n = 0; n < kCount; ++n) sums[n] = _mm512_setzero_ps();
    const uint8_t* codes = weight.row(row);
    int64_t b = 0;
    for (; b + kSixteen <= blocks; b += kSixteen) {
      for (int n = 0; n < kCount; ++n) {
        sixteen[n] = factors_from<kBits>(weight, usual, row, b, 0xffff, x[n], sums[n], rest[n]);
      }
#pragma GCC unroll 8
      for (int step = 0; step < kSteps; ++step) {
        const int64_t at = b + step * kStepBlocks;
        const __m512i w = _mm512_loadu_si512(codes + at * 64 / kStepBlocks);
        if (kCount == 1) prefetch(codes + at * 64 / kStepBlocks);
        for (int n = 0; n < kCount; ++n) {
          sums[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot<kBits>(w, x[n], at)), spread<kBits>(sixteen[n], step), sums[n]);
        }
      }
    }
    if (b < blocks) {
      for (int n = 0; n < kCount; ++n) {
        const auto there = __mmask16((1 << (blocks - b)) - 1);
        sixteen[n] = factors_from<kBits>(weight, usual, row, b, there, x[n], sums[n], rest[n]);
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
inline void product_of(const Weight& weight, const Input* x, int count, int64_t first, int64_t last, float* const* out) {
  if (count == kInputs) return rows<kBits, kInputs>(weight, x, first, last, out);
  for (int n = 0; n < count; ++n) rows<kBits, 1>(weight, x + n, first, last, out + n);
}

inline void product(const Weight& weight, const Input* x, int count, int64_t first, int64_t last, float* const* out) {
  return (weight.bits == 4 ? product_of<4> : product_of<8>)(weight, x, count, first, last, out);
}

}  // namespace llama_jax::avx512

#undef AVX2
#undef AVX512
#endif
