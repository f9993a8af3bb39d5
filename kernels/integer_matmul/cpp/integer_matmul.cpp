// The FFI handler of the backend `native` of kernels/integer_matmul: rows of float32 times a weight in few bits.

#include <string>
#include <string_view>

#include "activations.h"
#include "neon.h"
#include "parallel.h"
#include "portable.h"
#include "x86.h"
#include "xla/ffi/api/ffi.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace llama_jax {
namespace {

namespace ffi = xla::ffi;

struct Instructions {
  std::string_view name;
  Product product;
  bool here;
};

// The best first.
const Instructions* table() {
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
const Instructions* find(std::string_view name) {
  for (const Instructions* at = table(); at->product != nullptr; ++at) {
    if (at->here && (name.empty() || name == at->name)) return at;
  }
  return nullptr;
}

constexpr int64_t kRowsAtOnce = 16;  // rows of a weight that a thread takes

ffi::Error run(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer codes, ffi::AnyBuffer scales,
               ffi::AnyBuffer offsets, ffi::ResultBuffer<ffi::F32> out, int64_t bits, int64_t group,
               std::string_view offset, std::string_view instructions) {
  const Instructions* best = find(instructions);
  if (best == nullptr) return ffi::Error::InvalidArgument("this processor does not have " + std::string(instructions));
  if (x.dimensions().size() != 2 || codes.dimensions().size() != 2 || out->dimensions().size() != 2) {
    return ffi::Error::InvalidArgument("x, codes and the result are matrices");
  }
  const int64_t count = x.dimensions()[0], in = x.dimensions()[1], rows = codes.dimensions()[0];
  const bool sound = (bits == 4 || bits == 8) && group > 0 && group % kBlock == 0 && in % group == 0 &&
                     codes.dimensions()[1] == in * bits / 8 && out->dimensions()[0] == count &&
                     out->dimensions()[1] == rows && int64_t(scales.element_count()) == rows * (in / group) &&
                     (offset.empty() || int64_t(offsets.element_count()) == rows * (in / group));
  if (!sound) return ffi::Error::InvalidArgument("shapes that do not belong together");
  Scales type;
  switch (scales.element_type()) {
    case ffi::F32: type = Scales::kF32; break;
    case ffi::F16: type = Scales::kF16; break;
    case ffi::BF16: type = Scales::kBF16; break;
    default: return ffi::Error::InvalidArgument("scales are float32, float16 or bfloat16");
  }
  const Offset kind = offset == "min" ? Offset::kMinimum : offset == "zero" ? Offset::kZero : Offset::kNone;
  const Weight weight{static_cast<const uint8_t*>(codes.untyped_data()), scales.untyped_data(), offsets.untyped_data(),
                      type, kind, int(bits), in, group};

  Activations activations(weight, count);
  if (count > kInputs) {
    parallel_for(pool, count, [&](int64_t i) { activations.quantize(i, x.typed_data() + i * in); });
  } else {
    for (int64_t i = 0; i < count; ++i) activations.quantize(i, x.typed_data() + i * in);
  }
  float* results = out->typed_data();
  const int64_t stride = weight.blocks() + kStep;
  parallel_for(pool, (rows + kRowsAtOnce - 1) / kRowsAtOnce, [&](int64_t part) {
    const int64_t first = part * kRowsAtOnce, last = std::min(first + kRowsAtOnce, rows);
    std::vector<float> factors(kInputs * stride);
    for (int64_t i = 0; i < count; i += kInputs) {
      const int64_t n = std::min<int64_t>(kInputs, count - i);
      float* to[kInputs];
      for (int64_t k = 0; k < n; ++k) to[k] = results + (i + k) * rows;
      best->product(weight, activations.row(i), int(n), first, last, factors.data(), stride, to);
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace llama_jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(llama_jax_integer_matmul, llama_jax::run,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group")
                                  .Attr<std::string_view>("offset")
                                  .Attr<std::string_view>("instructions"));

// Names of the instruction sets of this processor that there is a product for, the best first; nullptr behind the last.
extern "C" const char* llama_jax_instructions(int index) {
  for (const llama_jax::Instructions* at = llama_jax::table(); at->product != nullptr; ++at) {
    if (at->here && index-- == 0) return at->name.data();
  }
  return nullptr;
}
