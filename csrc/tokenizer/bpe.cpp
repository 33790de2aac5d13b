#include "tokenizer/bpe.h"

#include <algorithm>
#include <bit>
#include <stdexcept>
#include <string>

namespace tokenmill {
namespace {

// FNV-1a. Slots are taken from the upper half, whose bits depend on all bytes.
uint64_t hash_text(std::string_view text) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const char c : text) hash = (hash ^ static_cast<uint8_t>(c)) * 0x100000001b3u;
  return (hash * 0x9e3779b97f4a7c15u) >> 32;
}

uint64_t hash_pair(uint32_t left, uint32_t right) {
  const uint64_t pair = (static_cast<uint64_t>(left) << 32 | right) * 0x9e3779b97f4a7c15u;
  return ((pair ^ pair >> 29) * 0xbf58476d1ce4e5b9u) >> 32;
}

// Walks the slots of a hash until `stop` says so or all have been seen.
template <class Slots, class Stop>
auto* probe(const Slots& slots, uint64_t hash, const Stop& stop) {
  const size_t mask = slots.size() - 1;
  for (size_t i = 0; i < slots.size(); ++i) {
    auto& slot = slots[(hash + i) & mask];
    if (stop(slot)) return &slot;
  }
  return static_cast<decltype(&slots[0])>(nullptr);
}

size_t character_bytes(std::string_view text) {
  const uint8_t lead = static_cast<uint8_t>(text[0]);
  const size_t bytes = lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
  return std::min(bytes, text.size());
}

}  // namespace

std::string_view BpeTables::spelling(uint32_t id) const {
  if (id >= tokens() || starts[id] > starts[id + 1] || starts[id + 1] > text.size()) {
    throw std::out_of_range("the vocabulary has no token " + std::to_string(id));
  }
  return {reinterpret_cast<const char*>(text.data()) + starts[id], starts[id + 1] - starts[id]};
}

size_t bpe_slots(size_t entries) { return std::bit_ceil(entries + entries / 3 + 1); }

void index_tokens(const BpeTables& tables, std::span<const uint8_t> findable, std::span<uint32_t> slots) {
  for (uint32_t id = 0; id < tables.tokens(); ++id) {
    if (!findable[id]) continue;
    const std::string_view text = tables.spelling(id);
    *probe(slots, hash_text(text), [&](uint32_t slot) { return slot == 0 || tables.spelling(slot - 1) == text; }) = id + 1;
  }
}

int64_t index_merges(const BpeTables& tables, std::span<const int32_t> pairs, std::span<BpeMerge> slots) {
  const Bpe vocabulary(tables, {});
  std::string joined;
  for (size_t i = 0; i < pairs.size() / 2; ++i) {
    const uint32_t left = static_cast<uint32_t>(pairs[2 * i]), right = static_cast<uint32_t>(pairs[2 * i + 1]);
    joined.assign(tables.spelling(left)).append(tables.spelling(right));
    const int64_t id = vocabulary.find(joined);
    if (id < 0) return static_cast<int64_t>(i);
    const auto matches = [&](const BpeMerge& slot) { return slot.rank == 0 || (slot.left == left && slot.right == right); };
    *probe(slots, hash_pair(left, right), matches) = {left, right, static_cast<uint32_t>(i + 1), static_cast<uint32_t>(id)};
  }
  return -1;
}

// A token on its way, in a list that shrinks as neighbours join. `next` and `previous` are indices; -1 is none.
struct Bpe::Symbol {
  uint32_t id;
  int32_t previous, next;
  bool gone = false;
};

// A merge that may be due at a symbol; stale if the symbols there have changed since.
struct Bpe::Candidate {
  uint32_t rank, joined;
  int32_t position;
  // For a heap whose top is the best rank, the leftmost of equals.
  bool operator<(const Candidate& other) const {
    return rank != other.rank ? rank > other.rank : position > other.position;
  }
};

