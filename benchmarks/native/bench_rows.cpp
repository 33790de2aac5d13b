// Speed of the kernels that work on one row at a time, on one thread, data in the first cache.
//
//   bench_rows WIDTH...        e.g. bench_rows 576 1536
//
// Nanoseconds of the best sample for one row, and elements a nanosecond. TOKENMILL_ISA selects the instruction-set path.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "kernels/linear.h"
#include "kernels/pointwise.h"
#include "limits.h"
#include "platform/isa.h"

using namespace tokenmill;
using namespace tokenmill::limits;

namespace {

constexpr int kSamples = 200;
constexpr int kRepeats = 50;

template <class Kernel>
void time(const char* name, int32_t width, const Kernel& kernel) {
  double best = 1;
  for (int sample = 0; sample < kSamples; ++sample) {
    const double start = now();
    for (int i = 0; i < kRepeats; ++i) kernel();
    best = std::min(best, (now() - start) / kRepeats);
  }
  std::printf("%-22s %6d  %8.0f ns  %6.2f elements/ns\n", name, width, best * 1e9, width / (best * 1e9));
}

void bench(int32_t width) {
  std::vector<float> x(static_cast<size_t>(width)), w(x), y(x);
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = static_cast<float>(i * 7919 % 997) / 99.0f - 5.0f;
    w[i] = 1.0f + static_cast<float>(i % 13) / 13.0f;
  }
  const AlignedBytes row = aligned_bytes(activation_row_bytes(ActivationFormat::kF32, width));
  const PointwiseKernels& pointwise = pointwise_kernels();
  time("rms_norm", width, [&] { pointwise.rms_norm(x.data(), w.data(), 0, 1e-6f, width, width, y.data()); });
  time("gated silu", width, [&] { pointwise.gated_activation(Activation::kSilu, x.data(), w.data(), width, y.data()); });
  time("gated gelu_tanh", width, [&] { pointwise.gated_activation(Activation::kGeluTanh, x.data(), w.data(), width, y.data()); });
  time("add", width, [&] { pointwise.add(x.data(), w.data(), width, y.data()); });
  for (const auto format : {ActivationFormat::kInt8Group32, ActivationFormat::kInt8Group256}) {
    const bool short_groups = format == ActivationFormat::kInt8Group32;
    time(short_groups ? "quantize groups of 32" : "quantize groups of 256", width,
         [&] { linear_kernels().quantize_row(x.data(), width, format, row.get()); });
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s WIDTH...\n", argv[0]);
    return 2;
  }
  std::printf("path %s\n", isa_name(active_isa()).data());
  for (int i = 1; i < argc; ++i) bench(std::atoi(argv[i]));
}
