// Checkpoint layout -> row blocks (weight_format.h). Every format goes through the same two steps for each group of
// 32 columns of a row: read the group's 32 codes as eight quads of bytes, then spread the quads over the code planes.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels/linear.h"

namespace tokenmill {
namespace {

uint32_t load_u32(const uint8_t* p) {
  uint32_t value;
  std::memcpy(&value, p, 4);
  return value;
}
void store_u32(uint8_t* p, uint32_t value) { std::memcpy(p, &value, 4); }

constexpr uint32_t bytes_of(uint32_t byte) { return byte * 0x01010101U; }

// Bits 0..3 to bit 0 of bytes 0..3.
constexpr uint32_t spread4(uint32_t bits) { return ((bits & 15U) * 0x00204081U) & bytes_of(1); }

// Byte offsets inside one block of the file.
struct SourceFields {
  int codes, high, scales, d, m;
};

constexpr SourceFields source_fields(WeightFormat format) {
  switch (format) {
    case WeightFormat::kQ4_0:
    case WeightFormat::kIq4Nl:
    case WeightFormat::kQ8_0: return {2, 0, 0, 0, 0};
    case WeightFormat::kQ4_1: return {4, 0, 0, 0, 2};
    case WeightFormat::kQ5_0: return {6, 2, 0, 0, 0};
    case WeightFormat::kQ5_1: return {8, 4, 0, 0, 2};
    case WeightFormat::kQ2K: return {16, 0, 0, 80, 82};
    case WeightFormat::kQ3K: return {32, 0, 96, 108, 0};
    case WeightFormat::kQ4K: return {16, 0, 4, 0, 2};
    case WeightFormat::kQ5K: return {48, 16, 4, 0, 2};
    case WeightFormat::kQ6K: return {0, 128, 192, 208, 0};
    default: return {};
  }
}

// Codes of group `group` of a block, four columns a word.
template <WeightFormat kFormat>
inline void read_quads(const uint8_t* block, int group, uint32_t (&quads)[8]) {
  constexpr SourceFields kFields = source_fields(kFormat);
  constexpr int kBits = chunk_layout(kFormat).code_bits;
  const uint8_t* codes = block + kFields.codes;
  const uint8_t* high = block + kFields.high;
  if constexpr (kFormat == WeightFormat::kQ8_0) {
    for (int j = 0; j < 8; ++j) quads[j] = load_u32(codes + 4 * j) ^ bytes_of(0x80);
  } else if constexpr (!chunk_layout(kFormat).super_block()) {  // column i in the low nibble of byte i, i + 16 in the high one
    for (int j = 0; j < 4; ++j) {
      const uint32_t word = load_u32(codes + 4 * j);
      quads[j] = word & bytes_of(15);
      quads[j + 4] = (word >> 4) & bytes_of(15);
    }
    if constexpr (kBits == 5) {
      const uint32_t bits = load_u32(high);
      for (int j = 0; j < 8; ++j) quads[j] |= spread4(bits >> (4 * j)) << 4;
    }
  } else if constexpr (kBits == 4 || kBits == 5) {  // groups 2p and 2p + 1 share 32 bytes
    for (int j = 0; j < 8; ++j) quads[j] = (load_u32(codes + 32 * (group / 2) + 4 * j) >> (4 * (group % 2))) & bytes_of(15);
    if constexpr (kBits == 5) {
      for (int j = 0; j < 8; ++j) quads[j] |= ((load_u32(high + 4 * j) >> group) & bytes_of(1)) << 4;
    }
  } else if constexpr (kBits == 6) {  // half a super-block: 64 bytes of nibbles (groups 0, 1 low, 2, 3 high), 32 of upper bits
    const int half = group / 4, part = group % 4;
    for (int j = 0; j < 8; ++j) {
      const uint32_t low = (load_u32(codes + 64 * half + 32 * (part % 2) + 4 * j) >> (4 * (part / 2))) & bytes_of(15);
      quads[j] = low | (((load_u32(high + 32 * half + 4 * j) >> (2 * part)) & bytes_of(3)) << 4);
    }
  } else {  // 2 and 3 bits: groups 4h .. 4h + 3 share 32 bytes
    for (int j = 0; j < 8; ++j) quads[j] = (load_u32(codes + 32 * (group / 4) + 4 * j) >> (2 * (group % 4))) & bytes_of(3);
    if constexpr (kBits == 3) {
      for (int j = 0; j < 8; ++j) quads[j] |= ((load_u32(high + 4 * j) >> group) & bytes_of(1)) << 2;
    }
  }
}

// Writes a group's quads of row `row` into the code planes.
template <WeightFormat kFormat>
inline void write_quads(const uint32_t (&quads)[8], uint8_t* chunk, const ChunkPlanes& planes, int group, int row) {
  constexpr int kBits = chunk_layout(kFormat).code_bits;
  constexpr int kLowBits = kBits == 3 ? 2 : 4;  // bits below the plane of upper bits
  if constexpr (kBits == 8) {
    uint8_t* out = chunk + planes.codes8 + 512 * group + 4 * row;
    for (int j = 0; j < 8; ++j) store_u32(out + 64 * j, quads[j]);
  }
  if constexpr (kBits == 4 || kBits == 5 || kBits == 6) {
    uint8_t* out = chunk + planes.codes4 + 256 * group + 4 * row;
    for (int j = 0; j < 4; ++j) store_u32(out + 64 * j, (quads[j] & bytes_of(15)) | ((quads[j + 4] & bytes_of(15)) << 4));
  }
  if constexpr (kBits == 2 || kBits == 3 || kBits == 6) {
    constexpr int kShift = kBits == 6 ? 4 : 0;
    uint8_t* out = chunk + planes.codes2 + 128 * group + 4 * row;
    for (int v = 0; v < 2; ++v) {
      uint32_t word = 0;
      for (int t = 0; t < 4; ++t) {
        const uint32_t bits = (quads[4 * v + t] >> kShift) & bytes_of(3);
        word |= bits << (2 * t);
      }
      store_u32(out + 64 * v, word);
    }
  }
  if constexpr (kBits == 3 || kBits == 5) {
    uint32_t word = 0;
    for (int j = 0; j < 8; ++j) {
      // In a statement of its own: g++ 12's undefined-behaviour sanitizer miscompiles both shifts in one.
      const uint32_t bits = (quads[j] >> kLowBits) & bytes_of(1);
      word |= bits << j;
    }
    store_u32(chunk + planes.codes1 + 64 * group + 4 * row, word);
  }
}

// The 6-bit scales and minimums of Q4_K and Q5_K: 8 of each in 12 bytes.
void read_scales_and_minimums(const uint8_t* packed, uint8_t (&scales)[8], uint8_t (&minimums)[8]) {
  for (int g = 0; g < 4; ++g) {
    scales[g] = packed[g] & 63;
    minimums[g] = packed[g + 4] & 63;
    scales[g + 4] = static_cast<uint8_t>((packed[g + 8] & 15) | ((packed[g] >> 6) << 4));
    minimums[g + 4] = static_cast<uint8_t>((packed[g + 8] >> 4) | ((packed[g + 4] >> 6) << 4));
  }
}

// The sixteen 6-bit scales of Q3_K in 12 bytes.
void read_scales16(const uint8_t* packed, uint8_t (&scales)[16]) {
  for (int g = 0; g < 16; ++g) {
    const int low = packed[g % 8] >> (4 * (g / 8)), high = packed[8 + g % 4] >> (2 * (g / 4));
    scales[g] = static_cast<uint8_t>((low & 15) | ((high & 3) << 4));
  }
}

// Integer scales of 16 rows of one super-block, to the chunk's scale plane. A null row is a row of padding.
template <WeightFormat kFormat>
void pack_scales(const uint8_t* const (&blocks)[kBlockRows], uint8_t* out) {
  constexpr ChunkLayout kLayout = chunk_layout(kFormat);
  constexpr int kAt = source_fields(kFormat).scales;
  uint8_t codes[256] = {};
  if constexpr (kLayout.scales == ScaleCoding::kSixBits) {
    for (int r = 0; r < kBlockRows; ++r) {
      if (blocks[r] == nullptr) continue;
      if constexpr (kLayout.has_minimum) {
        uint8_t scales[8], minimums[8];
        read_scales_and_minimums(blocks[r] + kAt, scales, minimums);
        for (int g = 0; g < 8; ++g) {
          codes[16 * g + r] = scales[g];
          codes[128 + 32 * (g / 2) + 2 * r + g % 2] = minimums[g];
        }
      } else {
        uint8_t scales[16];
        read_scales16(blocks[r] + kAt, scales);
        for (int g = 0; g < 16; ++g) codes[16 * g + r] = scales[g];
      }
    }
    for (int i = 0; i < 64; ++i) {
      const uint8_t quarters[4] = {codes[i], codes[64 + i], codes[128 + i], codes[192 + i]};
      out[i] = static_cast<uint8_t>((quarters[0] & 15) | (quarters[2] << 4));
      out[64 + i] = static_cast<uint8_t>((quarters[1] & 15) | (quarters[3] << 4));
      out[128 + i] = static_cast<uint8_t>((quarters[0] >> 4) | ((quarters[1] >> 4) << 2) | ((quarters[2] >> 4) << 4) |
                                          ((quarters[3] >> 4) << 6));
    }
  } else {
    for (int r = 0; r < kBlockRows; ++r) {
      if (blocks[r] == nullptr) continue;
      for (int g = 0; g < 16; ++g) {
        const uint8_t code = blocks[r][kAt + g];
        if constexpr (kLayout.scales == ScaleCoding::kInt8) {
          codes[16 * g + r] = code;
        } else {
          codes[16 * g + r] = static_cast<uint8_t>(codes[16 * g + r] | (code & 15));
          uint8_t& minimum = codes[32 * (g / 2) + 2 * r + g % 2];
          minimum = static_cast<uint8_t>(minimum | (code & 0xf0));
        }
      }
    }
    std::memcpy(out, codes, 256);
  }
}

template <WeightFormat kFormat>
void pack_chunk(const uint8_t* const (&rows)[kBlockRows], int groups, uint8_t* chunk) {
  constexpr ChunkLayout kLayout = chunk_layout(kFormat);
  constexpr SourceFields kFields = source_fields(kFormat);
  const ChunkPlanes planes = chunk_planes(kLayout, groups);
  for (int r = 0; r < kBlockRows; ++r) {
    if (rows[r] == nullptr) continue;
    for (int g = 0; g < groups; ++g) {
      const uint8_t* block = kLayout.super_block() ? rows[r] : rows[r] + g * kLayout.source_bytes;
      uint32_t quads[8];
      read_quads<kFormat>(block, g, quads);
      write_quads<kFormat>(quads, chunk, planes, g, r);
      if (!kLayout.super_block() || g == 0) {
        std::memcpy(chunk + planes.d + 32 * g + 2 * r, block + kFields.d, 2);
        if (kLayout.has_minimum) std::memcpy(chunk + planes.m + 32 * g + 2 * r, block + kFields.m, 2);
      }
    }
  }
  if constexpr (kLayout.super_block()) pack_scales<kFormat>(rows, chunk + planes.scales);
}

// One row block of a quantized format.
template <WeightFormat kFormat>
void pack_block(const uint8_t* source, size_t row_bytes, int rows, int32_t k, uint8_t* out) {
  constexpr ChunkLayout kLayout = chunk_layout(kFormat);
  const int padding_from = rows;
  if (padding_from < kBlockRows) std::memset(out, 0, row_bytes * kBlockRows);
  for (int32_t column = 0; column < k; column += kChunkColumns) {
    const int groups = std::min(k - column, kChunkColumns) / kGroupColumns;
    const uint8_t* blocks[kBlockRows] = {};
    for (int r = 0; r < rows; ++r) {
      blocks[r] = source + static_cast<size_t>(r) * row_bytes + static_cast<size_t>(column / (kLayout.block_columns + 1)) * kLayout.source_bytes;
    }
    pack_chunk<kFormat>(blocks, groups, out);
    out += chunk_planes(kLayout, groups).bytes;
  }
}

// Elements of 2 (pairs of columns side by side) or 4 bytes.
template <class Element>
void pack_block_of_elements(const uint8_t* source, size_t row_bytes, int rows, int32_t k, uint8_t* out) {
  constexpr int kWidth = 4 / sizeof(Element);  // columns that lie side by side
  if (rows < kBlockRows) std::memset(out, 0, row_bytes * kBlockRows);
  constexpr int32_t kStrip = 64;  // columns per pass: what one pass writes stays in the first-level cache
  const int32_t whole = k / kWidth * kWidth;
  for (int32_t begin = 0; begin < whole; begin += kStrip) {
    const int32_t end = std::min(begin + kStrip, whole);
    for (int r = 0; r < rows; ++r) {
      const uint8_t* row = source + static_cast<size_t>(r) * row_bytes;
      for (int32_t c = begin; c < end; c += kWidth) store_u32(out + 16 * sizeof(Element) * c + 4 * r, load_u32(row + sizeof(Element) * c));
    }
  }
  if (whole < k) {
    for (int r = 0; r < rows; ++r) {
      std::memcpy(out + 16 * sizeof(Element) * whole + sizeof(Element) * r,
                  source + static_cast<size_t>(r) * row_bytes + sizeof(Element) * whole, sizeof(Element));
    }
  }
}

using PackBlock = void (*)(const uint8_t*, size_t, int, int32_t, uint8_t*);

PackBlock block_packer(WeightFormat format) {
  switch (format) {
    case WeightFormat::kF32: return pack_block_of_elements<uint32_t>;
    case WeightFormat::kF16:
    case WeightFormat::kBf16: return pack_block_of_elements<uint16_t>;
    case WeightFormat::kQ4_0: return pack_block<WeightFormat::kQ4_0>;
    case WeightFormat::kQ4_1: return pack_block<WeightFormat::kQ4_1>;
    case WeightFormat::kQ5_0: return pack_block<WeightFormat::kQ5_0>;
    case WeightFormat::kQ5_1: return pack_block<WeightFormat::kQ5_1>;
    case WeightFormat::kQ8_0: return pack_block<WeightFormat::kQ8_0>;
    case WeightFormat::kIq4Nl: return pack_block<WeightFormat::kIq4Nl>;
    case WeightFormat::kQ2K: return pack_block<WeightFormat::kQ2K>;
    case WeightFormat::kQ3K: return pack_block<WeightFormat::kQ3K>;
    case WeightFormat::kQ4K: return pack_block<WeightFormat::kQ4K>;
    case WeightFormat::kQ5K: return pack_block<WeightFormat::kQ5K>;
    case WeightFormat::kQ6K: return pack_block<WeightFormat::kQ6K>;
  }
  throw std::invalid_argument("unknown weight format number " + std::to_string(static_cast<int>(format)));
}

}  // namespace

ActivationFormat activation_format(WeightFormat format) {
  const int number = static_cast<int>(format);
  if (number < 0 || number >= kWeightFormatCount) {
    throw std::invalid_argument("unknown weight format number " + std::to_string(number));
  }
  if (format <= WeightFormat::kBf16) return ActivationFormat::kF32;
  return chunk_layout(format).super_block() ? ActivationFormat::kInt8Group256 : ActivationFormat::kInt8Group32;
}

size_t source_row_bytes(WeightFormat format, int32_t k) {
  const ActivationFormat activation = activation_format(format);
  const int multiple = activation == ActivationFormat::kF32 ? 1 : activation == ActivationFormat::kInt8Group32 ? 32 : 256;
  if (k <= 0 || k % multiple != 0) {
    throw std::invalid_argument("a weight row of " + std::to_string(k) + " columns does not fit its format: k must be a positive multiple of " +
                                std::to_string(multiple));
  }
  if (activation == ActivationFormat::kF32) return static_cast<size_t>(k) * (format == WeightFormat::kF32 ? 4 : 2);
  return static_cast<size_t>(k / multiple) * chunk_layout(format).source_bytes;
}

size_t row_block_bytes(WeightFormat format, int32_t k) { return kBlockRows * source_row_bytes(format, k); }

size_t packed_bytes(WeightFormat format, int32_t n, int32_t k) {
  if (n <= 0) throw std::invalid_argument("a weight matrix needs at least one row, got n = " + std::to_string(n));
  return (static_cast<size_t>(n) + kBlockRows - 1) / kBlockRows * row_block_bytes(format, k);
}

size_t activation_row_bytes(ActivationFormat format, int32_t k) { return activation_layout(format, k).bytes; }

void pack_rows(WeightFormat format, const uint8_t* source, int32_t n, int32_t k, uint8_t* packed, int32_t block_begin,
               int32_t block_end) {
  const PackBlock pack = block_packer(format);
  const size_t row_bytes = source_row_bytes(format, k);
  for (int32_t block = block_begin; block < block_end; ++block) {
    const int32_t row = block * kBlockRows;
    pack(source + static_cast<size_t>(row) * row_bytes, row_bytes, std::min(n - row, kBlockRows), k,
         packed + static_cast<size_t>(block) * kBlockRows * row_bytes);
  }
}

}  // namespace tokenmill
