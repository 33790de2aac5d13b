// The KV pages of a program: per group one key plane and one value plane, each one mapping
// [pages, layers, kv_heads, kPageTokens * head_dim] (src/tokenmill/program/kv.py).
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/attention.h"
#include "platform/mapping.h"

namespace tokenmill {

struct KvGroup {
  int32_t layers;
  int32_t kv_heads;
  int32_t head_dim;
  int32_t window;  // 0 = none
  KvElement element;
  int32_t pages;
};

class KvCache {
 public:
  // Returns the group's index. Throws std::invalid_argument and std::bad_alloc.
  int32_t add(const KvGroup& group);

  int32_t groups() const { return static_cast<int32_t>(groups_.size()); }
  // Throws std::invalid_argument for an unknown index, as do the following.
  const KvGroup& group(int32_t index) const;
  KvLayer layer(int32_t group, int32_t layer) const;
  // Plane 0 holds keys, 1 values.
  uint8_t* plane(int32_t group, int32_t plane) const;
  size_t page_bytes(int32_t group) const;  // of one plane
  // Copies all layers and heads of page `from` to page `to`, both planes.
  void copy_page(int32_t group, int32_t from, int32_t to) const;
  size_t bytes() const;

 private:
  std::vector<KvGroup> groups_;
  std::vector<Mapping> planes_;  // keys of group 0, values of group 0, keys of group 1, ...
};

}  // namespace tokenmill
