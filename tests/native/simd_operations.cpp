// Compiled once per path: every operation of simd.h on the same inputs.
#include "simd_operations.h"

#include "kernels/simd.h"

namespace tokenmill::TM_ISA {
namespace {

struct Sink {
  uint8_t* out;
  int used = 0;
  void put(F32x16 x) { store(reinterpret_cast<float*>(out + 64 * used++), x); }
  void put(I32x16 x) { store(reinterpret_cast<int32_t*>(out + 64 * used++), x); }
  void put(U8x64 x) { store_u8x64(out + 64 * used++, x); }
  void put(float x) { memcpy(out + 64 * used++, &x, 4); }
  void put(int32_t x) { memcpy(out + 64 * used++, &x, 4); }
};

constexpr int kCounts[] = {0, 1, 5, 7, 8, 9, 13, 15, 16};
constexpr float kSpecial[] = {0.0f, -0.0f, 0.5f, -126.0f, -126.5f, -200.0f, 127.0f, 127.25f, -1e30f, -__builtin_inff()};

int run(const SimdInputs& in, uint8_t* out) {
  Sink sink{out};
  const F32x16 a = load(in.a), b = load(in.b), c = load(in.c);
  const I32x16 i = load(in.i), j = load(in.j);
  const U8x64 bytes = load_u8x64(in.bytes), low4 = load_u8x64(in.low4), codes6 = load_u8x64(in.codes6);
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(in.bytes);
  sink.put(zero_f32());
  sink.put(set1(in.a[3]));
  for (int n : kCounts) {
    sink.put(load_first(in.a, n));
    sink.put(keep_first(a, n, b));
    store_first(reinterpret_cast<float*>(out + 64 * sink.used++), a, n);
  }
  sink.put(add(a, b));
  sink.put(sub(a, b));
  sink.put(mul(a, b));
  sink.put(div(a, b));
  sink.put(fma(a, b, c));
  sink.put(max(a, b));
  sink.put(min(a, b));
  sink.put(abs(a));
  sink.put(sqrt(abs(a)));
  sink.put(select_less(a, b, b, c));
  sink.put(static_cast<int32_t>(less_bits(a, b)));
  const F32x16 moderate = min(set1(1e5f), max(set1(-1e5f), mul(c, set1(37.5f))));
  sink.put(round_even(moderate));
  sink.put(to_i32(moderate));
  sink.put(to_f32(i));
  sink.put(bits_as_f32(i));
  sink.put(bits_as_i32(a));
  sink.put(zero_i32());
  sink.put(set1_i32(in.quad));
  sink.put(add(i, j));
  sink.put(sub(i, j));
  sink.put(mul(i, j));
  sink.put(max(i, j));
  sink.put(bit_and(i, j));
  sink.put(reduce_max(i));
  const I32x16 many[16] = {i, j, add(i, j), i, sub(i, j), j, j, i, i, sub(j, i), j, i, mul(i, j), i, j, i};
  sink.put(reduce_add(i));
  sink.put(reduce_max_each(many));
  sink.put(add_pairs(i, j));
  sink.put(shift_left<3>(i));
  sink.put(load_bf16(halves));
  F32x16 even, odd;
  load_bf16_pairs(in.bytes, even, odd);
  sink.put(even);
  sink.put(odd);
  // fp16: finite inputs only (NaN payloads may differ), from rounding floats.
  alignas(64) uint16_t rounded[32];
  store_f16(rounded, a);
  store_f16(rounded + 16, c);
  sink.put(load_u8x64(rounded));
  sink.put(load_f16(rounded));
  load_f16_pairs(rounded, even, odd);
  sink.put(even);
  sink.put(odd);
  sink.put(load_i8_as_i32(reinterpret_cast<const int8_t*>(in.bytes)));
  sink.put(load_u8_as_i32(in.bytes + 16));
  sink.put(load_u8_as_i16_pairs(in.bytes + 32));
  const int8_t* codes = reinterpret_cast<const int8_t*>(in.bytes);
  sink.put(narrow_to_i8(load_i8_as_i32(codes + 16), load_i8_as_i32(codes), load_i8_as_i32(codes + 48), load_i8_as_i32(codes + 32)));
  const U8x64 blocks[4] = {bytes, codes6, bit_xor(bytes, codes6), low4};
  sink.put(sums_of_16(blocks));
  sink.put(set1_u8(in.bytes[5]));
  sink.put(bit_and(bytes, codes6));
  sink.put(bit_or(bytes, codes6));
  sink.put(bit_xor(bytes, codes6));
  sink.put(shift_right_u16<3>(bytes));
  sink.put(shift_left_u16<5>(bytes));
  sink.put(lookup16(in.table, low4));
  sink.put(dot4<8>(i, bytes, in.quad));
  sink.put(dot4<6>(i, codes6, in.quad));
  sink.put(dot2(j, load_u8_as_i16_pairs(in.bytes), in.pair));
  const I32x16 multiplier = as_multiplier(load_i8_as_i32(reinterpret_cast<const int8_t*>(in.bytes)));
  sink.put(multiply_add<false>(j, i, multiplier));
  sink.put(multiply_add<true>(j, sums_of_16(blocks), multiplier));
  sink.put(abs_i8(narrow_to_i8(load_i8_as_i32(codes + 16), load_i8_as_i32(codes), load_i8_as_i32(codes + 48), load_i8_as_i32(codes + 32))));
  sink.put(keep_first(lanes_down<8>(a), 8, b));
  sink.put(keep_first(lanes_down<4>(a), 12, b));
  sink.put(keep_first(lanes_down<2>(a), 14, b));
  sink.put(keep_first(lanes_down<1>(a), 15, b));
  sink.put(first_lane(c));
  sink.put(reduce_add(a));
  sink.put(reduce_max(a));
  sink.put(exp2(min(set1(127.0f), c)));
  for (float special : kSpecial) sink.put(exp2(set1(special)));
  return sink.used;
}

}  // namespace

extern const SimdTable simd_test_table = {run};

}  // namespace tokenmill::TM_ISA
