#include "kernels/attention.h"

#include "kernels/elementary.h"
#include "kernels/simd.h"

namespace tokenmill::TM_ISA {
namespace {

// Register tiles. They decide which loads are shared, never the order of an output's additions.
#if defined(TM_PATH_AVX512)
constexpr int kRowTile = 8;
constexpr int kKeyVectors = 2;
constexpr int value_vectors(int rows) { return rows <= 4 ? 4 : 2; }
#elif defined(TM_PATH_AVX2) || defined(TM_PATH_NEON)
constexpr int kRowTile = 4;
constexpr int kKeyVectors = 1;
constexpr int value_vectors(int rows) { return rows <= 2 ? 2 : 1; }
#else
constexpr int kRowTile = 2;
constexpr int kKeyVectors = 1;
constexpr int value_vectors(int) { return 1; }
#endif

constexpr float kLog2e = 1.44269504088896340736f;

// How a page's elements become floats. Pages that many rows share are first converted to a page of floats.
struct F16Elements {
  using Element = uint16_t;
  static TM_INLINE F32x16 load16(const Element* p) { return load_f16(p); }
};
struct Bf16Elements {
  using Element = uint16_t;
  static TM_INLINE F32x16 load16(const Element* p) { return load_bf16(p); }
};
struct F32Elements {
  using Element = float;
  static TM_INLINE F32x16 load16(const Element* p) { return load(p); }
};

TM_INLINE int32_t padded(int32_t head_dim) { return (head_dim + kLanes - 1) / kLanes * kLanes; }
TM_INLINE int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }
TM_INLINE int32_t most(int32_t a, int32_t b) { return a > b ? a : b; }

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

// ---- scores --------------------------------------------------------------------------------------------------------

// scores[row][token] = sum over d, ascending in one fma chain from zero, of q[row][d] * key[d][token], for one page.
// Brings the lines at `ahead` (the page's values) and `next` (the next page's keys) into the cache on the way.
template <class Source, int kRows>
void score_tile(const float* q, int32_t q_stride, const typename Source::Element* keys, int32_t head_dim, float* scores,
                const uint8_t* ahead, const uint8_t* next) {
  for (int32_t token = 0; token < kPageTokens; token += kLanes * kKeyVectors) {
    F32x16 sums[kRows][kKeyVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kKeyVectors; ++v) sums[r][v] = zero_f32();
    }
    const typename Source::Element* column = keys + token * head_dim;
    for (int32_t d = 0; d < head_dim; ++d, column += kLanes) {
      if (ahead != nullptr) prefetch(ahead + 64 * d);
      if (next != nullptr) prefetch(next + 64 * d);
      F32x16 key[kKeyVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kKeyVectors; ++v) key[v] = Source::load16(column + v * head_dim * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const F32x16 query = set1(q[r * q_stride + d]);
#pragma GCC unroll 2
        for (int v = 0; v < kKeyVectors; ++v) sums[r][v] = fma(query, key[v], sums[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kKeyVectors; ++v) store(scores + r * kSpanTokens + token + v * kLanes, sums[r][v]);
    }
  }
}

template <class Source, int kRows>
TM_INLINE void score_rows(int rows, const float* q, int32_t q_stride, const typename Source::Element* keys,
                          int32_t head_dim, float* scores, const uint8_t* ahead, const uint8_t* next) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return score_rows<Source, kRows - 1>(rows, q, q_stride, keys, head_dim, scores, ahead, next);
  }
  score_tile<Source, kRows>(q, q_stride, keys, head_dim, scores, ahead, next);
}

// Turns the scores of slots [begin, end) of a span, counted from its start, into P = exp2(score - maximum), and
// writes maximum and sum of P. Vectors outside are not touched; inside, masked lanes become exactly 0.
void normalize(float* scores, int32_t begin, int32_t end, float softcap, float* maximum, float* sum) {
  const F32x16 nothing = set1(-__builtin_inff());
  F32x16 highest = nothing;
  const int32_t first = begin / kLanes * kLanes;
  for (int32_t i = first; i < end; i += kLanes) {
    F32x16 s = load(scores + i);
    if (softcap > 0.0f || i < begin || end - i < kLanes) {
      if (softcap > 0.0f) s = mul(mul(set1(softcap), tanh(div(s, set1(softcap)))), set1(kLog2e));
      if (i < begin) s = keep_first(nothing, begin - i, s);
      if (end - i < kLanes) s = keep_first(s, end - i, nothing);
      store(scores + i, s);
    }
    highest = max(highest, s);
  }
  const float m = reduce_max(highest);
  F32x16 total = zero_f32();
  for (int32_t i = first; i < end; i += kLanes) {
    const F32x16 p = exp2(sub(load(scores + i), set1(m)));
    store(scores + i, p);
    total = add(total, p);
  }
  *maximum = m;
  *sum = reduce_add(total);
}

// ---- values --------------------------------------------------------------------------------------------------------

