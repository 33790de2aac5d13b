// Binds weight packing and the Linear kernels.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "kernels/head_screen.h"
#include "kernels/linear.h"
#include "platform/thread_pool.h"

namespace nb = nanobind;
using namespace tokenmill;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using MutableBytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using MutableVector = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

[[noreturn]] void refuse(const std::string& message) { throw nb::value_error(message.c_str()); }

void require(const char* name, size_t got, const char* what, size_t wanted) {
  if (got != wanted) refuse(std::string(name) + " has " + std::to_string(got) + " " + what + ", expected " + std::to_string(wanted));
}

struct AlignedDelete {
  void operator()(uint8_t* p) const { ::operator delete(p, std::align_val_t{64}); }
};
using AlignedBytes = std::unique_ptr<uint8_t[], AlignedDelete>;

AlignedBytes aligned_bytes(size_t bytes) {
  return AlignedBytes(static_cast<uint8_t*>(::operator new(bytes, std::align_val_t{64})));
}

// A numpy array that owns `data`.
template <class Element>
nb::ndarray<nb::numpy, Element> to_numpy(std::unique_ptr<Element[]> data, std::initializer_list<size_t> shape) {
  Element* elements = data.release();
  nb::capsule owner(elements, [](void* p) noexcept { delete[] static_cast<Element*>(p); });
  return nb::ndarray<nb::numpy, Element>(elements, shape, owner);
}

PackedWeight packed_weight(int format, const Bytes& packed, int32_t n, int32_t k) {
  const WeightFormat weight_format = static_cast<WeightFormat>(format);
  require("packed", packed.size(), "bytes", packed_bytes(weight_format, n, k));
  return {weight_format, n, k, packed.data()};
}

void pack_matrix(int format, const Bytes& source, int32_t n, int32_t k, const MutableBytes& out, int threads) {
  const WeightFormat weight_format = static_cast<WeightFormat>(format);
  require("out", out.size(), "bytes", packed_bytes(weight_format, n, k));
  require("source", source.size(), "bytes", static_cast<size_t>(n) * source_row_bytes(weight_format, k));
  const uint8_t* from = source.data();
  uint8_t* to = out.data();
  const nb::gil_scoped_release release;
  ThreadPool pool(threads);
  pool.run([&](int index, int count) {
    const auto [begin, end] = ThreadPool::share((n + kBlockRows - 1) / kBlockRows, index, count);
    pack_rows(weight_format, from, n, k, to, static_cast<int32_t>(begin), static_cast<int32_t>(end));
  });
}

void make_screen_of(int format, const Bytes& packed, int32_t n, int32_t k, const MutableBytes& screen, const MutableVector& bounds, int threads) {
  const PackedWeight head = packed_weight(format, packed, n, k);
  if (!can_screen(head.format)) refuse("a matrix of format " + std::to_string(format) + " cannot be screened");
  require("screen", screen.size(), "bytes", packed_bytes(kScreenFormat, n, k));
  require("bounds", bounds.size(), "elements", static_cast<size_t>(n));
  const nb::gil_scoped_release release;
  ThreadPool pool(threads);
  pool.run([&](int index, int count) {
    const auto [begin, end] = ThreadPool::share((n + kBlockRows - 1) / kBlockRows, index, count);
    make_screen(head, screen.data(), bounds.data(), static_cast<int32_t>(begin), static_cast<int32_t>(end));
  });
}

nb::ndarray<nb::numpy, float> decode_packed_rows(int format, const Bytes& packed, int32_t n, int32_t k, const Rows& rows) {
  const PackedWeight weight = packed_weight(format, packed, n, k);
  const size_t count = rows.size(), width = static_cast<size_t>(k);
  for (size_t i = 0; i < count; ++i) {
    if (rows.data()[i] < 0 || rows.data()[i] >= n) {
      refuse("rows[" + std::to_string(i) + "] = " + std::to_string(rows.data()[i]) + " is not a row of a matrix of " + std::to_string(n) + " rows");
    }
  }
  auto out = std::make_unique<float[]>(count * width);
  {
    const nb::gil_scoped_release release;
    ThreadPool(1).run([&](int, int) {
      for (size_t i = 0; i < count; ++i) linear_kernels().decode_row(weight, rows.data()[i], out.get() + i * width);
    });
  }
  return to_numpy(std::move(out), {count, width});
}

nb::tuple quantize_rows(const Matrix& x, int format) {
  if (format != static_cast<int>(ActivationFormat::kInt8Group32) && format != static_cast<int>(ActivationFormat::kInt8Group256)) {
    refuse("format must be INT8_GROUP32 (1) or INT8_GROUP256 (2), got " + std::to_string(format));
  }
  const ActivationFormat activation = static_cast<ActivationFormat>(format);
  const size_t m = x.shape(0), k = x.shape(1);
  if (k == 0) refuse("x has no columns");
  const size_t group = activation == ActivationFormat::kInt8Group32 ? 32 : 256;
  const size_t sum_columns = activation == ActivationFormat::kInt8Group32 ? 32 : 16;
  const size_t groups = (k + group - 1) / group, sum_count = (k + sum_columns - 1) / sum_columns;
  const ActivationLayout layout = activation_layout(activation, static_cast<int32_t>(k));
  auto codes = std::make_unique<int8_t[]>(m * k);
  auto scales = std::make_unique<float[]>(m * groups);
  auto sums = std::make_unique<int32_t[]>(m * sum_count);
  const AlignedBytes row = aligned_bytes(layout.bytes);
  for (size_t i = 0; i < m; ++i) {
    ThreadPool(1).run([&](int, int) { linear_kernels().quantize_row(x.data() + i * k, static_cast<int32_t>(k), activation, row.get()); });
    std::memcpy(codes.get() + i * k, row.get(), k);
    std::memcpy(scales.get() + i * groups, row.get() + layout.scales, groups * 4);
    const auto* negative_sums = reinterpret_cast<const int32_t*>(row.get() + layout.negative_sums);
    std::transform(negative_sums, negative_sums + sum_count, sums.get() + i * sum_count, std::negate<>());
  }
  return nb::make_tuple(to_numpy(std::move(codes), {m, k}), to_numpy(std::move(scales), {m, groups}),
                        to_numpy(std::move(sums), {m, sum_count}));
}