Bpe::Bpe(const BpeTables& tables, const BpeOptions& options) : tables_(tables), options_(options) {
  const auto table_size = [](size_t size) { return size == 0 || std::has_single_bit(size); };
  if (tables.starts.empty() || !table_size(tables.token_slots.size()) || !table_size(tables.merge_slots.size())) {
    throw std::invalid_argument("the tables of the vocabulary have sizes that do not fit each other");
  }
  if (options.unknown >= tables.tokens()) throw std::invalid_argument("the unknown token is not in the vocabulary");
  if (!options.byte_fallback) return;
  spells_all_bytes_ = true;
  for (int byte = 0; byte < 256; ++byte) {
    constexpr char kDigits[] = "0123456789ABCDEF";
    const char name[] = {'<', '0', 'x', kDigits[byte >> 4], kDigits[byte & 15], '>'};
    byte_tokens_[byte] = find({name, sizeof name});
    spells_all_bytes_ = spells_all_bytes_ && byte_tokens_[byte] >= 0;
  }
}

int64_t Bpe::find(std::string_view text) const {
  const uint32_t* slot = probe(tables_.token_slots, hash_text(text), [&](uint32_t entry) {
    return entry == 0 || tables_.spelling(entry - 1) == text;
  });
  return slot == nullptr ? -1 : static_cast<int64_t>(*slot) - 1;
}

const BpeMerge* Bpe::merge(uint32_t left, uint32_t right) const {
  const BpeMerge* slot = probe(tables_.merge_slots, hash_pair(left, right), [&](const BpeMerge& entry) {
    return entry.rank == 0 || (entry.left == left && entry.right == right);
  });
  return slot == nullptr || slot->rank == 0 || slot->joined >= tables_.tokens() ? nullptr : slot;
}

void Bpe::append_characters(std::string_view text, std::vector<Symbol>& symbols) const {
  const auto add = [&](int64_t id) { symbols.push_back({static_cast<uint32_t>(id), 0, 0}); };
  bool unknown_run = false;
  for (size_t bytes; !text.empty(); text.remove_prefix(bytes)) {
    bytes = character_bytes(text);
    const int64_t id = find(text.substr(0, bytes));
    if (id < 0 && !spells_all_bytes_) {
      if (options_.unknown >= 0 && !unknown_run) add(options_.unknown);
      unknown_run = true;
      continue;
    }
    unknown_run = false;
    if (id >= 0) {
      add(id);
    } else {
      for (size_t i = 0; i < bytes; ++i) add(byte_tokens_[static_cast<uint8_t>(text[i])]);
    }
  }
  const int32_t count = static_cast<int32_t>(symbols.size());
  for (int32_t i = 0; i < count; ++i) {
    symbols[static_cast<size_t>(i)].previous = i - 1;
    symbols[static_cast<size_t>(i)].next = i + 1 < count ? i + 1 : -1;
  }
}

void Bpe::merge_all(std::vector<Symbol>& symbols) const {
  const auto at = [&](int32_t position) -> Symbol& { return symbols[static_cast<size_t>(position)]; };
  std::vector<Candidate> heap;
  const auto propose = [&](int32_t left, int32_t right) {
    const BpeMerge* found = merge(at(left).id, at(right).id);
    if (found == nullptr) return false;
    heap.push_back({found->rank, found->joined, left});
    return true;
  };
  for (int32_t i = 0; i + 1 < static_cast<int32_t>(symbols.size()); ++i) propose(i, i + 1);
  std::make_heap(heap.begin(), heap.end());
  while (!heap.empty()) {
    const Candidate best = heap.front();
    std::pop_heap(heap.begin(), heap.end());
    heap.pop_back();
    Symbol& left = at(best.position);
    if (left.gone || left.next < 0) continue;
    Symbol& right = at(left.next);
    const BpeMerge* still = merge(left.id, right.id);
    if (still == nullptr || still->joined != best.joined) continue;
    left.id = best.joined;
    left.next = right.next;
    right.gone = true;
    if (left.next >= 0) at(left.next).previous = best.position;
    if (left.previous >= 0 && propose(left.previous, best.position)) std::push_heap(heap.begin(), heap.end());
    if (left.next >= 0 && propose(best.position, left.next)) std::push_heap(heap.begin(), heap.end());
  }
}

void Bpe::encode(std::string_view text, std::vector<int32_t>& ids) const {
  if (text.empty()) return;
  if (options_.ignore_merges) {
    if (const int64_t id = find(text); id >= 0) {
      ids.push_back(static_cast<int32_t>(id));
      return;
    }
  }
  std::vector<Symbol> symbols;
  append_characters(text, symbols);
  merge_all(symbols);
  for (const Symbol& symbol : symbols) {
    if (!symbol.gone) ids.push_back(static_cast<int32_t>(symbol.id));
  }
}

}  // namespace tokenmill
