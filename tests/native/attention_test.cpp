// Attention, every path against the portable one, bit for bit, and any division into blocks and spans against one.
#include <algorithm>
#include <limits>
#include <numeric>

#include "kernels/attention.h"
#include "paths.h"

using namespace tokenmill;

namespace {

struct Shape {
  KvElement element;
  int32_t head_dim, group, window;
  float softcap;  // 0 = none
};

constexpr int32_t kTokens = 300;  // more than one span
constexpr int32_t kKvHeads = 2;

struct Case {
  Shape shape;
  std::vector<float> q, k, v;  // [kTokens][group * head_dim] of one KV head's group, [kTokens][head_dim]
  std::vector<int32_t> pages;
};

Case make_case(const Shape& shape, std::mt19937& random) {
  const size_t width = static_cast<size_t>(shape.head_dim);
  Case c{shape,
         normal_floats(kTokens * width * static_cast<size_t>(shape.group), random),
         normal_floats(kTokens * width, random),
         normal_floats(kTokens * width, random),
         std::vector<int32_t>((kTokens + kPageTokens - 1) / kPageTokens)};
  std::iota(c.pages.begin(), c.pages.end(), 0);
  std::shuffle(c.pages.begin(), c.pages.end(), random);
  return c;
}

struct Planes {
  AlignedBytes keys, values;
  size_t bytes;
  KvLayer layer;
};

// All tokens written into KV head 1 of 2; everything else holds zeros, as fresh pages do.
Planes write_all(const Case& c) {
  const size_t head_bytes = static_cast<size_t>(kPageTokens * c.shape.head_dim) * kv_element_bytes(c.shape.element);
  const size_t bytes = c.pages.size() * kKvHeads * head_bytes + kPlaneSlack;
  Planes planes{aligned_bytes(bytes), aligned_bytes(bytes), bytes, {}};
  std::memset(planes.keys.get(), 0, bytes);
  std::memset(planes.values.get(), 0, bytes);
  planes.layer = {c.shape.element, planes.keys.get(), planes.values.get(), kKvHeads * head_bytes, head_bytes};
  for (int32_t slot = 0; slot < kTokens; ++slot) {
    const size_t at = static_cast<size_t>(slot * c.shape.head_dim);
    attention_kernels().write(planes.layer, c.shape.head_dim, 1, c.pages[static_cast<size_t>(slot / kPageTokens)], slot,
                              c.k.data() + at, c.v.data() + at);
  }
  return planes;
}

// [kTokens][group * head_dim], in blocks of `rows` rows; `split` computes every span alone and merges.
std::vector<float> attend_all(const Case& c, const Planes& planes, int32_t rows, bool split) {
  const Shape& s = c.shape;
  const int64_t stride = int64_t{s.group} * s.head_dim;
  const AttentionArguments arguments{planes.layer, s.head_dim, s.group, s.window, 0.3f, s.softcap, stride, stride};
  std::vector<float> out(c.q.size(), -1.0f);
  const AlignedBytes scratch = aligned_bytes(attention_scratch_bytes(s.head_dim));
  const int32_t record = attention_record_floats(s.head_dim), total = kTokens * s.group;
  for (int32_t begin = 0; begin < total; begin += rows) {
    const int32_t end = std::min(begin + rows, total), count = end - begin;
    const AttentionBlock block{c.pages.data(), c.q.data(), out.data(), 1, 0, begin, end};
    const int32_t first_span = first_visible_slot(begin / s.group, s.window) / kSpanTokens;
    const int32_t last_span = (end - 1) / s.group / kSpanTokens + 1, spans = last_span - first_span;
    if (!split) {
      attention_kernels().attend(arguments, block, first_span, last_span, nullptr, scratch.get());
      continue;
    }
    // NaN: a row must not read the record of a span that it does not see.
    std::vector<float> records(static_cast<size_t>(spans * count * record), std::numeric_limits<float>::quiet_NaN());
    for (int32_t i = 0; i < spans; ++i) {
      attention_kernels().attend(arguments, block, first_span + i, first_span + i + 1, records.data() + static_cast<size_t>(i * count * record),
                                 scratch.get());
    }
    for (int32_t r = 0; r < count; ++r) {
      const int32_t row = begin + r, token = row / s.group;
      const int32_t seen_first = first_visible_slot(token, s.window) / kSpanTokens, seen_last = token / kSpanTokens + 1;
      attention_kernels().merge(records.data() + static_cast<size_t>(((seen_first - first_span) * count + r) * record), int64_t{count} * record,
                                seen_last - seen_first, s.head_dim, out.data() + row * s.head_dim, scratch.get());
    }
  }
  return out;
}

void check_case(Checks& checks, const Case& c, const std::string& name) {
  expect_same_on_all_paths(checks, name, [&] {
    const Planes planes = write_all(c);
    std::vector<uint8_t> bytes(planes.keys.get(), planes.keys.get() + planes.bytes);
    bytes.insert(bytes.end(), planes.values.get(), planes.values.get() + planes.bytes);
    const std::vector<float> want = attend_all(c, planes, kQueryRows, false);
    append(bytes, want);
    const auto same = [&](int32_t rows, bool split) {
      const std::vector<float> got = attend_all(c, planes, rows, split);
      checks.expect(std::memcmp(got.data(), want.data(), want.size() * sizeof(float)) == 0,
                    name + " in blocks of " + std::to_string(rows) + (split ? ", split" : "") + " on " + std::string(isa_name(active_isa())));
    };
    for (int32_t rows : {1, 13}) same(rows, false);
    same(kQueryRows, true);
    same(5, true);
    return bytes;
  });
}

}  // namespace

int main() {
  Checks checks;
  std::mt19937 random(5);
  print_paths();
  constexpr Shape kShapes[] = {
      {KvElement::kF16, 64, 2, 0, 0.0f},  {KvElement::kF16, 20, 1, 70, 0.0f}, {KvElement::kF16, 80, 1, 0, 20.0f},
      {KvElement::kF16, 32, 7, 40, 0.0f}, {KvElement::kBf16, 24, 3, 0, 0.0f}, {KvElement::kF32, 8, 3, 0, 0.0f},
      {KvElement::kF32, 16, 1, 33, 5.0f},
  };
  for (const Shape& shape : kShapes) {
    check_case(checks, make_case(shape, random),
               "element " + std::to_string(static_cast<int>(shape.element)) + " head_dim " + std::to_string(shape.head_dim) + " group " +
                   std::to_string(shape.group) + " window " + std::to_string(shape.window));
  }
  return checks.finish();
}
