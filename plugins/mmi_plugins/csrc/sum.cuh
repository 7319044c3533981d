// The weighted sum of sampled points: the inner loop.
#pragma once

#include "device.cuh"

namespace mmi {

// Entries of the table of corners: 32 lanes, and those that 5 fp32 lane groups read beyond them.
constexpr int kTable = 35;

// A corner of a sampled point. `weight`: the bits of a float, or high | low << 16 in T. `unit`: the
// cell's place in `value`, in units of 16 bytes.
struct alignas(8) Corner { unsigned weight, unit; };

template <class T>
MMI_DEVICE unsigned packed_weight(float weight) {
  const unsigned high = pack(T{}, weight, 0.0f);
  const T rounded{static_cast<unsigned short>(high)};
  return pack(T{}, weight, weight - to_float(rounded));
}
template <>
MMI_DEVICE unsigned packed_weight<float>(float weight) { return __float_as_uint(weight); }

// Weighted sum of one row over the lanes of a warp, with kLoads loads in flight.
//
// 16-bit T: a tensor-core product in fp32 for every entry. Lane = 4 * octet + corner, where an
// octet is 8 channels: the 128 bits that a lane loads are a fragment of A as they stand. B has the
// weights, each as the sum of two numbers in T. kWide: a second product, for more than 8 octets.
template <class T, bool kWide, int kLoads>
struct WeightedSum {
  static constexpr int kProducts = kWide ? 2 : 1;
  static constexpr int kUnroll = kLoads / kProducts;
  float c[kProducts][4] = {};
  const uint4* base[kProducts];
  unsigned select0, select1;

  MMI_DEVICE WeightedSum(const KernelParameters& call, int h) {
    const int octet = lane_of() >> 2, octets = call.d / 8;
    const uint4* head = static_cast<const uint4*>(call.value) + h * octets;
    // Lanes beyond the last octet load it again, which takes no predicate and no cache line more.
#pragma unroll
    for (int i = 0; i < kProducts; ++i) base[i] = head + min(octet + 8 * i, octets - 1);
    // B[k][n], k = 2 corner + parity (+ 8 for channels 4..7 of an octet): columns 0 and 1 keep the
    // even and odd channels of 0..3, columns 2 and 3 those of 4..7; 4..7 are the same for the low
    // halves. This lane's column is `octet`, and __byte_perm's bytes 4..7 are zero.
    const unsigned half = octet < 4 ? 0x10u : 0x32u;
    const unsigned placed = octet & 1 ? half << 8 | 0x44u : half | 0x4400u;
    select0 = octet & 2 ? 0x4444u : placed;
    select1 = octet & 2 ? placed : 0x4444u;
  }

  MMI_DEVICE void scale(float by) {
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) c[i][j] *= by;
    }
  }

  // Adds the first `count` entries; those up to the next multiple of kUnroll have weight 0.
  MMI_DEVICE void add(const Corner (*table)[4], int count) {
#pragma unroll 1
    for (int first = 0; first < count; first += kUnroll) {
      Corner at[kUnroll];
      uint4 loaded[kUnroll][kProducts];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) at[i] = table[first + i][lane_of() & 3];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
#pragma unroll
        for (int j = 0; j < kProducts; ++j) loaded[i][j] = gather(base[j], at[i].unit);
      }
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const unsigned b0 = __byte_perm(at[i].weight, 0, select0);
        const unsigned b1 = __byte_perm(at[i].weight, 0, select1);
#pragma unroll
        for (int j = 0; j < kProducts; ++j) multiply(T{}, c[j], loaded[i][j], b0, b1);
      }
    }
  }

  // Reduces over the warp: `c[i]` then holds 4 channels from `channel(call, i)`, unless negative.
  MMI_DEVICE void collect() {
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) c[i][j] += __shfl_xor_sync(kAll, c[i][j], 2);
    }
  }
  static MMI_DEVICE int channel(const KernelParameters& call, int i) {
    const int corner = lane_of() & 3, octet = (lane_of() >> 2) + 8 * i;
    return corner < 2 && octet < call.d / 8 ? 8 * octet + 4 * corner : -1;
  }
};

// fp32: lanes in groups of d / 4, a point for each group; left-over lanes repeat the last group.
template <bool kWide, int kLoads>
struct WeightedSum<float, kWide, kLoads> {
  static constexpr int kProducts = 1;
  static constexpr int kUnroll = kLoads / 4;
  float c[1][4] = {};
  const float4* base;
  int group, groups, size;

  MMI_DEVICE WeightedSum(const KernelParameters& call, int h) {
    size = call.d / 4;
    groups = kLanes / size;
    group = min(lane_of() / size, groups - 1);
    base = static_cast<const float4*>(call.value) + h * size + lane_of() % size;
  }

  MMI_DEVICE void scale(float by) {
#pragma unroll
    for (int j = 0; j < 4; ++j) c[0][j] *= by;
  }

  MMI_DEVICE void add(const Corner (*table)[4], int count) {
    for (int first = group; first < count + group; first += kUnroll * groups) {
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const uint4* at = reinterpret_cast<const uint4*>(table[first + i * groups]);
        const uint4 near = at[0], far = at[1];  // weight, unit, weight, unit
        accumulate(near.x, gather(base, near.y));
        accumulate(near.z, gather(base, near.w));
        accumulate(far.x, gather(base, far.y));
        accumulate(far.z, gather(base, far.w));
      }
    }
  }

  MMI_DEVICE void accumulate(unsigned weight, uint4 v) {
    c[0][0] = fmaf(__uint_as_float(weight), __uint_as_float(v.x), c[0][0]);
    c[0][1] = fmaf(__uint_as_float(weight), __uint_as_float(v.y), c[0][1]);
    c[0][2] = fmaf(__uint_as_float(weight), __uint_as_float(v.z), c[0][2]);
    c[0][3] = fmaf(__uint_as_float(weight), __uint_as_float(v.w), c[0][3]);
  }

  MMI_DEVICE void collect() {
    for (int left = groups; left > 1;) {
      const int half = (left + 1) / 2;
      const bool adds = group + half < left;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float other = __shfl_sync(kAll, c[0][j], lane_of() + half * size);
        c[0][j] += adds ? other : 0.0f;
      }
      left = half;
    }
  }
  static MMI_DEVICE int channel(const KernelParameters& call, int) {
    return 4 * lane_of() < call.d ? 4 * lane_of() : -1;
  }
};

}  // namespace mmi
