#include "kernels/attention.h"

#include "kernels/per_isa/attention_tiles.h"

namespace tokenmill::TM_ISA {
namespace {

TM_INLINE int32_t padded(int32_t head_dim) { return (head_dim + kLanes - 1) / kLanes * kLanes; }
TM_INLINE constexpr int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }
TM_INLINE constexpr int32_t most(int32_t a, int32_t b) { return a > b ? a : b; }

// ---- writing -------------------------------------------------------------------------------------------------------

void write(const KvLayer& cache, int32_t head_dim, int32_t kv_head, int32_t page, int32_t slot, const float* key,
           const float* value) {
  const size_t at = static_cast<size_t>(page) * cache.page_stride + static_cast<size_t>(kv_head) * cache.head_stride;
  const int32_t token = slot % kPageTokens;
  const int32_t key_start = token / kLanes * head_dim * kLanes + token % kLanes;
  const int32_t value_start = token * head_dim;
  if (cache.element == KvElement::kF32) {
    float* keys = reinterpret_cast<float*>(cache.keys + at) + key_start;
    float* values = reinterpret_cast<float*>(cache.values + at) + value_start;
    for (int32_t d = 0; d < head_dim; ++d) keys[d * kLanes] = key[d];
    for (int32_t d = 0; d < head_dim; ++d) values[d] = value[d];
    return;
  }
  uint16_t* keys = reinterpret_cast<uint16_t*>(cache.keys + at) + key_start;
  uint16_t* values = reinterpret_cast<uint16_t*>(cache.values + at) + value_start;
  for (int32_t d = 0; d < head_dim; d += kLanes) {
    const int n = least(kLanes, head_dim - d);
    uint16_t rounded_key[kLanes], rounded_value[kLanes];
    if (cache.element == KvElement::kF16) {
      store_f16(rounded_key, load_first(key + d, n));
      store_f16(rounded_value, load_first(value + d, n));
    } else {
      for (int i = 0; i < n; ++i) rounded_key[i] = f32_to_bf16(key[d + i]);
      for (int i = 0; i < n; ++i) rounded_value[i] = f32_to_bf16(value[d + i]);
    }
    for (int i = 0; i < n; ++i) keys[(d + i) * kLanes] = rounded_key[i];
    for (int i = 0; i < n; ++i) values[d + i] = rounded_value[i];
  }
}

// ---- records -------------------------------------------------------------------------------------------------------

// Merges `span` into `running`, both (unnormalized output, maximum, sum). The one function that does it. The span's zeros
// lose their sign: it would tell how many products of a zero P were added.
TM_INLINE void merge_record(float* running, const float* span, int32_t width) {
  const F32x16 old_maximum = set1(running[width]), new_maximum = set1(span[width]);
  const F32x16 maximum = max(old_maximum, new_maximum);
  const F32x16 old_weight = exp2(sub(old_maximum, maximum)), new_weight = exp2(sub(new_maximum, maximum));
  for (int32_t d = 0; d < width; d += kLanes) {
    const F32x16 added = add(load(span + d), zero_f32());
    store(running + d, fma(added, new_weight, mul(load(running + d), old_weight)));
  }
  const F32x16 sum = fma(set1(span[width + 1]), new_weight, mul(set1(running[width + 1]), old_weight));
  store_first(running + width, maximum, 1);
  store_first(running + width + 1, sum, 1);
}

TM_INLINE void clear_record(float* record, int32_t width) {
  for (int32_t d = 0; d < width; d += kLanes) store(record + d, zero_f32());
  record[width] = -__builtin_inff();
  record[width + 1] = 0.0f;
}

TM_INLINE void write_output(const float* record, int32_t head_dim, float* out) {
  const F32x16 sum = set1(record[padded(head_dim) + 1]);
  for (int32_t d = 0; d < head_dim; d += kLanes) {
    store_first(out + d, div(load(record + d), sum), least(kLanes, head_dim - d));
  }
}

// ---- one row block -------------------------------------------------------------------------------------------------

// Where the rows of one block look; counted from the block's first row. A row is one head of a token, so that slots
// ascend with the row, `group` rows a slot.
struct Rows {
  int32_t group, window, count;
  int32_t start;  // rows of the sequence before this block, those of earlier steps included; slot s begins at s * group - start
  int32_t slots[kQueryRows], firsts[kQueryRows];