nb::ndarray<nb::numpy, float> linear(int format, const Bytes& packed, int32_t n, int32_t k, const Matrix& x,
                                     const std::optional<Vector>& bias, const std::optional<Matrix>& residual, int threads) {
  const PackedWeight weight = packed_weight(format, packed, n, k);
  const size_t m = x.shape(0), width = static_cast<size_t>(n);
  require("x", x.shape(1), "columns", static_cast<size_t>(k));
  if (bias) require("bias", bias->size(), "elements", width);
  if (residual) {
    require("residual", residual->shape(0), "rows", m);
    require("residual", residual->shape(1), "columns", width);
  }
  const ActivationFormat activation = activation_format(weight.format);
  const size_t row_bytes = activation_row_bytes(activation, k);
  auto y = std::make_unique<float[]>(m * width);
  {
    const nb::gil_scoped_release release;
    const LinearKernels& kernels = linear_kernels();
    const AlignedBytes quantized = aligned_bytes(std::max<size_t>(m * row_bytes, 1));
    ThreadPool pool(threads);
    const size_t scratch_stride = linear_scratch_bytes();
    const AlignedBytes scratch = aligned_bytes(scratch_stride * static_cast<size_t>(pool.size()));
    pool.run([&](int index, int count) {
      const auto [begin, end] = ThreadPool::share(static_cast<int64_t>(m), index, count);
      for (int64_t i = begin; i < end; ++i) {
        kernels.quantize_row(x.data() + static_cast<size_t>(i) * static_cast<size_t>(k), k, activation, quantized.get() + static_cast<size_t>(i) * row_bytes);
      }
    });
    LinearArguments arguments{weight, quantized.get(), row_bytes, static_cast<int32_t>(m), bias ? bias->data() : nullptr,
                              residual ? residual->data() : nullptr, n, y.get(), n};
    pool.run([&](int index, int count) {
      const auto [begin, end] = ThreadPool::share((n + kBlockRows - 1) / kBlockRows, index, count);
      kernels.linear(arguments, static_cast<int32_t>(begin), static_cast<int32_t>(end), scratch.get() + scratch_stride * static_cast<size_t>(index));
    });
  }
  return to_numpy(std::move(y), {m, width});
}

}  // namespace

void bind_linear(nb::module_& m) {
  using namespace nb::literals;
  m.def("packed_bytes", [](int format, int32_t n, int32_t k) { return packed_bytes(static_cast<WeightFormat>(format), n, k); },
        "format"_a, "n"_a, "k"_a,
        "Bytes of a packed [n, k] matrix: the file's bytes with n padded to a multiple of 16. ValueError if k does not fit.");
  m.def("pack_matrix", &pack_matrix, "format"_a, "source"_a, "n"_a, "k"_a, "out"_a, "threads"_a = 0,
        "Repacks rows in GGUF block layout (uint8, n * bytes of a row) into `out` (uint8, packed_bytes). Exact.\n"
        "threads = 0: all usable. The GIL is released.");
  m.def("can_screen", [](int format) { return can_screen(static_cast<WeightFormat>(format)); }, "format"_a,
        "Whether a head of this format can be screened.");
  m.def("make_screen", &make_screen_of, "format"_a, "packed"_a, "n"_a, "k"_a, "screen"_a, "bounds"_a, "threads"_a = 0,
        "Fills `screen` (uint8, packed as Q5_0) and `bounds` (fp32 [n]) for a packed head; see\n"
        "csrc/kernels/head_screen.h. The GIL is released.");
  m.def("screen_norm", [](const Matrix& x) {
        const int32_t k = static_cast<int32_t>(x.shape(1));
        const AlignedBytes row = aligned_bytes(activation_row_bytes(ActivationFormat::kInt8Group32, k));
        ThreadPool(1).run([&](int, int) { linear_kernels().quantize_row(x.data(), k, ActivationFormat::kInt8Group32, row.get()); });
        return screen_norm(row.get(), k);
      }, "x"_a, "What bounds are multiplied by for the activation x (fp32 [1, k]).");
  m.def("decode_packed_rows", &decode_packed_rows, "format"_a, "packed"_a, "n"_a, "k"_a, "rows"_a,
        "Rows (int32) of a packed matrix as fp32 [len(rows), k], equal to the file format's reference decoding.");
  m.def("quantize_rows", &quantize_rows, "x"_a, "format"_a,
        "x (fp32 [m, k]) as int8 activations: codes int8 [m, k], scales fp32 [m, groups], sums of codes int32 per 32\n"
        "(INT8_GROUP32) or per 16 (INT8_GROUP256) columns. A group with NaN or infinity has scale NaN and codes 0.");
  m.def("linear", &linear, "format"_a, "packed"_a, "n"_a, "k"_a, "x"_a, "bias"_a = nb::none(), "residual"_a = nb::none(), "threads"_a = 0,
        "x @ weight.T (+ bias [n]) (+ residual [m, n]) as fp32 [m, n]; x (fp32 [m, k]) is quantized as the format asks.");
}
