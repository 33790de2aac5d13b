// Binds the pointwise kernels on whole arrays, for tests and for callers outside of a program.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>

#include "kernels/pointwise.h"
#include "platform/float_environment.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace tokenmill;

namespace {

using Input = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

template <class A, class B>
void require_same_shape(const A& a, const B& b) {
  require(a.shape(0) == b.shape(0) && a.shape(1) == b.shape(1), "arrays must have one shape");
}

void rms_norm(const Input& x, const Vector& weight, const Output& out, float eps, float weight_offset) {
  require_same_shape(x, out);
  const size_t width = x.shape(1), group = weight.shape(0);
  require(group > 0 && width % group == 0, "rows must be whole groups of the weight's length");
  const FloatEnvironment environment;
  for (size_t r = 0; r < x.shape(0); ++r) {
    pointwise_kernels().rms_norm(x.data() + r * width, weight.data(), weight_offset, eps, static_cast<int32_t>(width),
                                 static_cast<int32_t>(group), out.data() + r * width);
  }
}

void gated_activation(int activation, const Input& gate, const Input& up, const Output& out) {
  require_same_shape(gate, up);
  require_same_shape(gate, out);
  require(activation >= 0 && activation <= 2, "activation must be 0 (silu), 1 (gelu) or 2 (gelu_tanh)");
  const size_t width = gate.shape(1);
  const FloatEnvironment environment;
  for (size_t r = 0; r < gate.shape(0); ++r) {
    pointwise_kernels().gated_activation(static_cast<Activation>(activation), gate.data() + r * width, up.data() + r * width,
                                         static_cast<int32_t>(width), out.data() + r * width);
  }
}

void softcap(const Input& x, float cap, const Output& out) {
  require_same_shape(x, out);
  require(cap > 0, "cap must be positive");
  const size_t width = x.shape(1);
  const FloatEnvironment environment;
  for (size_t r = 0; r < x.shape(0); ++r) {
    pointwise_kernels().softcap(x.data() + r * width, cap, static_cast<int32_t>(width), out.data() + r * width);
  }
}

}  // namespace

void bind_pointwise(nb::module_& m) {
  m.def("rms_norm", &rms_norm, "x"_a, "weight"_a, "out"_a, "eps"_a, "weight_offset"_a = 0.0f,
        "x / sqrt(mean(x^2) + eps) * (weight + weight_offset) over groups of len(weight) elements of each row.");
  m.def("gated_activation", &gated_activation, "activation"_a, "gate"_a, "up"_a, "out"_a,
        "activation(gate) * up; activation 0 is SiLU, 1 GELU, 2 GELU by tanh.");
  m.def("softcap", &softcap, "x"_a, "cap"_a, "out"_a, "cap * tanh(x / cap).");
}
