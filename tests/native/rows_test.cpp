// Kernels that work on rows, every path against the portable one, bit for bit: pointwise and the sampler's passes.
#include <limits>

#include "kernels/pointwise.h"
#include "kernels/sampler_rows.h"
#include "paths.h"

using namespace tokenmill;

namespace {

constexpr int kWidths[] = {1, 2, 8, 15, 16, 17, 31, 63, 64, 65, 100, 128, 576, 1000};
constexpr int64_t kRowLengths[] = {1, 15, 16, 17, 63, 64, 65, 4095, 4096, 4097, 10000};
constexpr float kInfinity = std::numeric_limits<float>::infinity();

void check_pointwise(Checks& checks, int width, std::mt19937& random) {
  const size_t n = static_cast<size_t>(width);
  const std::string at = " of width " + std::to_string(width);
  // Activations saturate at both ends, and zeros of both signs are among the values.
  std::vector<float> a = normal_floats(n, random, 4.0f), b = normal_floats(n, random);
  for (size_t i = 0; i < n; i += 11) a[i] *= 1e4f;
  for (size_t i = 5; i < n; i += 13) a[i] = i % 2 == 0 ? 0.0f : -0.0f;
  const auto row = [&](const char* name, const auto& kernel) {
    expect_same_on_all_paths(checks, name + at, [&] {
      std::vector<float> y(n), in_place = a;
      kernel(a.data(), y.data());
      kernel(in_place.data(), in_place.data());
      std::vector<uint8_t> bytes;
      append(bytes, y);
      append(bytes, in_place);
      return bytes;
    });
  };
  row("rms_norm", [&](const float* x, float* y) { pointwise_kernels().rms_norm(x, b.data(), 1.0f, 1e-6f, width, width, y); });
  if (width % 4 == 0) {
    row("rms_norm of groups", [&](const float* x, float* y) { pointwise_kernels().rms_norm(x, b.data(), 0.0f, 1e-6f, width, width / 4, y); });
  }
  for (Activation activation : {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh}) {
    row("gated_activation", [&](const float* x, float* y) { pointwise_kernels().gated_activation(activation, x, b.data(), width, y); });
  }
  row("add", [&](const float* x, float* y) { pointwise_kernels().add(x, b.data(), width, y); });
  row("scale", [&](const float* x, float* y) { pointwise_kernels().scale(x, 1.7f, width, y); });
  row("softcap", [&](const float* x, float* y) { pointwise_kernels().softcap(x, 30.0f, width, y); });
  for (RopeStyle style : {RopeStyle::kHalf, RopeStyle::kInterleaved}) {
    for (int rotary : {width / 2 * 2, width / 4 * 2}) {
      if (rotary == 0) continue;
      const RopeArguments arguments{1, width, rotary, style};
      row("rope", [&](const float* x, float* y) { pointwise_kernels().rope(arguments, x, b.data(), y); });
    }
  }
}

void check_sampler_rows(Checks& checks, int64_t length, std::mt19937& random) {
  const size_t n = static_cast<size_t>(length);
  const size_t blocks = (n + kMaximaBlock - 1) / kMaximaBlock, sums = (n + kSumBlock - 1) / kSumBlock;
  const std::string at = " of " + std::to_string(length);
  std::vector<float> x = normal_floats(n, random, 5.0f);
  for (size_t i = 3; i < n; i += 17) x[i] = -kInfinity;  // masked tokens
  float shift = x[0];
  for (float value : x) shift = value > shift ? value : shift;
  const auto maxima = [&](const std::vector<float>& row) {
    expect_same_on_all_paths(checks, "block_maxima" + at, [&] {
      std::vector<float> out(blocks);
      const bool usable = sampler_rows().block_maxima(row.data(), length, out.data());
      std::vector<uint8_t> bytes(1, usable ? 1 : 0);
      if (usable) append(bytes, out);
      return bytes;
    });
  };
  maxima(x);
  for (float bad : {kInfinity, std::numeric_limits<float>::quiet_NaN()}) {
    std::vector<float> broken = x;
    broken[n - 1] = bad;
    maxima(broken);
  }
  expect_same_on_all_paths(checks, "sampler passes" + at, [&] {
    const SamplerRows& kernels = sampler_rows();
    std::vector<float> weights(n), sum(sums), only_sums(sums), keys(n);
    kernels.weights(x.data(), length, shift, 1.3f, 0.0f, weights.data(), sum.data());
    kernels.weights(x.data(), length, shift, 1.3f, 0.0f, nullptr, only_sums.data());
    std::vector<uint8_t> bytes;
    append(bytes, weights);
    append(bytes, sum);
    append(bytes, only_sums);
    append(bytes, std::vector<double>{kernels.mean_distance(x.data(), weights.data(), length, shift)});
    kernels.centered_keys(x.data(), weights.data(), length, shift, 0.9f, -2.5f, keys.data());
    append(bytes, keys);
    const float thresholds[kThresholds] = {-kInfinity, -20.0f, -5.0f, -2.5f, -1.0f, -0.5f, 0.0f, 1.0f};
    std::vector<double> reached(kThresholds);
    kernels.above(keys.data(), weights.data(), length, thresholds, reached.data());
    append(bytes, reached);
    kernels.above(keys.data(), nullptr, length, thresholds, reached.data());
    append(bytes, reached);
    for (const int64_t most : {length, length / 3}) {
      std::vector<float> some_keys(n + 16), some_weights(n + 16);
      std::vector<int32_t> ids(n + 16);
      int64_t count = kernels.gather(keys.data(), weights.data(), nullptr, length, -5.0f, -0.5f, most, some_keys.data(), some_weights.data(), ids.data());
      append(bytes, std::vector<int64_t>{count});
      if (count >= 0) {
        count = kernels.gather(some_keys.data(), some_weights.data(), ids.data(), count, -3.0f, -0.5f, count, some_keys.data(), some_weights.data(), ids.data());
      }
      append(bytes, some_keys);
      append(bytes, some_weights);
      append(bytes, ids);
    }
    for (const int64_t last : {int64_t{-1}, int64_t{0}, length / 2, length}) {
      kernels.drop_after(keys.data(), length, keys[n / 2], last, weights.data(), sum.data());
      append(bytes, weights);
      append(bytes, sum);
    }
    kernels.weights(x.data(), length, shift, 1.3f, 0.01f, weights.data(), sum.data());
    append(bytes, weights);
    append(bytes, sum);
    return bytes;
  });
}

}  // namespace

int main() {
  Checks checks;
  std::mt19937 random(3);
  print_paths();
  for (int width : kWidths) check_pointwise(checks, width, random);
  for (int64_t length : kRowLengths) check_sampler_rows(checks, length, random);
  return checks.finish();
}
