#include "kernels/head_screen.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

namespace tokenmill {
namespace {

constexpr int kQuads = 8, kVector = 64;
constexpr int kStep = 8;  // codes of the head to one of the screen

// The value of a finite half.
double half_value(uint16_t half) {
  const int exponent = (half >> 10) & 31, mantissa = half & 1023;
  const double magnitude = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  return (half & 0x8000) != 0 ? -magnitude : magnitude;
}

// kStep times a half, exact; infinity where that is no half.
uint16_t times_step(uint16_t half) {
  const uint32_t sign = half & 0x8000U;
  uint32_t exponent = (half >> 10) & 31U, mantissa = half & 1023U;
  if (exponent >= 28) return static_cast<uint16_t>(sign | 0x7c00U);
  if (exponent > 0) return static_cast<uint16_t>(half + (3U << 10));
  mantissa *= kStep;
  if (mantissa < 1024) return static_cast<uint16_t>(sign | mantissa);
  for (exponent = 1; mantissa >= 2048; mantissa >>= 1) ++exponent;
  return static_cast<uint16_t>(sign | (exponent << 10) | (mantissa & 1023U));
}

// One group of 16 rows. Codes go from -16 to 15 steps, so the side that has the larger values gets the -16.
struct Group {
  int16_t flip[kBlockRows];      // 1 where the scale is negated
  int16_t largest[kBlockRows];   // |code|
  int16_t residual[kBlockRows];  // largest |code - kStep * screen code|
};

// Largest of the four bytes of each row.
void reduce_rows(const int16_t (&bytes)[kVector], int16_t (&rows)[kBlockRows]) {
  for (int r = 0; r < kBlockRows; ++r) {
    rows[r] = std::max(std::max(bytes[4 * r], bytes[4 * r + 1]), std::max(bytes[4 * r + 2], bytes[4 * r + 3]));
  }
}

Group screen_group(const uint8_t* codes8, uint8_t* codes4, uint8_t* codes1) {
  Group group{};
  int16_t above[kVector] = {}, below[kVector] = {}, residual[kVector] = {}, sign[kVector];
  for (int j = 0; j < kQuads; ++j) {
    for (int b = 0; b < kVector; ++b) {
      const int16_t code = static_cast<int16_t>(codes8[kVector * j + b] - 128);
      above[b] = std::max(above[b], code);
      below[b] = std::max(below[b], static_cast<int16_t>(-code));
    }
  }
  int16_t most_below[kBlockRows];
  reduce_rows(above, group.largest);
  reduce_rows(below, most_below);
  for (int r = 0; r < kBlockRows; ++r) {
    group.flip[r] = group.largest[r] > most_below[r] ? 1 : 0;
    group.largest[r] = std::max(group.largest[r], most_below[r]);
    for (int i = 0; i < 4; ++i) sign[4 * r + i] = static_cast<int16_t>(1 - 2 * group.flip[r]);
  }
  uint8_t screen[kQuads][kVector];
  for (int j = 0; j < kQuads; ++j) {
    for (int b = 0; b < kVector; ++b) {
      const int16_t code = static_cast<int16_t>((codes8[kVector * j + b] - 128) * sign[b]);
      const int16_t coarse = std::clamp<int16_t>(static_cast<int16_t>((code + kStep / 2) >> 3), -16, 15);
      const int16_t off = static_cast<int16_t>(code - kStep * coarse);
      residual[b] = std::max(residual[b], std::max(off, static_cast<int16_t>(-off)));
      screen[j][b] = static_cast<uint8_t>(coarse + 16);
    }
  }
  reduce_rows(residual, group.residual);
  std::memset(codes1, 0, kVector);
  for (int j = 0; j < kQuads / 2; ++j) {
    for (int b = 0; b < kVector; ++b) {
      const int low = screen[j][b], high = screen[j + kQuads / 2][b];
      codes4[kVector * j + b] = static_cast<uint8_t>((low & 15) | ((high & 15) << 4));
      codes1[b] = static_cast<uint8_t>(codes1[b] | ((low >> 4) << j) | ((high >> 4) << (j + kQuads / 2)));
    }
  }
  return group;
}

float rounded_up(double x) {
  const float nearest = static_cast<float>(x);
  return nearest < x ? std::nextafter(nearest, std::numeric_limits<float>::infinity()) : nearest;
}

}  // namespace

void make_screen(const PackedWeight& head, uint8_t* screen, float* bounds, int32_t block_begin, int32_t block_end) {
  const size_t head_bytes = row_block_bytes(head.format, head.k), screen_bytes = row_block_bytes(kScreenFormat, head.k);
  // Each of the two sums rounds once for a product and once for an addition of every group, and once a segment; the
  // factor 2 is for the products of these errors.
  const double rounding = 2.0 * (2.0 * (head.k / kGroupColumns) + head.k / kSegmentColumns + 4.0) * 0x1p-24;
  for (int32_t block = block_begin; block < block_end; ++block) {
    const uint8_t* from = head.data + static_cast<size_t>(block) * head_bytes;
    uint8_t* to = screen + static_cast<size_t>(block) * screen_bytes;
    double off[kBlockRows] = {}, size[kBlockRows] = {};  // squares of |e| and of the largest weights' norm
    for (int32_t column = 0; column < head.k; column += kChunkColumns) {
      const int groups = std::min(kChunkColumns, head.k - column) / kGroupColumns;
      const ChunkPlanes fine = chunk_planes(chunk_layout(head.format), groups), coarse = chunk_planes(chunk_layout(kScreenFormat), groups);
      for (int g = 0; g < groups; ++g) {
        const Group group = screen_group(from + fine.codes8 + 512 * g, to + coarse.codes4 + 256 * g, to + coarse.codes1 + 64 * g);
        for (int r = 0; r < kBlockRows; ++r) {
          uint16_t scale;
          std::memcpy(&scale, from + fine.d + 32 * g + 2 * r, 2);
          const auto step = static_cast<uint16_t>(times_step(scale) ^ (group.flip[r] << 15));
          std::memcpy(to + coarse.d + 32 * g + 2 * r, &step, 2);
          const bool usable = (step & 0x7c00) != 0x7c00;
          const double d = usable ? half_value(scale) : std::numeric_limits<double>::infinity();
          // Infinity times zero would be NaN, which a comparison may take for small.
          off[r] += usable ? (d * group.residual[r]) * (d * group.residual[r]) : d;
          size[r] += usable ? (d * group.largest[r]) * (d * group.largest[r]) : d;
        }
      }
      from += fine.bytes;
      to += coarse.bytes;
    }
    for (int r = 0; r < kBlockRows && block * kBlockRows + r < head.n; ++r) {
      const double e = std::sqrt(off[r]);
      bounds[block * kBlockRows + r] = rounded_up(e + rounding * (2.0 * std::sqrt(size[r]) + e));
    }
  }
}

double screen_norm(const uint8_t* x, int32_t k) {
  const auto* codes = reinterpret_cast<const int8_t*>(x);
  const auto* scales = reinterpret_cast<const float*>(x + activation_layout(ActivationFormat::kInt8Group32, k).scales);
  double sum = 0.0;
  for (int32_t g = 0; g < k / kGroupColumns; ++g) {
    int32_t magnitude = 0;
    for (int i = 0; i < kGroupColumns; ++i) magnitude += std::abs(static_cast<int32_t>(codes[kGroupColumns * g + i]));
    const double h = static_cast<double>(scales[g]) * magnitude;
    sum += h * h;
  }
  // A group of NaN has codes of zero, but its scale is NaN, and so is the product.
  return std::sqrt(sum) * (1.0 + 1e-12);
}

}  // namespace tokenmill
