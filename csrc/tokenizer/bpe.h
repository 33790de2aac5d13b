// Byte-pair encoding with a merge list (Sennrich et al., 2016) over tables that lie ready in memory. A mapped file of
// them serves at once, whatever the size of the vocabulary.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace tokenmill {

// Joins tokens `left` and `right` to `joined`; of the merges that apply, the one of least rank comes first.
struct BpeMerge {
  uint32_t left, right;
  uint32_t rank;  // from 1; 0 marks a free slot
  uint32_t joined;
};

// Both slot arrays are hash tables with open addressing and linear probing; their sizes are powers of two. Contents
// may come from a damaged file: ids and extents are checked where they are used.
struct BpeTables {
  std::span<const uint8_t> text;          // the spellings of all tokens, UTF-8, one after the other
  std::span<const uint32_t> starts;       // [tokens + 1]: where each spelling begins, and the end of the last
  std::span<const uint32_t> token_slots;  // id + 1 of the tokens that text can become, by spelling; 0 is free
  std::span<const BpeMerge> merge_slots;  // by (left, right)

  uint32_t tokens() const { return static_cast<uint32_t>(starts.size() - 1); }
  // Raises std::out_of_range for an id outside of the vocabulary or a spelling outside of the text.
  std::string_view spelling(uint32_t id) const;
};

struct BpeOptions {
  bool ignore_merges = false;  // a text that is a token is that token, even where no merges lead to it
  bool byte_fallback = false;  // a character without a token becomes the tokens <0x00> to <0xFF> of its bytes
  int64_t unknown = -1;        // token of a run of characters without tokens; -1 drops them
};

// Sizes of the slot arrays for so many entries.
size_t bpe_slots(size_t entries);

// Fills zeroed `slots`, of bpe_slots(tokens) elements, with the tokens whose `findable` is not 0; of tokens spelled
// alike, with the last.
void index_tokens(const BpeTables& tables, std::span<const uint8_t> findable, std::span<uint32_t> slots);

// Fills zeroed `slots`, of bpe_slots(merges) elements, with the merges of the pairs (left, right), best first; of equal
// pairs the last counts. Returns the number of the first pair whose joined text is no token, or -1.
int64_t index_merges(const BpeTables& tables, std::span<const int32_t> pairs, std::span<BpeMerge> slots);

// Immutable: one instance serves any number of threads.
class Bpe {
 public:
  // Throws std::invalid_argument for tables whose sizes do not fit each other.
  Bpe(const BpeTables& tables, const BpeOptions& options);

  // The id of a spelling, or -1.
  int64_t find(std::string_view text) const;
  // Appends the ids of `text`, which is valid UTF-8.
  void encode(std::string_view text, std::vector<int32_t>& ids) const;

  const BpeTables& tables() const { return tables_; }

 private:
  struct Symbol;
  struct Candidate;
  const BpeMerge* merge(uint32_t left, uint32_t right) const;
  void append_characters(std::string_view text, std::vector<Symbol>& symbols) const;
  void merge_all(std::vector<Symbol>& symbols) const;

  BpeTables tables_;
  BpeOptions options_;
  int64_t byte_tokens_[256];
  bool spells_all_bytes_ = false;
};

}  // namespace tokenmill