// sums[row][d] += p[row][token] * value[token][d], tokens ascending, for kVectors vectors of dimensions.
template <class Source, int kRows, int kVectors>
TM_INLINE void value_tile(const float* p, const typename Source::Element* values, int32_t value_stride, int32_t tokens,
                          float* sums, int32_t record, const uint8_t* ahead, int32_t lines) {
  F32x16 sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = load(sums + r * record + v * kLanes);
  }
  for (int32_t t = 0; t < tokens; ++t, values += value_stride) {
    if (ahead != nullptr) {
      for (int32_t line = 0; line < lines; ++line, ahead += 64) prefetch(ahead);
    }
    F32x16 value[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) value[v] = Source::load16(values + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const F32x16 weight = set1(p[r * kSpanTokens + t]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = fma(weight, value[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(sums + r * record + v * kLanes, sum[r][v]);
  }
}

template <class Source, int kRows>
void value_all_dimensions(const float* p, const typename Source::Element* values, int32_t value_stride, int32_t tokens,
                          int32_t vectors, float* sums, int32_t record, const uint8_t* ahead) {
  constexpr int kVectors = value_vectors(kRows);
  const int32_t lines = (value_stride * static_cast<int32_t>(sizeof(typename Source::Element)) + 63) / 64;
  int32_t v = 0;
  for (; v + kVectors <= vectors; v += kVectors) {
    value_tile<Source, kRows, kVectors>(p, values + v * kLanes, value_stride, tokens, sums + v * kLanes, record, ahead, lines);
    ahead = nullptr;
  }
  for (; v < vectors; ++v) {
    value_tile<Source, kRows, 1>(p, values + v * kLanes, value_stride, tokens, sums + v * kLanes, record, ahead, lines);
    ahead = nullptr;
  }
}

template <class Source, int kRows>
TM_INLINE void value_rows(int rows, const float* p, const typename Source::Element* values, int32_t value_stride,
                          int32_t tokens, int32_t vectors, float* sums, int32_t record, const uint8_t* ahead) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return value_rows<Source, kRows - 1>(rows, p, values, value_stride, tokens, vectors, sums, record, ahead);
    }
  }
  value_all_dimensions<Source, kRows>(p, values, value_stride, tokens, vectors, sums, record, ahead);
}

// ---- one row block -------------------------------------------------------------------------------------------------