  Rows(int32_t group_, int32_t window_, const AttentionBlock& block)
      : group(group_), window(window_), count(block.row_end - block.row_begin), start(block.first_slot * group_ + block.row_begin) {
    for (int32_t r = 0, slot = start / group, head = start % group; r < count; ++r) {
      slots[r] = slot;
      firsts[r] = first_visible_slot(slot, window);
      if (++head == group) {
        head = 0;
        ++slot;
      }
    }
  }
  // Slots of [begin, end) that the row sees.
  TM_INLINE int32_t clip_first(int32_t row, int32_t begin) const { return most(firsts[row], begin); }
  TM_INLINE int32_t clip_last(int32_t row, int32_t end) const { return least(slots[row] + 1, end); }
  // The rows that see any slot of [from, to): their slots lie in [from, to + window - 1).
  void that_see(int32_t from, int32_t to, int32_t* begin, int32_t* end) const {
    *begin = most(0, least(count, from * group - start));
    *end = window == 0 ? count : most(*begin, least(count, (to + window - 1) * group - start));
  }
};

template <class Source>
struct BlockRun {
  using Element = typename Source::Element;
  const AttentionArguments& arguments;
  const AttentionBlock& block;
  Rows rows;
  int32_t count, width, record;
  int32_t end_slot;  // of the item: behind the last slot that any row sees in its spans
  // Many rows share keys and values that are converted to floats once; a few read the cache's elements.
  bool shared;
  int32_t tile_rows;  // of a tile of scores; the last may have fewer
  float *q, *scores, *spans, *running, *key_page, *column;

  BlockRun(const AttentionArguments& a, const AttentionBlock& b, int32_t span_end, uint8_t* scratch)
      : arguments(a), block(b), rows(a.group, a.window, b), count(b.row_end - b.row_begin), width(padded(a.head_dim)),
        record(attention_record_floats(a.head_dim)), end_slot(rows.clip_last(count - 1, span_end * kSpanTokens)),
        shared(count > kDirectRows) {
    const int32_t tiles = shared ? (count + kFloatRows - 1) / kFloatRows : 1;
    tile_rows = (count + tiles - 1) / tiles;
    q = reinterpret_cast<float*>(scratch);
    const int32_t most_rows = attention_block_rows(a.head_dim);
    scores = q + most_rows * width;
    spans = scores + most_rows * kScoreStride;
    running = spans + most_rows * record;
    key_page = running + most_rows * record;
    column = key_page + kPageTokens * width;
  }

  const Element* page(const uint8_t* plane, int32_t slot, const int32_t* pages, int32_t kv_head) const {
    const size_t index = static_cast<size_t>(pages[slot / kPageTokens]);
    return reinterpret_cast<const Element*>(plane + index * arguments.cache.page_stride +
                                            static_cast<size_t>(kv_head) * arguments.cache.head_stride);
  }
  const Element* keys_of(int32_t slot) const { return page(arguments.cache.keys, slot, block.pages, block.kv_head); }
  const Element* values_of(int32_t slot) const { return page(arguments.cache.values, slot, block.pages, block.kv_head); }

  // The page of keys that is read when all spans up to the one of `slot` are done, at the same place within its span;
  // behind the item's end, those that its thread reads next.
  const uint8_t* keys_after_span(int32_t slot) const {
    const int32_t own = slot + kSpanTokens;
    if (own < end_slot) return reinterpret_cast<const uint8_t*>(keys_of(own));
    const AttentionUpcoming& next = block.upcoming;
    const int32_t other = next.slot_begin / kPageTokens * kPageTokens + slot % kSpanTokens;
    if (next.pages == nullptr || other >= next.slot_end) return nullptr;
    return reinterpret_cast<const uint8_t*>(page(arguments.cache.keys, other, next.pages, next.kv_head));
  }

  // q[tile][d][row of the tile]: what a tile reads lies together and needs one address.
  void scale_queries() {
    const int32_t stride = shared ? kFloatRows : kDirectRows, head_dim = arguments.head_dim;
    float* tile = q;
    for (int32_t first = 0; first < count; first += tile_rows, tile += stride * head_dim) {
      for (int32_t i = 0; i < tile_rows && first + i < count; ++i) {
        const int32_t row = block.row_begin + first + i;
        const float* from = block.q + row / rows.group * arguments.q_stride + row % rows.group * head_dim;
        const float scale = arguments.q_scale;
        float* to = tile + i;
        for (int32_t d = 0; d < head_dim; ++d, to += stride) *to = from[d] * scale;
      }
    }
  }

  // The first lines of every 4 KiB of a page: enough for the hardware prefetcher, which stops at such borders, to start.
  TM_INLINE void announce(const uint8_t* page) const {
    constexpr int32_t kLines = 2;
    const int32_t bytes = kPageTokens * arguments.head_dim * static_cast<int32_t>(sizeof(Element));
    for (int32_t at = 0; at < bytes; at += 4096) {
      for (int32_t line = 0; line < kLines; ++line) prefetch(page + at + 64 * line);
    }
  }

