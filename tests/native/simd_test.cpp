// The lane operations of every path against the portable path, bit for bit.
#include <cmath>
#include <cstring>

#include "paths.h"
#include "platform/per_isa.h"
#include "simd_operations.h"

namespace tokenmill {
TM_DEFINE_DISPATCH(SimdTable, simd_test)
}  // namespace tokenmill

using namespace tokenmill;

int main() {
  const FloatEnvironment environment;
  Checks checks;
  std::mt19937 random(11);
  print_paths();
  std::normal_distribution<float> normal;
  for (int round = 0; round < 200; ++round) {
    SimdInputs in{};
    for (int lane = 0; lane < 16; ++lane) {
      // Magnitudes from subnormal to large, zeros of both signs, equal pairs.
      const float exponent = static_cast<float>(static_cast<int>(random() % 60) - 30);
      in.a[lane] = random() % 11 == 0 ? 0.0f : normal(random) * std::exp2(exponent);
      in.b[lane] = random() % 7 == 0 ? in.a[lane] : random() % 13 == 0 ? -0.0f : normal(random) * std::exp2(-exponent);
      in.c[lane] = normal(random) * 20;
      in.i[lane] = static_cast<int32_t>(random()) >> (random() % 8 + 17);  // products fit int32
      in.j[lane] = static_cast<int32_t>(random()) >> (random() % 8 + 17);  // products fit int32
      in.table[lane] = static_cast<uint8_t>(random());
    }
    for (int byte = 0; byte < 64; ++byte) {
      in.bytes[byte] = static_cast<uint8_t>(round == 0 ? 255 : random());
      in.low4[byte] = static_cast<uint8_t>(random() & 15);
      in.codes6[byte] = static_cast<uint8_t>(round == 0 ? 63 : random() & 63);
    }
    int8_t quad[4];
    for (int8_t& value : quad) value = static_cast<int8_t>(round < 2 ? (round ? -127 : 127) : static_cast<int>(random() % 255) - 127);
    std::memcpy(&in.quad, quad, 4);
    const int16_t pair[2] = {static_cast<int16_t>(static_cast<int>(random() % 8129) - 4064), static_cast<int16_t>(static_cast<int>(random() % 8129) - 4064)};
    std::memcpy(&in.pair, pair, 4);

    std::vector<uint8_t> want(64 * kSimdResults), got(64 * kSimdResults);
    set_active_isa(Isa::kPortable);
    const int used = simd_test().run(in, want.data());
    checks.expect(used > 60 && used <= kSimdResults, "operations run: " + std::to_string(used));
    for (int number = 1; number < kIsaCount; ++number) {
      const Isa isa = static_cast<Isa>(number);
      if (!isa_available(isa)) continue;
      set_active_isa(isa);
      std::fill(got.begin(), got.end(), uint8_t{0});
      simd_test().run(in, got.data());
      for (int entry = 0; entry < used; ++entry) {
        const bool nan = [&] {  // a NaN is equal to any NaN
          for (int lane = 0; lane < 16; ++lane) {
            float x, y;
            std::memcpy(&x, &want[static_cast<size_t>(64 * entry + 4 * lane)], 4);
            std::memcpy(&y, &got[static_cast<size_t>(64 * entry + 4 * lane)], 4);
            if (std::memcmp(&x, &y, 4) != 0 && !(std::isnan(x) && std::isnan(y))) return false;
          }
          return true;
        }();
        checks.expect(nan, std::string(isa_name(isa)) + " operation " + std::to_string(entry) + " round " + std::to_string(round));
      }
    }
  }
  return checks.finish();
}
