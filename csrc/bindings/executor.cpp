// Binds the program executor: typed builder calls, run, and views of its memory.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "executor/executor.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace tokenmill;

namespace {

using Words = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Id = Executor::ValueId;

std::span<const float> as_span(const Floats& array) { return {array.data(), array.shape(0)}; }

// The words of a step plan. Finding the memory of a Python array costs as much as a small kernel; one plan serves many
// steps.
struct PlanWords {
  Words array;
  std::span<const int32_t> span() const { return {array.data(), array.shape(0)}; }
};

// A packed matrix, and the array that keeps its memory alive.
struct Matrix {
  PackedWeight weight;
  Bytes data;
};

struct Part {
  Id x;
  Matrix matrix;
  Id out;
  std::optional<Floats> bias;
  std::optional<Id> residual;
};

// The executor and the Python arrays whose memory it reads.
struct BoundExecutor {
  Executor executor;
  std::vector<Bytes> matrices;
  std::vector<Floats> vectors;

  BoundExecutor(int32_t tokens, int32_t sequences, int32_t sampled, int32_t context, int32_t vocab_size,
                std::shared_ptr<ThreadPool> pool)
      : executor({tokens, sequences, sampled, context}, vocab_size, std::move(pool)) {}

  void add_linear_group(const std::vector<Part>& parts) {
    std::vector<Executor::Part> lowered;
    for (const Part& part : parts) lowered.push_back(kept(part));
    executor.add_linear_group(lowered);
  }

  void add_screened_head(const Part& part, const Matrix& screen, const Floats& bounds) {
    executor.add_screened_head(kept(part), screen.weight, screen.data.shape(0), as_span(bounds));
    matrices.push_back(screen.data);
    vectors.push_back(bounds);
  }

  // The operand, its arrays kept alive.
  Executor::Part kept(const Part& part) {
    matrices.push_back(part.matrix.data);
    if (part.bias) vectors.push_back(*part.bias);
    return {part.x, part.matrix.weight, part.matrix.data.shape(0), part.out,
            part.bias ? as_span(*part.bias) : std::span<const float>{}, part.residual};
  }
};

// `rows` rows of a value in place, [rows, width] floats or [rows, row bytes] bytes; keeps the executor alive.
nb::object value_view(nb::handle self, Id id, int32_t rows) {
  const Executor& executor = nb::cast<BoundExecutor&>(self).executor;
  const Value& value = executor.value(id);
  const int32_t most = value.sampled ? executor.limits().sampled : executor.limits().tokens;
  if (rows < 0 || rows > most) throw std::invalid_argument("a value has at most " + std::to_string(most) + " rows");
  const size_t height = static_cast<size_t>(rows);
  if (value.format == ActivationFormat::kF32) {
    const size_t width = static_cast<size_t>(value.width);
    const int64_t stride = static_cast<int64_t>(value.row_bytes / sizeof(float));
    return nb::cast(nb::ndarray<nb::numpy, float>(executor.memory(id), {height, width}, self, {stride, 1}));
  }
  return nb::cast(nb::ndarray<nb::numpy, uint8_t>(executor.memory(id), {height, value.row_bytes}, self));
}

// One plane of a KV group in place, [pages, layers, kv_heads, page tokens * head_dim]; 16-bit elements as uint16.
nb::object kv_plane(nb::handle self, int32_t group, int32_t plane) {
  const KvCache& cache = nb::cast<BoundExecutor&>(self).executor.cache();
  const KvGroup& g = cache.group(group);
  const size_t shape[4] = {static_cast<size_t>(g.pages), static_cast<size_t>(g.layers), static_cast<size_t>(g.kv_heads),
                           static_cast<size_t>(kPageTokens) * static_cast<size_t>(g.head_dim)};
  uint8_t* data = cache.plane(group, plane);
  if (g.element == KvElement::kF32) return nb::cast(nb::ndarray<nb::numpy, float>(data, 4, shape, self));
  return nb::cast(nb::ndarray<nb::numpy, uint16_t>(data, 4, shape, self));
}

}  // namespace