  // Scores one page for all tiles of which a row sees it, and brings in its values and the next page's keys meanwhile.
  void score_page(int32_t span, int32_t slot, int32_t to_slot) {
    int32_t begin, end;
    rows.that_see(slot, slot + kPageTokens, &begin, &end);
    const int32_t after = slot + kPageTokens, head_dim = arguments.head_dim;
    const Element* keys = keys_of(slot);
    const uint8_t* values = reinterpret_cast<const uint8_t*>(values_of(slot));
    const uint8_t* next = after < to_slot ? reinterpret_cast<const uint8_t*>(keys_of(after)) : nullptr;
    if (after < to_slot) announce(reinterpret_cast<const uint8_t*>(values_of(after)));
    float* to = scores + (slot - span);
    if (!shared) {
      score_rows<Source, kDirectRows, kDirectRows>(end - begin, q + begin, keys, head_dim, to + begin * kScoreStride, values, next);
      return;
    }
    convert_keys<Source>(keys, head_dim, key_page);
    for (int32_t first = begin / tile_rows * tile_rows; first < end; first += tile_rows) {
      const float* tile = q + first / tile_rows * kFloatRows * head_dim;
      score_rows<F32Elements, kFloatRows, kFloatRows>(least(tile_rows, count - first), tile, key_page, head_dim,
                                                      to + first * kScoreStride, values, next);
      values = next = nullptr;
    }
  }

  // Turns the span's scores into P, row by row; rows in groups, so that one's horizontal maximum overlaps with the others'.
  void normalize(int32_t span, float* results, int32_t begin, int32_t end, const uint8_t* ahead) {
    constexpr int32_t kTogether = 8;
    const int32_t span_end = span + kSpanTokens;
    int32_t lines = kPageTokens * arguments.head_dim * static_cast<int32_t>(sizeof(Element)) / 64;
    for (int32_t first = begin; first < end; first += kTogether) {
      const int32_t n = least(kTogether, end - first);
      F32x16 lanes[kTogether];
      for (int32_t i = 0; i < n; ++i) {
        const int32_t r = first + i;
        lanes[i] = mask_scores(scores + r * kScoreStride, rows.clip_first(r, span) - span, rows.clip_last(r, span_end) - span,
                               arguments.softcap);
      }
      for (int32_t i = 0; i < n; ++i) results[(first + i) * record + width] = reduce_max(lanes[i]);
      for (int32_t i = 0; i < n; ++i) {
        const int32_t r = first + i;
        lanes[i] = exponentiate(scores + r * kScoreStride, rows.clip_first(r, span) - span, rows.clip_last(r, span_end) - span,
                                results[r * record + width], scores + (r + kTogether) * kScoreStride, ahead);
        lines -= kSpanTokens / kLanes;
        if (ahead != nullptr) ahead = lines > 0 ? ahead + 64 * (kSpanTokens / kLanes) : nullptr;
      }
      for (int32_t i = 0; i < n; ++i) results[(first + i) * record + width + 1] = reduce_add(lanes[i]);
    }
  }

  // Calls add(row, n, from, to) for tiles of at most `full` of the rows [begin, end), so that each row gets its slots of
  // [slot, slot_end) in order: those that all rows of a tile see together, what a token sees before and after them alone.
  template <class Add>
  TM_INLINE void for_tiles(int32_t begin, int32_t end, int full, int32_t slot, int32_t slot_end, const Add& add) {
    const auto by_token = [&](int32_t row, int n, const auto& from, const auto& to) {
      for (int i = 0, heads; i < n; i += heads) {
        heads = 1;
        while (i + heads < n && rows.slots[row + i + heads] == rows.slots[row + i]) ++heads;
        if (from(row + i) < to(row + i)) add(row + i, heads, from(row + i), to(row + i));
      }
    };
    const auto first = [&](int32_t row) { return rows.clip_first(row, slot); };
    const auto last = [&](int32_t row) { return rows.clip_last(row, slot_end); };
    for (int n; begin < end; begin += n) {
      n = next_tile(end - begin, full);
      const int32_t from = first(begin + n - 1), to = last(begin);
      if (from < to) {
        by_token(begin, n, first, [&](int32_t) { return from; });
        add(begin, n, from, to);
        by_token(begin, n, [&](int32_t) { return to; }, last);
      } else {
        by_token(begin, n, first, last);
      }
    }
  }

  // Adds P·V of one page, from the cache's elements.
  void add_page(int32_t span, int32_t slot, float* results) {
    int32_t begin, end;
    rows.that_see(slot, slot + kPageTokens, &begin, &end);
    const Element* values = values_of(slot);
    const uint8_t* ahead = keys_after_span(slot);
    if ((slot + kPageTokens) % kSpanTokens != 0) {
      if (const uint8_t* coming = keys_after_span(slot + kPageTokens)) announce(coming);
    }
    const int32_t stride = arguments.head_dim;
    for_tiles(begin, end, kDirectRows, slot, slot + kPageTokens, [&](int32_t row, int n, int32_t from, int32_t to) {
      value_rows<Source, kDirectRows>(n, scores + row * kScoreStride + (from - span), values + (from - slot) * stride, stride,
                                      to - from, width / kLanes, results + row * record, record, ahead);
    });
  }

