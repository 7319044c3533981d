// Weights in int8, float8 (E4M3) and int4 as pairs of Half or BFloat16, exactly and without their
// scale: all numbers of these formats are numbers of both types.
#pragma once

#include "device.cuh"

namespace mmi {

// Formats of a weight. kLoads: loads of 128 bits a lane for kGemvStep input channels; kBlock: input
// channels that share a scale, 0 for a scale per output channel.
struct Int8 { static constexpr int kLoads = 4, kBlock = 0; };  // stored as number + 128
struct Fp8 { static constexpr int kLoads = 4, kBlock = 0; };
template <int kSize>
struct Int4 { static constexpr int kLoads = 2, kBlock = kSize; };  // stored as number + 8

// Two equal numbers of a type, as bits: 1, and a power of two whose last bit is worth 1, so that an
// integer put into its lowest bits is added to it: 1024 with 10 bits, 128 with 7.
MMI_DEVICE unsigned ones(Half) { return 0x3c003c00u; }
MMI_DEVICE unsigned ones(BFloat16) { return 0x3f803f80u; }
MMI_DEVICE unsigned powers(Half) { return 0x64006400u; }
MMI_DEVICE unsigned powers(BFloat16) { return 0x43004300u; }
constexpr unsigned kSigns = 0x80008000u;

// Numbers 2 half and 2 half + 1 of the four in `word`.
MMI_DEVICE unsigned pair_of(Half type, Int8, unsigned word, int half) {
  const unsigned sum = __byte_perm(word, powers(type) | powers(type) >> 8, half ? 0x4342 : 0x4140);
  return fma_pairs(type, sum, ones(type), 0xe480e480u);  // -(1024 + 128)
}
MMI_DEVICE unsigned pair_of(BFloat16 type, Int8, unsigned word, int half) {
  // Seven bits are added to 128. The eighth chooses what is subtracted: 128 if set, else 256.
  const unsigned bytes = __byte_perm(word, word, half ? 0x0302 : 0x0100);  // in lower bytes
  const unsigned sum = (bytes & 0x007f007fu) | powers(type);
  return fma_pairs(type, sum, ones(type), (~bytes & 0x00800080u) | powers(type) | kSigns);
}
// Sign, exponent and fraction move to their places; the product corrects the exponent's bias and
// makes normal numbers of subnormal ones.
MMI_DEVICE unsigned pair_of(Half type, Fp8, unsigned word, int half) {
  const unsigned bytes = __byte_perm(word, word, half ? 0x3020 : 0x1000);  // in upper bytes
  const unsigned moved = (bytes & kSigns) | (bytes >> 1 & 0x3f803f80u);
  return fma_pairs(type, moved, 0x5c005c00u, kSigns);  // 2^8
}
MMI_DEVICE unsigned pair_of(BFloat16 type, Fp8, unsigned word, int half) {
  const unsigned bytes = __byte_perm(word, word, half ? 0x3020 : 0x1000);  // in upper bytes
  const unsigned moved = (bytes & kSigns) | (bytes >> 4 & 0x07f007f0u);
  return fma_pairs(type, moved, 0x7b807b80u, kSigns);  // 2^120
}
// Numbers 2 pair and 2 pair + 1 of the eight in `word`: nibbles `pair` and `pair` + 4.
template <int kSize>
MMI_DEVICE unsigned pair_of(Half type, Int4<kSize>, unsigned word, int pair) {
  const unsigned bits = word >> 8 * (pair / 2);
  if (pair % 2 == 0) {
    const unsigned sum = (bits & 0x000f000fu) | powers(type);
    return fma_pairs(type, sum, ones(type), 0xe408e408u);  // -(1024 + 8)
  }
  // Nibbles four bits up, in a number that is 16 times as large: saves a shift.
  const unsigned sum = (bits & 0x00f000f0u) | powers(type);
  return fma_pairs(type, sum, 0x2c002c00u, 0xd480d480u);  // 1 / 16, -(64 + 8)
}
template <int kSize>
MMI_DEVICE unsigned pair_of(BFloat16 type, Int4<kSize>, unsigned word, int pair) {
  const unsigned sum = (word >> 4 * pair & 0x000f000fu) | powers(type);
  return fma_pairs(type, sum, ones(type), 0xc308c308u);  // -(128 + 8)
}

}  // namespace mmi
