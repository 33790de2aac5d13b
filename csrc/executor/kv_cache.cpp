#include "executor/kv_cache.h"

#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

namespace tokenmill {

int32_t KvCache::add(const KvGroup& group) {
  if (group.layers < 1 || group.kv_heads < 1 || group.head_dim < 1 || group.pages < 1 || group.window < 0) {
    throw std::invalid_argument("a KV group needs at least one layer, KV head, dimension and page");
  }
  if (group.element != KvElement::kF16 && group.element != KvElement::kBf16 && group.element != KvElement::kF32) {
    throw std::invalid_argument("unknown KV element type " + std::to_string(static_cast<int>(group.element)));
  }
  groups_.push_back(group);
  const size_t bytes = page_bytes(groups() - 1) * static_cast<size_t>(group.pages) + kPlaneSlack;
  try {
    Mapping keys(bytes), values(bytes);
    planes_.push_back(std::move(keys));
    planes_.push_back(std::move(values));
  } catch (...) {
    groups_.pop_back();
    throw;
  }
  return groups() - 1;
}

const KvGroup& KvCache::group(int32_t index) const {
  if (index < 0 || index >= groups()) throw std::invalid_argument("KV group " + std::to_string(index) + " does not exist");
  return groups_[static_cast<size_t>(index)];
}

size_t KvCache::page_bytes(int32_t index) const {
  const KvGroup& g = group(index);
  return static_cast<size_t>(g.layers) * static_cast<size_t>(g.kv_heads) * kPageTokens * static_cast<size_t>(g.head_dim) *
         kv_element_bytes(g.element);
}

KvLayer KvCache::layer(int32_t index, int32_t layer) const {
  const KvGroup& g = group(index);
  if (layer < 0 || layer >= g.layers) throw std::invalid_argument("KV layer " + std::to_string(layer) + " does not exist");
  const size_t head_stride = static_cast<size_t>(kPageTokens) * static_cast<size_t>(g.head_dim) * kv_element_bytes(g.element);
  const size_t start = static_cast<size_t>(layer) * static_cast<size_t>(g.kv_heads) * head_stride;
  return {g.element, plane(index, 0) + start, plane(index, 1) + start, page_bytes(index), head_stride};
}

uint8_t* KvCache::plane(int32_t index, int32_t plane) const {
  (void)group(index);
  if (plane < 0 || plane > 1) throw std::invalid_argument("planes are 0 (keys) and 1 (values)");
  return planes_[static_cast<size_t>(2 * index + plane)].data();
}

void KvCache::copy_page(int32_t index, int32_t from, int32_t to) const {
  const KvGroup& g = group(index);
  if (from < 0 || from >= g.pages || to < 0 || to >= g.pages) {
    throw std::invalid_argument("cannot copy page " + std::to_string(from) + " to " + std::to_string(to) + ": KV group " +
                                std::to_string(index) + " has " + std::to_string(g.pages) + " pages");
  }
  if (from == to) return;
  const size_t bytes = page_bytes(index);
  for (int32_t p = 0; p < 2; ++p) {
    std::memcpy(plane(index, p) + bytes * static_cast<size_t>(to), plane(index, p) + bytes * static_cast<size_t>(from), bytes);
  }
}

size_t KvCache::bytes() const {
  size_t total = 0;
  for (const Mapping& plane : planes_) total += plane.bytes();
  return total;
}

}  // namespace tokenmill