void bind_executor(nb::module_& m) {
  m.def("value_row_bytes",
        [](int format, int32_t width) { return activation_row_bytes(static_cast<ActivationFormat>(format), width); },
        "format"_a, "width"_a, "Bytes of one row of a value; a multiple of 64.");

  nb::class_<Matrix>(m, "Matrix", "A packed weight matrix [n, k] (csrc/kernels/linear.h).")
      .def("__init__", [](Matrix* self, int format, int32_t n, int32_t k, const Bytes& data) {
        new (self) Matrix{{static_cast<WeightFormat>(format), n, k, data.data()}, data};
      }, "format"_a, "n"_a, "k"_a, "data"_a);

  nb::class_<Part>(m, "LinearPart", "out = x @ matrix.T (+ bias) (+ residual); values by the ids of add_value.")
      .def("__init__", [](Part* self, Id x, const Matrix& matrix, Id out, std::optional<Floats> bias, std::optional<Id> residual) {
        new (self) Part{x, matrix, out, std::move(bias), residual};
      }, "x"_a, "matrix"_a, "out"_a, "bias"_a.none(), "residual"_a.none());

  nb::class_<PlanWords>(m, "PlanWords", "The buffer of a step plan, in place.").def(nb::init<Words>(), "buffer"_a);

  nb::class_<BoundExecutor>(m, "Executor", "Runs a program, step by step. Build it op by op, prepare it, run it.")
      .def(nb::init<int32_t, int32_t, int32_t, int32_t, int32_t, std::shared_ptr<ThreadPool>>(), "tokens"_a, "sequences"_a,
           "sampled"_a, "context"_a, "vocab_size"_a, "pool"_a)
      .def("add_kv_group", [](BoundExecutor& self, int32_t layers, int32_t kv_heads, int32_t head_dim, std::optional<int32_t> window,
                              int element, int32_t pages) {
        return self.executor.add_kv_group({layers, kv_heads, head_dim, window.value_or(0), static_cast<KvElement>(element), pages});
      }, "layers"_a, "kv_heads"_a, "head_dim"_a, "window"_a.none(), "element"_a, "pages"_a)
      .def("add_value", [](BoundExecutor& self, size_t offset, size_t row_bytes, int32_t width, int format, bool sampled) {
        return self.executor.add_value({offset, row_bytes, width, static_cast<ActivationFormat>(format), sampled});
      }, "offset"_a, "row_bytes"_a, "width"_a, "format"_a, "sampled"_a)
      .def("add_embed", [](BoundExecutor& self, const Matrix& matrix, Id out, float scale) {
        self.executor.add_embed(matrix.weight, matrix.data.shape(0), out, scale);
        self.matrices.push_back(matrix.data);
      }, "matrix"_a, "out"_a, "scale"_a)
      .def("add_rms_norm", [](BoundExecutor& self, Id x, const Floats& weight, std::optional<Id> out, std::vector<Id> quantized,
                              float eps, int32_t group_width, float weight_offset) {
        self.executor.add_rms_norm(x, as_span(weight), {out, std::move(quantized)}, eps, group_width, weight_offset);
        self.vectors.push_back(weight);
      }, "x"_a, "weight"_a, "out"_a.none(), "quantized"_a, "eps"_a, "group_width"_a, "weight_offset"_a)
      .def("add_linear_group", &BoundExecutor::add_linear_group, "parts"_a)
      .def("add_screened_head", &BoundExecutor::add_screened_head, "part"_a, "screen"_a, "bounds"_a,
           "A linear of which plans may want only each row's largest result; screen and bounds as make_screen gives them.")
      .def("add_rope", [](BoundExecutor& self, Id x, Id out, int32_t heads, int32_t head_dim, int32_t rotary_dim, int style,
                          std::vector<double> frequencies, double magnitude) {
        self.executor.add_rope(x, out, {heads, head_dim, rotary_dim, static_cast<RopeStyle>(style)}, std::move(frequencies), magnitude);
      }, "x"_a, "out"_a, "heads"_a, "head_dim"_a, "rotary_dim"_a, "style"_a, "frequencies"_a, "magnitude"_a)
      .def("add_attention", [](BoundExecutor& self, Id q, Id k, Id v, std::optional<Id> out, std::vector<Id> quantized, int32_t layer,
                               int32_t group, int32_t heads, double scale, std::optional<double> softcap) {
        self.executor.add_attention(q, k, v, {out, std::move(quantized)}, layer, group, heads, scale, softcap.value_or(0.0));
      }, "q"_a, "k"_a, "v"_a, "out"_a.none(), "quantized"_a, "layer"_a, "group"_a, "heads"_a, "scale"_a, "softcap"_a.none())
      .def("add_gated_activation", [](BoundExecutor& self, Id gate, Id up, std::optional<Id> out, std::vector<Id> quantized, int activation) {
        self.executor.add_gated_activation(gate, up, {out, std::move(quantized)}, static_cast<Activation>(activation));
      }, "gate"_a, "up"_a, "out"_a.none(), "quantized"_a, "activation"_a)
      .def("add_add", [](BoundExecutor& self, Id a, Id b, Id out) { self.executor.add_add(a, b, out); }, "a"_a, "b"_a, "out"_a)
      .def("add_softcap", [](BoundExecutor& self, Id x, Id out, float cap) { self.executor.add_softcap(x, out, cap); },
           "x"_a, "out"_a, "cap"_a)
      .def("add_gather_sampled", [](BoundExecutor& self, Id x, Id out) { self.executor.add_gather_sampled(x, out); }, "x"_a, "out"_a)
      .def("add_quantize", [](BoundExecutor& self, Id x, Id out) { self.executor.add_quantize(x, out); }, "x"_a, "out"_a)
      .def("prepare", [](BoundExecutor& self) { self.executor.prepare(); })
      .def("run", [](BoundExecutor& self, const PlanWords& plan, int32_t first, int32_t last) {
        const nb::gil_scoped_release release;
        self.executor.run(plan.span(), first, last);
      }, "plan"_a, "first"_a, "last"_a, "Executes ops [first, last) without the GIL. Raises ValueError for a bad plan.")
      .def("run_timed", [](BoundExecutor& self, const PlanWords& plan) {
        Executor::Times times;
        {
          const nb::gil_scoped_release release;
          times = self.executor.run_timed(plan.span());
        }
        const ThreadPool::ForkTimes& forks = times.forks;
        return nb::make_tuple(std::move(times.laps), forks.forks, forks.joining, forks.waiting);
      }, "plan"_a, "Executes all ops without the GIL; seconds of preparing the step, then of each op; how many forks there\n"
                   "were, the seconds that they took beside their longest shares, and thread-seconds without work in them.",
           nb::sig("def run_timed(self, plan: PlanWords) -> tuple[list[float], int, float, float]"))
      .def("diagnose", [](BoundExecutor& self, const PlanWords& plan, int32_t row) {
        const nb::gil_scoped_release release;
        return self.executor.diagnose(plan.span(), row);
      }, "plan"_a, "row"_a, "Index of the first op with a non-finite result, or -1.")
      .def("value", [](nb::handle self, Id id, int32_t rows) { return value_view(self, id, rows); }, "id"_a, "rows"_a)
      .def("kv_plane", [](nb::handle self, int32_t group, int32_t plane) { return kv_plane(self, group, plane); }, "group"_a, "plane"_a)
      .def("copy_page", [](BoundExecutor& self, int32_t group, int32_t from, int32_t to) {
        self.executor.cache().copy_page(group, from, to);
      }, "group"_a, "from_page"_a, "to_page"_a)
      .def_prop_ro("screen_counts", [](const BoundExecutor& self) {
        const ScreenCounts counts = self.executor.screen_counts();
        return nb::make_tuple(counts.rows, counts.blocks, counts.plain_steps);
      }, "Rows that the head's screen has served, row blocks of the head that they read beside it, and steps that it left alone.",
           nb::sig("def screen_counts(self) -> tuple[int, int, int]"))
      .def_prop_ro("op_count", [](const BoundExecutor& self) { return self.executor.op_count(); })
      .def_prop_ro("threads", [](const BoundExecutor& self) { return self.executor.threads(); })
      .def_prop_ro("scratch_bytes", [](const BoundExecutor& self) { return self.executor.scratch_bytes(); })
      .def_prop_ro("kv_bytes", [](const BoundExecutor& self) { return self.executor.cache().bytes(); });
}
