// A whole product: activations are rounded, and rows of the weight shared among threads.
#pragma once

#include "activations.h"
#include "instructions.h"
#include "parallel.h"

namespace llama_jax {

constexpr int64_t kBytesAtOnce = 16384;  // of a weight, about what a thread takes: some microseconds of work

// x [count, weight.in] times a weight of `rows` rows: out [count, rows].
template <typename Pool>
void multiply(Pool& pool, const Instructions& best, const Weight& weight, const float* x, int64_t count, int64_t rows,
              float* out) {
  Activations activations(weight, count);
  if (count > kInputs) {
    parallel_for(pool, count, [&](int64_t i) { activations.quantize(i, x + i * weight.in); });
  } else {
    for (int64_t i = 0; i < count; ++i) activations.quantize(i, x + i * weight.in);
  }
  const int64_t at_once = std::max<int64_t>(4, kBytesAtOnce / (weight.in * weight.bits / 8) / 4 * 4);
  parallel_for(pool, (rows + at_once - 1) / at_once, [&](int64_t part) {
    const int64_t first = part * at_once, last = std::min(first + at_once, rows);
    for (int64_t i = 0; i < count; i += kInputs) {
      const int64_t n = std::min<int64_t>(kInputs, count - i);
      float* to[kInputs];
      for (int64_t k = 0; k < n; ++k) to[k] = out + (i + k) * rows;
      best.product(weight, activations.row(i), int(n), first, last, to);
    }
  });
}

}  // namespace llama_jax