  // Adds P·V of slots [slot, to), at most kColumnTokens, for kVectors vectors of dimensions from `d` on. The column of
  // floats stays in the first-level cache while all rows pass by.
  template <int kVectors>
  void add_column(int32_t span, int32_t slot, int32_t to, int32_t d, float* results) {
    constexpr int32_t kColumnWidth = kVectors * kLanes;
    int32_t begin, end;
    rows.that_see(slot, to, &begin, &end);
    for (int32_t from = slot; from < to; from += kPageTokens) {
      convert_column<Source, kVectors>(values_of(from) + d, arguments.head_dim, column + (from - slot) * kColumnWidth);
    }
    for_tiles(begin, end, kFloatRows, slot, to, [&](int32_t row, int n, int32_t from, int32_t until) {
      column_rows<kFloatRows, kVectors>(n, scores + row * kScoreStride + (from - span), column + (from - slot) * kColumnWidth,
                                        until - from, results + row * record + d, record);
    });
  }

  void add_columns(int32_t span, int32_t slot, int32_t to, float* results) {
    int32_t d = 0;
    for (; d + kColumnVectors * kLanes <= width; d += kColumnVectors * kLanes) add_column<kColumnVectors>(span, slot, to, d, results);
    for (; d < width; d += kLanes) add_column<1>(span, slot, to, d, results);
  }

  // Results of one span for rows [begin, end), which are those that see any of it.
  void attend_span(int32_t span_index, float* results, int32_t begin, int32_t end) {
    const int32_t span = span_index * kSpanTokens, span_end = span + kSpanTokens;
    const int32_t from = rows.clip_first(begin, span) / kPageTokens * kPageTokens;
    const int32_t to = rows.clip_last(end - 1, span_end);
    for (int32_t slot = from; slot < to; slot += kPageTokens) score_page(span, slot, to);
    for (int32_t r = begin; r < end; ++r) clear_record(results + r * record, width);
    normalize(span, results, begin, end, keys_after_span(from));
    if (!shared) {
      for (int32_t slot = from; slot < to; slot += kPageTokens) add_page(span, slot, results);
      return;
    }
    for (int32_t slot = from, next; slot < to; slot = next) {
      next = slot / kColumnTokens * kColumnTokens + kColumnTokens;
      add_columns(span, slot, least(next, to), results);
    }
  }

  void run(int32_t span_begin, int32_t span_end, float* records) {
    scale_queries();
    if (records == nullptr) {
      for (int32_t r = 0; r < count; ++r) clear_record(running + r * record, width);
    }
    for (int32_t span = span_begin; span < span_end; ++span) {
      int32_t begin, end;
      rows.that_see(span * kSpanTokens, (span + 1) * kSpanTokens, &begin, &end);
      if (begin >= end) continue;
      float* results = records == nullptr ? spans : records + static_cast<int64_t>(span - span_begin) * count * record;
      attend_span(span, results, begin, end);
      if (records == nullptr) {
        for (int32_t r = begin; r < end; ++r) merge_record(running + r * record, results + r * record, width);
      }
    }
    if (records != nullptr) return;
    for (int32_t r = 0; r < count; ++r) {
      const int32_t row = block.row_begin + r;
      write_output(running + r * record, arguments.head_dim,
                   block.out + row / rows.group * arguments.out_stride + row % rows.group * arguments.head_dim);
    }
  }
};

void attend(const AttentionArguments& arguments, const AttentionBlock& block, int32_t span_begin, int32_t span_end,
            float* records, uint8_t* scratch) {
  switch (arguments.cache.element) {
    case KvElement::kF16:
      return BlockRun<F16Elements>(arguments, block, span_end, scratch).run(span_begin, span_end, records);
    case KvElement::kBf16:
      return BlockRun<Bf16Elements>(arguments, block, span_end, scratch).run(span_begin, span_end, records);
    case KvElement::kF32:
      return BlockRun<F32Elements>(arguments, block, span_end, scratch).run(span_begin, span_end, records);
  }
}

void merge(const float* records, int64_t stride, int32_t spans, int32_t head_dim, float* out, uint8_t* scratch) {
  float* running = reinterpret_cast<float*>(scratch);
  const int32_t width = padded(head_dim);
  clear_record(running, width);
  for (int32_t span = 0; span < spans; ++span) merge_record(running, records + span * stride, width);
  write_output(running, head_dim, out);
}

}  // namespace

extern const AttentionKernels attention_kernels_table = {write, attend, merge};

}  // namespace tokenmill::TM_ISA
