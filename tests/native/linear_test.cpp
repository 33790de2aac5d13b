// Linear, every available path against the portable one, bit for bit: all formats, row counts and odd shapes.
//
// Runs without Python, so under sanitizers and for other processors. All buffers have their exact size, so that an
// address sanitizer sees any read or write past an end; strides are larger than rows where the interface allows it.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "kernels/linear.h"
#include "paths.h"
#include "platform/thread_pool.h"

using namespace tokenmill;

namespace {

constexpr int kRowCounts[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 31, 32, 33, 64, 127};
constexpr int kMostRows = 127;

// Random rows in the file's layout. fp16 fields get small finite values; all other bits are random.
std::vector<uint8_t> random_source(WeightFormat format, int n, int k, std::mt19937& random) {
  std::vector<uint8_t> source(static_cast<size_t>(n) * source_row_bytes(format, k));
  for (uint8_t& byte : source) byte = static_cast<uint8_t>(random());
  const auto half = [&](uint8_t* p) {  // +-0.0001 .. 0.06, now and then zero or subnormal
    const uint32_t r = random();
    const uint16_t bits = r % 16 == 0 ? static_cast<uint16_t>(r >> 8 & 0x83ff) : static_cast<uint16_t>((r >> 16 & 0x8000) | (0x0700 + (r >> 8 & 0x24ff)));
    std::memcpy(p, &bits, 2);
  };
  if (activation_format(format) == ActivationFormat::kF32) {
    const size_t width = format == WeightFormat::kF32 ? 4 : 2;
    for (size_t at = 0; at < source.size(); at += width) {
      const float value = static_cast<float>(static_cast<int32_t>(random())) * 0x1p-31f;
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      if (format == WeightFormat::kF32) {
        std::memcpy(&source[at], &bits, 4);
      } else if (format == WeightFormat::kBf16) {
        std::memcpy(&source[at], reinterpret_cast<const uint8_t*>(&bits) + 2, 2);
      } else {
        half(&source[at]);
      }
    }
    return source;
  }
  const ChunkLayout layout = chunk_layout(format);
  const size_t size = layout.source_bytes;
  for (size_t at = 0; at < source.size(); at += size) {
    switch (format) {
      case WeightFormat::kQ2K: half(&source[at + 80]); half(&source[at + 82]); break;
      case WeightFormat::kQ3K: half(&source[at + 108]); break;
      case WeightFormat::kQ6K: half(&source[at + 208]); break;
      default:
        half(&source[at]);
        if (layout.has_minimum) half(&source[at + 2]);
    }
  }
  return source;
}

// The first row gets the largest codes and scales that the format has, the second one of Q6_K the smallest.
void set_extremes(WeightFormat format, int k, std::vector<uint8_t>& source) {
  if (activation_format(format) != ActivationFormat::kInt8Group256) return;
  const size_t size = chunk_layout(format).source_bytes, row = source_row_bytes(format, k);
  for (size_t at = 0; at < row; at += size) {
    switch (format) {
      case WeightFormat::kQ4K: std::memset(&source[at + 4], 0xff, 140); break;
      case WeightFormat::kQ5K: std::memset(&source[at + 4], 0xff, 172); break;
      case WeightFormat::kQ6K:
        std::memset(&source[at], 0xff, 192);
        std::memset(&source[at + 192], 0x7f, 16);
        std::memset(&source[row + at], 0, 192);
        std::memset(&source[row + at + 192], 0x80, 16);
        break;
      default: break;
    }
  }
}

// Activations whose codes have one sign in 16 columns and in 32 and sum to `sum` there, as far as 16 columns of 127 go.
void set_sums(float* x, int k, int sum) {
  for (int i = 0; i < k; ++i) {
    const int place = i % 32, left = sum - place * 127;
    x[i] = static_cast<float>(std::clamp(left, 0, 127)) * (i / 32 % 3 == 2 ? -1.0f : 1.0f);
  }
}

struct Case {
  PackedWeight weight;
  AlignedBytes packed;
  std::vector<float> x;  // [kMostRows, k]
  std::vector<float> bias, residual;
};

Case make_case(WeightFormat format, int n, int k, std::mt19937& random) {
  Case c;
  std::vector<uint8_t> source = random_source(format, n, k, random);
  set_extremes(format, k, source);
  const size_t bytes = packed_bytes(format, n, k);
  c.packed = aligned_bytes(bytes);
  pack_rows(format, source.data(), n, k, c.packed.get(), 0, (n + 15) / 16);
  c.weight = {format, n, k, c.packed.get()};
  std::normal_distribution<float> normal;
  c.x.resize(static_cast<size_t>(kMostRows) * static_cast<size_t>(k));
  for (float& value : c.x) value = normal(random) * (random() % 97 == 0 ? 30.0f : 1.0f);
  // Around the sums from which on dot products may leave int16: of Q5_K, Q6_K, Q4_K, and the largest ones.
  int row = 4;
  for (int sum : {1023, 1024, 1057, 1058, 2032, 2184, 2185, 4064}) set_sums(c.x.data() + static_cast<size_t>(row++) * static_cast<size_t>(k), k, sum);
  c.bias.resize(static_cast<size_t>(n));
  for (float& value : c.bias) value = normal(random);
  c.residual.resize(static_cast<size_t>(kMostRows) * static_cast<size_t>(n));
  for (float& value : c.residual) value = normal(random);
  return c;
}

enum class Extras { kNone, kBiasAndResidual, kInPlaceResidual };

// [rows, n] of the path in use.
std::vector<float> multiply(const Case& c, int rows, Extras extras = Extras::kNone, int threads = 1, size_t extra_stride = 0) {
  const LinearKernels& kernels = linear_kernels();
  const int n = c.weight.n, k = c.weight.k;
  const ActivationFormat activation = activation_format(c.weight.format);
  const size_t row_bytes = activation_row_bytes(activation, k), stride = row_bytes + extra_stride;
  const AlignedBytes x = aligned_bytes(static_cast<size_t>(rows - 1) * stride + row_bytes);
  std::vector<float> y(static_cast<size_t>(rows) * static_cast<size_t>(n), std::numeric_limits<float>::quiet_NaN());
  LinearArguments arguments{c.weight, x.get(), stride, rows, nullptr, nullptr, n, y.data(), n};
  if (extras != Extras::kNone) arguments.bias = c.bias.data();
  if (extras == Extras::kBiasAndResidual) arguments.residual = c.residual.data();
  if (extras == Extras::kInPlaceResidual) {
    std::memcpy(y.data(), c.residual.data(), y.size() * 4);
    arguments.residual = y.data();
  }
  ThreadPool pool(threads);
  std::vector<AlignedBytes> scratch;
  for (int i = 0; i < threads; ++i) scratch.push_back(aligned_bytes(linear_scratch_bytes()));
  pool.run([&](int index, int count) {
    const auto [begin, end] = ThreadPool::share(rows, index, count);
    for (int64_t i = begin; i < end; ++i) kernels.quantize_row(c.x.data() + i * k, k, activation, x.get() + static_cast<size_t>(i) * stride);
  });
  pool.run([&](int index, int count) {
    const auto [begin, end] = ThreadPool::share((n + 15) / 16, index, count);
    kernels.linear(arguments, static_cast<int32_t>(begin), static_cast<int32_t>(end), scratch[static_cast<size_t>(index)].get());
  });
  return y;
}

bool same_bits(const std::vector<float>& a, const float* b) { return std::memcmp(a.data(), b, a.size() * 4) == 0; }

std::vector<float> decode_all(const Case& c) {
  std::vector<float> out(static_cast<size_t>(c.weight.n) * static_cast<size_t>(c.weight.k));
  for (int row = 0; row < c.weight.n; ++row) linear_kernels().decode_row(c.weight, row, out.data() + static_cast<size_t>(row) * static_cast<size_t>(c.weight.k));
  return out;
}

// A caller that rounds upwards and flushes denormals must not change a bit (the pool sets and restores the state).
bool disturbed_environment_gives(const Case& c, const std::vector<float>& want) {
#if defined(__x86_64__)
  const unsigned saved = _mm_getcsr();
  _mm_setcsr(0x1F80U | 0x8040U | 0x4000U);
  const std::vector<float> y = multiply(c, 5, Extras::kNone, 2);
  const bool restored = (_mm_getcsr() & ~0x3fU) == ((0x1F80U | 0x8040U | 0x4000U) & ~0x3fU);
  _mm_setcsr(saved);
  return restored && same_bits(y, want.data());
#else
  return same_bits(multiply(c, 5, Extras::kNone, 2), want.data());
#endif
}

// Row `row` of x as the kernels see it: quantized and decoded again.
std::vector<float> activation_row(const Case& c, int row) {
  const int k = c.weight.k;
  const ActivationFormat activation = activation_format(c.weight.format);
  const float* x = c.x.data() + static_cast<size_t>(row) * static_cast<size_t>(k);
  if (activation == ActivationFormat::kF32) return {x, x + k};
  const ActivationLayout layout = activation_layout(activation, k);
  const AlignedBytes quantized = aligned_bytes(layout.bytes);
  linear_kernels().quantize_row(x, k, activation, quantized.get());
  std::vector<float> out(static_cast<size_t>(k));
  for (int i = 0; i < k; ++i) {
    float scale;
    std::memcpy(&scale, quantized.get() + layout.scales + static_cast<size_t>(i / (activation == ActivationFormat::kInt8Group32 ? 32 : 256)) * 4, 4);
    out[static_cast<size_t>(i)] = scale * static_cast<float>(static_cast<int8_t>(quantized[static_cast<size_t>(i)]));
  }
  return out;
}

// The largest difference from a double-precision product of the decoded weights, relative to the largest output.
double error_against_double(const Case& c, const std::vector<float>& y, int rows) {
  const std::vector<float> w = decode_all(c);
  const size_t n = static_cast<size_t>(c.weight.n), k = static_cast<size_t>(c.weight.k);
  double worst = 0, largest = 0;
  for (size_t m = 0; m < static_cast<size_t>(rows); ++m) {
    const std::vector<float> x = activation_row(c, static_cast<int>(m));
    for (size_t i = 0; i < n; ++i) {
      double sum = 0;
      for (size_t j = 0; j < k; ++j) sum += static_cast<double>(x[j]) * static_cast<double>(w[i * k + j]);
      worst = std::max(worst, std::abs(sum - static_cast<double>(y[m * n + i])));
      largest = std::max(largest, std::abs(sum));
    }
  }
  return worst / largest;
}

void check_case(Checks& checks, const Case& c, const std::string& name) {
  const size_t n = static_cast<size_t>(c.weight.n);
  set_active_isa(Isa::kPortable);
  const std::vector<float> want = multiply(c, kMostRows), decoded = decode_all(c);
  const std::vector<float> want_extras = multiply(c, 20, Extras::kBiasAndResidual);
  const double error = error_against_double(c, want, 4);
  checks.expect(error < 1e-5, name + " error " + std::to_string(error));
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!isa_available(isa)) continue;
    set_active_isa(isa);
    const std::string where = name + " " + std::string(isa_name(isa));
    const std::vector<float> now = decode_all(c);
    checks.expect(std::memcmp(now.data(), decoded.data(), now.size() * 4) == 0, where + " decode_row");
    for (int rows : kRowCounts) checks.expect(same_bits(multiply(c, rows), want.data()), where + " rows " + std::to_string(rows));
    checks.expect(same_bits(multiply(c, 33, Extras::kNone, 3), want.data()), where + " three threads");
    checks.expect(same_bits(multiply(c, 7, Extras::kNone, 1, 192), want.data()), where + " wide stride");
    checks.expect(same_bits(multiply(c, 20, Extras::kNone, 1, 64), want.data()), where + " wide stride, tiles");
    checks.expect(same_bits(multiply(c, 20, Extras::kBiasAndResidual), want_extras.data()), where + " bias and residual");
    checks.expect(same_bits(multiply(c, 20, Extras::kInPlaceResidual), want_extras.data()), where + " residual in place");
    checks.expect(same_bits(multiply(c, 3, Extras::kInPlaceResidual), want_extras.data()), where + " residual in place, few rows");
    checks.expect(disturbed_environment_gives(c, std::vector<float>(want.begin(), want.begin() + static_cast<long>(5 * n))), where + " disturbed float environment");
  }
}

}  // namespace

int main() {
  Checks checks;
  std::mt19937 random(7);
  print_paths();
  for (int number = 0; number < kWeightFormatCount; ++number) {
    const WeightFormat format = static_cast<WeightFormat>(number);
    const ActivationFormat activation = activation_format(format);
    // Two segments for one shape; short last chunks and odd N where the format has them.
    std::vector<std::pair<int, int>> shapes = {{17, 512}, {5, 2304}};
    if (activation != ActivationFormat::kInt8Group256) shapes.insert(shapes.end(), {{37, 96}, {50, 320}, {1, 32}});
    if (activation == ActivationFormat::kF32) shapes.insert(shapes.end(), {{19, 1}, {33, 301}});
    for (const auto& [n, k] : shapes) {
      const Case c = make_case(format, n, k, random);
      check_case(checks, c, "format " + std::to_string(number) + " [" + std::to_string(n) + ", " + std::to_string(k) + "]");
    }
    try {
      packed_bytes(format, 16, 0);
      checks.expect(false, "k = 0 was accepted");
    } catch (const std::invalid_argument&) {
      checks.expect(true, "");
    }
  }
  return checks.finish();
}
