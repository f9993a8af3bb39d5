// The FFI handler of the backend `native` of kernels/integer_matmul: rows of float32 times a weight in few bits.

#include <string>
#include <string_view>

#include "instructions.h"
#include "multiply.h"
#include "xla/ffi/api/ffi.h"

namespace llama_jax {
namespace {

namespace ffi = xla::ffi;

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
  if (offset == "min" && offsets.element_type() != scales.element_type()) {
    return ffi::Error::InvalidArgument("minima have the dtype of scales");
  }
  if ((offset == "zero" && offsets.element_type() != ffi::S8) ||
      codes.element_type() != (bits == 4 ? ffi::U8 : ffi::S8)) {
    return ffi::Error::InvalidArgument("zeros and codes of eight bits are int8, codes of four are uint8");
  }
  const Offset kind = offset == "min" ? Offset::kMinimum : offset == "zero" ? Offset::kZero : Offset::kNone;
  const Weight weight{static_cast<const uint8_t*>(codes.untyped_data()), scales.untyped_data(), offsets.untyped_data(),
                      type, kind, int(bits), in, group};

  multiply(pool, *best, weight, x.typed_data(), count, rows, out->typed_data());
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