// Merges `span` into `running`, both (unnormalized output, maximum, sum). The one function that does it.
TM_INLINE void merge_record(float* running, const float* span, int32_t width) {
  const F32x16 old_maximum = set1(running[width]), new_maximum = set1(span[width]);
  const F32x16 maximum = max(old_maximum, new_maximum);
  const F32x16 old_weight = exp2(sub(old_maximum, maximum)), new_weight = exp2(sub(new_maximum, maximum));
  for (int32_t d = 0; d < width; d += kLanes) {
    store(running + d, fma(load(span + d), new_weight, mul(load(running + d), old_weight)));
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
  float *q, *scores, *spans, *running, *key_page, *value_page;

  BlockRun(const AttentionArguments& a, const AttentionBlock& b, uint8_t* scratch)
      : arguments(a), block(b), rows(a.group, a.window, b), count(b.row_end - b.row_begin),
        width(padded(a.head_dim)), record(attention_record_floats(a.head_dim)) {
    q = reinterpret_cast<float*>(scratch);
    scores = q + kQueryRows * width;
    spans = scores + kQueryRows * kSpanTokens;
    running = spans + kQueryRows * record;
    key_page = running + kQueryRows * record;
    value_page = key_page + kPageTokens * width;
  }

  const Element* page(const uint8_t* plane, int32_t slot) const {
    const size_t index = static_cast<size_t>(block.pages[slot / kPageTokens]);
    return reinterpret_cast<const Element*>(plane + index * arguments.cache.page_stride +
                                            static_cast<size_t>(block.kv_head) * arguments.cache.head_stride);
  }

  void scale_queries() {
    for (int32_t r = 0; r < count; ++r) {
      const int32_t row = block.row_begin + r;
      const float* from = block.q + row / rows.group * arguments.q_stride + row % rows.group * arguments.head_dim;
      for (int32_t d = 0; d < arguments.head_dim; d += kLanes) {
        const int n = least(kLanes, arguments.head_dim - d);
        store_first(q + r * width + d, mul(load_first(from + d, n), set1(arguments.q_scale)), n);
      }
    }
  }

  void score_page(int32_t span, int32_t slot, int32_t to_slot) {
    int32_t begin, end;
    rows.that_see(slot, slot + kPageTokens, &begin, &end);
    const Element* keys = page(arguments.cache.keys, slot);
    const uint8_t* values = reinterpret_cast<const uint8_t*>(page(arguments.cache.values, slot));
    const int32_t after = slot + kPageTokens;
    const uint8_t* next = after < to_slot ? reinterpret_cast<const uint8_t*>(page(arguments.cache.keys, after)) : nullptr;
    const int32_t head_dim = arguments.head_dim;
    float* to = scores + (slot - span);
    const bool convert = sizeof(Element) < 4 && end - begin > kRowTile;
    if (convert) {
      for (int32_t i = 0; i < kPageTokens * head_dim; i += kLanes) store(key_page + i, Source::load16(keys + i));
    }
    while (begin < end) {
      const int n = next_tile(begin, end);
      if (convert) {
        score_rows<F32Elements, kRowTile>(n, q + begin * width, width, key_page, head_dim, to + begin * kSpanTokens, nullptr, nullptr);
      } else {
        score_rows<Source, kRowTile>(n, q + begin * width, width, keys, head_dim, to + begin * kSpanTokens, values, next);
        next = nullptr;
      }
      begin += n;
    }
  }

  // Rows of the next tile: all that are left, or full tiles, or two halves rather than a full tile and a small rest.
  static TM_INLINE int next_tile(int32_t begin, int32_t end) {
    const int32_t left = end - begin;
    if (left <= kRowTile) return left;
    return left < 2 * kRowTile ? (left + 1) / 2 : kRowTile;
  }

  template <class From>
  void add_values(int32_t span, int32_t slot, int32_t begin, int32_t end, const typename From::Element* values,
                  int32_t stride, float* results, const uint8_t* ahead) {
    const int32_t vectors = width / kLanes;
    const auto run = [&](int32_t r, int n, int32_t from, int32_t to) {
      if (from >= to) return;
      value_rows<From, kRowTile>(n, scores + r * kSpanTokens + (from - span), values + (from - slot) * stride, stride,
                                 to - from, vectors, results + r * record, record, ahead);
    };
    while (begin < end) {
      const int n = next_tile(begin, end);
      const int32_t row = begin, last = row + n - 1, page_end = slot + kPageTokens;
      // Slots that all rows of the tile see; what one sees before and after them it reads alone.
      const int32_t from = rows.clip_first(last, slot), to = rows.clip_last(row, page_end);
      if (from < to) {
        for (int i = 0; i < n; ++i) run(begin + i, 1, rows.clip_first(row + i, slot), from);
        run(begin, n, from, to);
        for (int i = 0; i < n; ++i) run(begin + i, 1, to, rows.clip_last(row + i, page_end));
      } else {
        for (int i = 0; i < n; ++i) run(begin + i, 1, rows.clip_first(row + i, slot), rows.clip_last(row + i, page_end));
      }
      begin += n;
    }
  }

  void value_page_sums(int32_t span, int32_t slot, float* results, const uint8_t* ahead) {
    int32_t begin, end;
    rows.that_see(slot, slot + kPageTokens, &begin, &end);
    const Element* values = page(arguments.cache.values, slot);
    if (sizeof(Element) < 4 && end - begin > kRowTile) {
      for (int32_t t = 0; t < kPageTokens; ++t) {
        for (int32_t d = 0; d < width; d += kLanes) {
          store(value_page + t * width + d, Source::load16(values + t * arguments.head_dim + d));
        }
      }
      add_values<F32Elements>(span, slot, begin, end, value_page, width, results, nullptr);
    } else {
      add_values<Source>(span, slot, begin, end, values, arguments.head_dim, results, ahead);
    }
  }

  // Results of one span for rows [begin, end), which are those that see any of it.
  void attend_span(int32_t span_index, float* results, int32_t begin, int32_t end) {
    const int32_t span = span_index * kSpanTokens, span_end = span + kSpanTokens;
    const int32_t from = rows.clip_first(begin, span) / kPageTokens * kPageTokens;
    const int32_t to = rows.clip_last(end - 1, span_end);
    const int32_t block_end = rows.slots[count - 1] + 1;
    for (int32_t slot = from; slot < to; slot += kPageTokens) score_page(span, slot, to);
    for (int32_t r = begin; r < end; ++r) {
      float* result = results + r * record;
      clear_record(result, width);
      normalize(scores + r * kSpanTokens, rows.clip_first(r, span) - span, rows.clip_last(r, span_end) - span,
                arguments.softcap, result + width, result + width + 1);
    }
    for (int32_t slot = from; slot < to; slot += kPageTokens) {
      const int32_t next = slot + kSpanTokens;  // the next span's keys
      const uint8_t* ahead = next < block_end ? reinterpret_cast<const uint8_t*>(page(arguments.cache.keys, next)) : nullptr;
      value_page_sums(span, slot, results, ahead);
    }
    // Zeros lose their sign here: it would tell how many products of a zero P were added.
    for (int32_t r = begin; r < end; ++r) {
      for (int32_t d = 0; d < width; d += kLanes) {
        float* sum = results + r * record + d;
        store(sum, add(load(sum), zero_f32()));
      }
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
      return BlockRun<F16Elements>(arguments, block, scratch).run(span_begin, span_end, records);
    case KvElement::kBf16:
      return BlockRun<Bf16Elements>(arguments, block, scratch).run(span_begin, span_end, records);
    case KvElement::kF32:
      return BlockRun<F32Elements>(arguments, block, scratch).run(span_begin, span_end, records);
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
