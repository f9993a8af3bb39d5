// The products that there are for this kind of processor, and which of them this one has.
#pragma once

#include <string_view>

#include "neon.h"
#include "portable.h"
#include "x86.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace llama_jax {

struct Instructions {
  std::string_view name;
  Product product;
  bool here;
};

// The best first.
inline const Instructions* table() {
#if defined(__x86_64__)
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                             __builtin_cpu_supports("avx512vnni");
  static const Instructions all[] = {{"avx512_vnni", avx512::product, avx512}, {"avx2", avx2::product, avx2},
                                     {"portable", portable::product, true}, {"", nullptr, false}};
#elif defined(__aarch64__)
#if defined(__linux__)
  static const bool dotprod = getauxval(AT_HWCAP) & (1 << 20);  // HWCAP_ASIMDDP
#else
  static const bool dotprod = true;  // every ARM Mac has it
#endif
  static const Instructions all[] = {{"neon_dotprod", neon::product, dotprod}, {"portable", portable::product, true},
                                     {"", nullptr, false}};
#else
  static const Instructions all[] = {{"portable", portable::product, true}, {"", nullptr, false}};
#endif
  return all;
}

// The best of this processor for "", else those of that name.
inline const Instructions* find(std::string_view name) {
  for (const Instructions* at = table(); at->product != nullptr; ++at) {
    if (at->here && (name.empty() || name == at->name)) return at;
  }
  return nullptr;
}

}  // namespace llama_jax
