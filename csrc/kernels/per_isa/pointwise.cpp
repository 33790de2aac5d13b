#include "kernels/pointwise.h"

#include "kernels/elementary.h"
#include "kernels/simd.h"

namespace tokenmill::TM_ISA {
namespace {

TM_INLINE int32_t lanes_left(int32_t index, int32_t width) { return width - index < kLanes ? width - index : kLanes; }

// How a vector of a row is read and written: whole, or the first lanes of the last one. Whole vectors need no masks, which
// cost as much as a simple kernel's arithmetic.
struct WholeLanes {
  TM_INLINE F32x16 read(const float* p) const { return load(p); }
  TM_INLINE void write(float* p, F32x16 x) const { store(p, x); }
};
struct FirstLanes {
  int count;
  TM_INLINE F32x16 read(const float* p) const { return load_first(p, count); }
  TM_INLINE void write(float* p, F32x16 x) const { store_first(p, x, count); }
};

// body(i, lanes) for every 16 elements of a row, i being the first of them.
template <class Body>
TM_INLINE void for_vectors(int32_t width, Body body) {
  int32_t i = 0;
  for (; i + kLanes <= width; i += kLanes) body(i, WholeLanes{});
  if (i < width) body(i, FirstLanes{width - i});
}

// Sum of squares in 64 virtual lanes: element i goes to lane i mod 64, then one tree. Masked lanes add 0.
float sum_of_squares(const float* x, int32_t width) {
  F32x16 lanes[4] = {zero_f32(), zero_f32(), zero_f32(), zero_f32()};
  int32_t i = 0;
  for (; i + 64 <= width; i += 64) {
    for (int j = 0; j < 4; ++j) {
      const F32x16 v = load(x + i + 16 * j);
      lanes[j] = fma(v, v, lanes[j]);
    }
  }
  for (int j = 0; i < width; ++j, i += kLanes) {
    const F32x16 v = load_first(x + i, lanes_left(i, width));
    lanes[j] = fma(v, v, lanes[j]);
  }
  return reduce_add(add(add(lanes[0], lanes[2]), add(lanes[1], lanes[3])));
}

void rms_norm(const float* x, const float* weight, float weight_offset, float eps, int32_t width, int32_t group_width,
              float* y) {
  const F32x16 offset = set1(weight_offset);
  for (int32_t group = 0; group < width; group += group_width) {
    const float mean = sum_of_squares(x + group, group_width) / static_cast<float>(group_width);
    const F32x16 inverse = set1(1.0f / __builtin_sqrtf(mean + eps));
    for_vectors(group_width, [&](int32_t i, auto lanes) {
      const F32x16 gain = add(lanes.read(weight + i), offset);
      lanes.write(y + group + i, mul(mul(lanes.read(x + group + i), inverse), gain));
    });
  }
}

void rope(const RopeArguments& arguments, const float* x, const float* angles, float* y) {
  const int32_t half = arguments.rotary_dim / 2;
  const float* cosines = angles;
  const float* sines = angles + half;
  for (int32_t head = 0; head < arguments.heads; ++head, x += arguments.head_dim, y += arguments.head_dim) {
    if (arguments.style == RopeStyle::kHalf) {
      for_vectors(half, [&](int32_t i, auto lanes) {
        const F32x16 a = lanes.read(x + i), b = lanes.read(x + half + i);
        const F32x16 c = lanes.read(cosines + i), s = lanes.read(sines + i);
        lanes.write(y + i, sub(mul(a, c), mul(b, s)));
        lanes.write(y + half + i, add(mul(b, c), mul(a, s)));
      });
    } else {
      for (int32_t i = 0; i < half; ++i) {
        const float a = x[2 * i], b = x[2 * i + 1];
        const float real = a * cosines[i] - b * sines[i];
        const float imaginary = b * cosines[i] + a * sines[i];
        y[2 * i] = real;
        y[2 * i + 1] = imaginary;
      }
    }
    for (int32_t i = arguments.rotary_dim; i < arguments.head_dim; ++i) y[i] = x[i];
  }
}

// x / (1 + e^-x)
TM_INLINE F32x16 silu(F32x16 x) { return div(x, add(set1(1.0f), exp(sub(zero_f32(), x)))); }

// 0.5 x (1 + tanh(u)) = x / (1 + e^-2u), u = sqrt(2/pi) (x + 0.044715 x^3)
TM_INLINE F32x16 gelu_tanh(F32x16 x) {
  const F32x16 inner = fma(mul(mul(x, x), set1(0.044715f)), x, x);
  return div(x, add(set1(1.0f), exp(mul(inner, set1(-1.5957691216057308f)))));
}

// x times the normal distribution function.
TM_INLINE F32x16 gelu(F32x16 x) {
  const F32x16 tail = normal_tail(abs(x));
  return mul(x, select_less(x, zero_f32(), tail, sub(set1(1.0f), tail)));
}

template <class Function>
TM_INLINE void gate_row(const float* gate, const float* up, int32_t width, float* y, Function activation) {
  for_vectors(width, [&](int32_t i, auto lanes) { lanes.write(y + i, mul(activation(lanes.read(gate + i)), lanes.read(up + i))); });
}

void gated_activation(Activation activation, const float* gate, const float* up, int32_t width, float* y) {
  switch (activation) {
    case Activation::kSilu:
      return gate_row(gate, up, width, y, [](F32x16 x) { return silu(x); });
    case Activation::kGelu:
      return gate_row(gate, up, width, y, [](F32x16 x) { return gelu(x); });
    case Activation::kGeluTanh:
      return gate_row(gate, up, width, y, [](F32x16 x) { return gelu_tanh(x); });
  }
}

void add_rows(const float* a, const float* b, int32_t width, float* y) {
  for_vectors(width, [&](int32_t i, auto lanes) { lanes.write(y + i, add(lanes.read(a + i), lanes.read(b + i))); });
}

void scale_row(const float* x, float factor, int32_t width, float* y) {
  for_vectors(width, [&](int32_t i, auto lanes) { lanes.write(y + i, mul(lanes.read(x + i), set1(factor))); });
}

void softcap_row(const float* x, float cap, int32_t width, float* y) {
  for_vectors(width, [&](int32_t i, auto lanes) { lanes.write(y + i, mul(set1(cap), tanh(div(lanes.read(x + i), set1(cap))))); });
}

}  // namespace

extern const PointwiseKernels pointwise_kernels_table = {
    rms_norm, rope, gated_activation, add_rows, scale_row, softcap_row,
};

}  // namespace tokenmill::TM_ISA
