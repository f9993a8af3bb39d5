// Activations in int8: as `quantize` of kernels/integer_matmul/activations.py, to the bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "product.h"

namespace llama_jax {

// Room for rows of activations of one call, and the records that point into it.
class Activations {
 public:
  Activations(const Weight& weight, int64_t rows) : weight_(weight), inputs_(rows) {
    const int64_t padded = (weight.blocks() + kStep) * kBlock, groups = weight.groups() + 16;
    codes_.resize(rows * padded);
    shifted_.resize(weight.bits == 8 ? rows * padded / 4 : 0);
    scales_.resize(2 * rows * groups);
    for (int64_t i = 0; i < rows; ++i) {
      int8_t* codes = codes_.data() + i * padded;
      float* scales = scales_.data() + 2 * i * groups;
      inputs_[i] = {codes, codes + padded / 2, shifted_.data() + i * padded / 4, scales, scales + groups};
    }
  }

  const Input* row(int64_t i) const { return inputs_.data() + i; }

  // Fills row i from x [in].
  void quantize(int64_t i, const float* x) {
    const Input& input = inputs_[i];
    auto* codes = const_cast<int8_t*>(input.codes);
    auto* odd = const_cast<int8_t*>(input.odd);
    auto* shifted = const_cast<int32_t*>(input.shifted);
    auto* scales = const_cast<float*>(input.scales);
    auto* sums = const_cast<float*>(input.sums);
    for (int64_t g = 0; g < weight_.groups(); ++g) {
      const int64_t start = g * weight_.group;
      const float scale = scale_of(x + start, weight_.group);
      // Not a number, or infinite: neither are the results.
      const bool finite = std::isfinite(scale);
      scales[g] = finite ? scale : std::numeric_limits<float>::quiet_NaN();
      int32_t sum = 0;
      for (int64_t b = start; b < start + weight_.group; b += kBlock) {
        int32_t block[kBlock] = {};
        if (finite && scale > 0) round_block(x + b, scale, block);
        for (int k = 0; k < kBlock; ++k) sum += block[k];
        if (weight_.bits == 4) {
          for (int k = 0; k < kBlock / 2; ++k) codes[b / 2 + k] = int8_t(block[2 * k]);
          for (int k = 0; k < kBlock / 2; ++k) odd[b / 2 + k] = int8_t(block[2 * k + 1]);
        } else {
          for (int k = 0; k < kBlock; ++k) codes[b + k] = int8_t(block[k]);
          for (int k = 0; k < kBlock / 4; ++k) {
            const int32_t* of = block + 4 * k;
            shifted[b / 4 + k] = -128 * (of[0] + of[1] + of[2] + of[3]);
          }
        }
      }
      sums[g] = scales[g] * float(sum);
    }
  }

 private:
  // The largest absolute value over 127. Compared as integers, in which NaN is larger than every number.
  static float scale_of(const float* x, int64_t n) {
    int32_t largest = 0;
    for (int64_t i = 0; i < n; ++i) {
      int32_t bits;
      std::memcpy(&bits, x + i, sizeof bits);
      largest = std::max(largest, bits & 0x7fffffff);
    }
    const float size = bits_to_float(uint32_t(largest));
    return size < 1e-30f ? 0.0f : size / 127.0f;
  }

  static void round_block(const float* x, float scale, int32_t* out) {
    constexpr float kToEven = 12582912.0f;  // 1.5 * 2^23: numbers next to it are whole, and sums are rounded to even
    for (int k = 0; k < kBlock; ++k) out[k] = int32_t((x[k] / scale + kToEven) - kToEven);
  }

  Weight weight_;
  std::vector<Input> inputs_;
  std::vector<int8_t> codes_;
  std::vector<int32_t> shifted_;
  std::vector<float> scales_;
};

}  // namespace llama_jax
