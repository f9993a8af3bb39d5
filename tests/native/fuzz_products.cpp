// Products of random shapes by every set of instructions of this processor, in buffers of exactly their size, so that
// a sanitizer sees what is read or written beside them. Prints the cases; exits with 1 at the first difference.

#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "multiply.h"

using namespace llama_jax;

struct Threads {  // a pool as XLA's, of threads that come late
  std::vector<std::thread> running;
  int64_t num_threads() const { return 3; }
  void Schedule(std::function<void()> task) {
    running.emplace_back([task] {
      std::this_thread::yield();
      task();
    });
  }
  ~Threads() {
    for (auto& thread : running) thread.join();
  }
};

int main(int, char** argv) {
  const int cases = std::atoi(argv[1]);
  std::mt19937 random(std::atoi(argv[2]));
  const auto below = [&](int n) { return int(random() % n); };
  for (int i = 0; i < cases; ++i) {
    const int bits = below(2) ? 4 : 8, rows = 1 + below(40), count = 1 + below(10);
    const int64_t group = kBlock << below(3), groups = 1 + below(12), in = group * groups;
    const Offset offset = Offset(below(3));
    const Scales type = Scales(below(3));
    const int64_t bytes = type == Scales::kF32 ? 4 : 2;
    std::vector<uint8_t> codes(rows * in * bits / 8), scales(rows * groups * bytes), offsets(rows * groups * bytes);
    for (auto& code : codes) code = uint8_t(random());
    const auto number = [&](uint8_t* to, float value) {
      uint32_t whole;
      std::memcpy(&whole, &value, 4);
      uint16_t half = uint16_t(whole >> 16);  // as bfloat16
      if (type == Scales::kF16) half = uint16_t((whole >> 16 & 0x8000) | (((whole >> 23 & 255) - 112) << 10 | (whole >> 13 & 1023)));
      bytes == 4 ? std::memcpy(to, &value, 4) : std::memcpy(to, &half, 2);
    };
    for (int64_t k = 0; k < rows * groups; ++k) {
      number(&scales[k * bytes], 0.001f + 0.001f * float(below(100)));
      number(&offsets[k * bytes], -0.01f - 0.001f * float(below(100)));
      if (offset == Offset::kZero) offsets[k] = uint8_t(random());
    }
    std::vector<float> x(count * in), expected(count * rows), found(count * rows);
    for (auto& value : x) value = float(below(2001) - 1000) / 300;
    if (below(8) == 0) x[below(int(x.size()))] = below(2) ? NAN : INFINITY;
    const Weight weight{codes.data(), scales.data(), offsets.data(), type, offset, bits, in, group};
    for (const Instructions* at = table(); at->product != nullptr; ++at) {
      if (!at->here) continue;
      {
        Threads pool;
        multiply(pool, *at, weight, x.data(), count, rows, found.data());
      }
      Activations activations(weight, count);
      for (int n = 0; n < count; ++n) activations.quantize(n, x.data() + n * in);
      for (int n = 0; n < count; ++n) {
        for (int r = 0; r < rows; ++r) {
          double sum = 0, size = 0;
          for (int64_t k = 0; k < in; ++k) {
            const int64_t g = r * groups + k / group;
            const uint8_t byte = codes[(r * in + k) * bits / 8];
            const int code = bits == 8 ? int8_t(byte) : int8_t(byte << (k % 2 ? 0 : 4)) >> 4;
            const double scale = load_scale(scales.data(), type, g);
            double w = code * scale;
            if (offset == Offset::kMinimum) w = (code + (bits == 4 ? 8 : 0)) * scale + load_scale(offsets.data(), type, g);
            if (offset == Offset::kZero) w = (code - int8_t(offsets[g])) * scale;
            const Input& input = *activations.row(n);
            const int q = bits == 8 ? input.codes[k] : k % 2 ? input.odd[k / 2] : input.codes[k / 2];
            sum += w * q * input.scales[k / group];
            size += std::fabs(w * q * input.scales[k / group]);
          }
          const double value = found[n * rows + r];
          if (!(std::fabs(value - sum) <= 1e-4 * size + 1e-6) && !(std::isnan(value) && std::isnan(sum))) {
            std::printf("%s: %d bits, group %ld, %ld inputs, row %d of %d: %g, not %g\n", at->name.data(), bits,
                        long(group), long(in), r, rows, value, sum);
            return 1;
          }
        }
      }
    }
  }
  for (const Instructions* at = table(); at->product != nullptr; ++at) {
    if (at->here) std::printf("%s\n", at->name.data());
  }
}
