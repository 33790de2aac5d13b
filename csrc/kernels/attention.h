// Paged causal attention over fp16, bf16 or fp32 keys and values, in fp32 arithmetic (NUMERICS N6, N7).
//
// The unit of work is a row block: query rows of one sequence that share a KV head, so that every key and value is
// loaded once for all of them. Rows count position-major: row r is head r % group of token r / group. Each row reads
// exactly the slots that it may see, in the same order and through the same spans of 256 slots, whatever block, split
// or chunk it runs in; a block's shape only decides which loads are shared.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tokenmill {

// Element types of keys and values; the numbers are those of KvElement in src/tokenmill/program/kv.py.
enum class KvElement : int32_t { kF16 = 1, kBf16 = 2, kF32 = 3 };

inline constexpr int32_t kPageTokens = 32;
inline constexpr int32_t kSpanTokens = 256;
// Rows of a row block, at most: keys and values are converted once for all of them, and what a block works on fits into
// a second-level cache of 1 MiB. Multiples of every path's register tiles.
inline constexpr int32_t kQueryRows = 192, kWideQueryRows = 96;
inline int32_t attention_block_rows(int32_t head_dim) { return head_dim > 128 ? kWideQueryRows : kQueryRows; }
// Floats between rows of scores: an odd number of lines, or a tile's rows would fall into a few sets of the cache.
inline constexpr int32_t kScoreStride = kSpanTokens + 16;
// Values that are converted to floats at once: so many tokens, at most so many floats each.
inline constexpr int32_t kColumnTokens = 128, kColumnFloats = 32;
// Planes are allocated with this many readable bytes after the last element: the last vector of a value row whose
// length is no multiple of 16 reads past it.
inline constexpr size_t kPlaneSlack = 64;

inline size_t kv_element_bytes(KvElement element) { return element == KvElement::kF32 ? 4 : 2; }

// The KV cache of one layer. Inside a page and head: keys [token / 16][dimension][token % 16], values [token][dimension].
struct KvLayer {
  KvElement element;
  uint8_t* keys;    // page 0, KV head 0
  uint8_t* values;  // page 0, KV head 0
  size_t page_stride;  // bytes, both planes
  size_t head_stride;  // bytes, both planes
};

struct AttentionArguments {
  KvLayer cache;
  int32_t head_dim;
  int32_t group;    // query heads of a KV head
  int32_t window;   // slots that a token sees, itself included; 0 = all
  float q_scale;    // scale * log2(e); with soft-capping only scale
  float softcap;    // 0 = none
  int64_t q_stride;    // floats between tokens
  int64_t out_stride;  // floats between tokens
};

// What a thread attends to after a block, if it is known: slots [slot_begin, slot_end) of a sequence. The first keys are
// brought into the cache before the block is done.
struct AttentionUpcoming {
  const int32_t* pages = nullptr;  // null = not known
  int32_t kv_head = 0;
  int32_t slot_begin = 0, slot_end = 0;
};

// Rows [row_begin, row_end) of one sequence and KV head.
struct AttentionBlock {
  const int32_t* pages;  // page of slots 32 i .. 32 i + 31
  const float* q;        // token 0 of the sequence in this step, first head of the group
  float* out;            // likewise
  int32_t kv_head;
  int32_t first_slot;  // of token 0
  int32_t row_begin, row_end;
  AttentionUpcoming upcoming = {};
};

// What one row knows after one span or several: unnormalized output, maximum and sum. Floats per record:
inline int32_t attention_record_floats(int32_t head_dim) { return (head_dim + 15) / 16 * 16 + 16; }

// First slot that the token at `slot` sees.
inline int32_t first_visible_slot(int32_t slot, int32_t window) {
  return window > 0 && slot >= window ? slot - window + 1 : 0;
}

size_t attention_scratch_bytes(int32_t head_dim);

struct AttentionKernels {
  // Rounds one token's key and value of one KV head into the cache; element `slot` % 32 of page `page`.
  void (*write)(const KvLayer& cache, int32_t head_dim, int32_t kv_head, int32_t page, int32_t slot, const float* key,
                const float* value);
  // Attends to spans [span_begin, span_end) of the block. With `records` null these are all its spans, and the
  // output is written. Otherwise the result of (span, row) goes to records[(span - span_begin) * rows + row].
  void (*attend)(const AttentionArguments& arguments, const AttentionBlock& block, int32_t span_begin, int32_t span_end,
                 float* records, uint8_t* scratch);
  // Merges one row's records, `stride` floats apart, ascending by span, and writes its output [head_dim].
  void (*merge)(const float* records, int64_t stride, int32_t spans, int32_t head_dim, float* out, uint8_t* scratch);
};

const AttentionKernels& attention_kernels();  // of the path in use

}  // namespace tokenmill
