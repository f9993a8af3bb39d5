// What the instruction sets share: a weight in few bits, a row of int8 activations, and the product of a few of each.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace llama_jax {

constexpr int64_t kBlock = 32;   // codes that are multiplied with one factor
constexpr int64_t kStep = 4;     // blocks that the widest loop takes at once; activations are padded to it
constexpr int64_t kSpan = 64;    // blocks of a row whose factors are made at once
constexpr int kInputs = 4;       // rows of activations that one pass over a weight multiplies

enum class Scales { kF32, kF16, kBF16 };
enum class Offset { kNone, kMinimum, kZero };

// A weight [out, in] as it lies in the parameter tree (llama_jax/quantized/codes.py).
struct Weight {
  const uint8_t* codes;  // [out, in] int8, or [out, in / 2] with two codes in a byte, the first in its low half
  const void* scales;    // [out, groups]
  const void* offsets;   // like scales: minima of their dtype, or zeros int8
  Scales scale_type;
  Offset offset;
  int bits;
  int64_t in, group;

  int64_t groups() const { return in / group; }
  int64_t blocks() const { return in / kBlock; }
  // A block is a group, with numbers in 16 bits that processors convert; codes of eight bits are symmetric.
  bool usual() const {
    return group == kBlock && scale_type == Scales::kF16 &&
           (offset == Offset::kNone || (bits == 4 && offset == Offset::kMinimum));
  }
  const uint8_t* row(int64_t i) const { return codes + i * in * bits / 8; }
};

// One row of activations: x is about scales[group] * code. Codes end with zeros up to whole steps.
struct Input {
  const int8_t* codes;     // of int8 weights: [in]; of int4: those at even places, [in / 2]
  const int8_t* odd;       // of int4 weights: those at odd places, [in / 2]
  const int32_t* shifted;  // of int8 weights: -128 times the sums of every four codes, [in / 4]
  const float* scales;     // [groups]
  const float* sums;       // scale times the sum of a group's codes, [groups]
};

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  if (magnitude >= 0x0400) return bits_to_float(sign | ((magnitude << 13) + 0x38000000));
  const float value = float(magnitude) * 5.9604644775390625e-8f;  // subnormal: units of 2^-24
  return sign ? -value : value;
}

inline float load_scale(const void* scales, Scales type, int64_t i) {
  switch (type) {
    case Scales::kF32: return static_cast<const float*>(scales)[i];
    case Scales::kF16: return half_to_float(static_cast<const uint16_t*>(scales)[i]);
    default: return bits_to_float(uint32_t(static_cast<const uint16_t*>(scales)[i]) << 16);
  }
}

// What is added to every code of a group times its scale. Codes of four bits count from 0 to 15 in the products, those
// of eight bits as they are.
inline float added(const Weight& weight, int64_t i, float scale) {
  if (weight.offset == Offset::kMinimum) return load_scale(weight.offsets, weight.scale_type, i);
  const int zero = weight.offset == Offset::kZero ? static_cast<const int8_t*>(weight.offsets)[i] : 0;
  return -float((weight.bits == 4 ? 8 : 0) + zero) * scale;
}

// The factors of `count` blocks of a row of the weight, from block `first` on, with a row of activations. Returns what
// the codes of groups that begin there do not give.
inline float block_factors(const Weight& weight, int64_t row, const Input& x, int64_t first, int64_t count,
                           float* factors) {
  const int64_t blocks_a_group = weight.group / kBlock;
  float rest = 0;
  for (int64_t b = 0; b < count;) {
    const int64_t g = (first + b) / blocks_a_group, end = std::min((g + 1) * blocks_a_group - first, count);
    const int64_t i = row * weight.groups() + g;
    const float scale = load_scale(weight.scales, weight.scale_type, i), factor = scale * x.scales[g];
    if (first + b == g * blocks_a_group) rest += added(weight, i, scale) * x.sums[g];
    while (b < end) factors[b++] = factor;
  }
  return rest;
}

// The product of rows first..last of a weight with `count` rows of activations, at most kInputs: out[n][row].
using Product = void (*)(const Weight& weight, const Input* x, int count, int64_t first, int64_t last, float* const* out);

}  // namespace llama_jax
