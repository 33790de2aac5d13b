// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): random words that are a
// function of a counter and a key, so that a draw depends on its request and position and on nothing else (NUMERICS N11).
#pragma once

#include <array>
#include <cstdint>

namespace tokenmill {

using PhiloxWords = std::array<uint32_t, 4>;

inline PhiloxWords philox4x32(PhiloxWords counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53U} * counter[0];
    const uint64_t b = uint64_t{0xCD9E8D57U} * counter[2];
    counter = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)};
    key[0] += 0x9E3779B9U;
    key[1] += 0xBB67AE85U;
  }
  return counter;
}

// What a draw is for; each purpose has its own stream.
enum class DrawPurpose : uint32_t { kToken = 0 };

inline PhiloxWords draw_words(uint64_t seed, uint32_t sample_index, uint32_t position, DrawPurpose purpose) {
  return philox4x32({position, sample_index, static_cast<uint32_t>(purpose), 0},
                    {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
}

// Uniform in [0, 1) with 53 random bits.
inline double draw_uniform(uint64_t seed, uint32_t sample_index, uint32_t position, DrawPurpose purpose) {
  const PhiloxWords words = draw_words(seed, sample_index, position, purpose);
  return (static_cast<double>(words[0] >> 5) * 67108864.0 + static_cast<double>(words[1] >> 6)) / 9007199254740992.0;
}

}  // namespace tokenmill
