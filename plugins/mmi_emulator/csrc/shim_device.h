// CUDA's device language for g++, as far as the kernels use it: a fiber for every thread of a
// block, and synchronisation points at barriers, shuffles, votes and tensor-core products.
//
// Fibers run one at a time, from one synchronisation point to the next, by thread index, upwards
// or downwards. So a thread whose barrier is missing reads shared memory before another has written it,
// or overwrites it before another has read it. Every block gets new shared memory, filled with NaN
// bits, each array allocated by itself, so that AddressSanitizer sees every access beyond one.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "half.h"
#include "kernel_parameters.h"

#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define MMI_DEVICE inline
#define MMI_SHARED(Type, name, count) \
  Type* const name = static_cast<Type*>(mmi::shim::shared(sizeof(Type) * (count), __LINE__))

namespace mmi::shim {

struct Index {
  unsigned x, y, z;
};

enum class SyncPoint { kWarp, kBlock, kShuffle, kVote, kMultiply };

// Shared memory of this block: the same for all threads that declare it on one line.
void* shared(size_t bytes, int line);
// Waits for all threads of the warp (of the block). The launch fails where they wait at different
// kinds of points, or where one has left the kernel.
void synchronise(SyncPoint kind);
// synchronise() for a barrier on a line of the source, unless the launch skips that line.
void barrier(SyncPoint kind, int line);
// Sends `bytes` to the other lanes and synchronises; `received(lane)` is then the value of a lane.
void exchange(SyncPoint kind, const void* value, size_t bytes);
const void* received(int lane);
int lane();

template <class T>
T from_lane(T value, int source) {
  exchange(SyncPoint::kShuffle, &value, sizeof value);
  T result;
  std::memcpy(&result, received(source), sizeof result);
  return result;
}

}  // namespace mmi::shim

extern mmi::shim::Index threadIdx, blockIdx;

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using std::max;
using std::min;

template <class T>
T __ldg(const T* from) { return *from; }

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned select) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= unsigned(bytes >> 8 * (select >> 4 * i & 7) & 0xff) << 8 * i;
  }
  return result;
}

inline void __syncwarp(int line = __builtin_LINE()) {
  mmi::shim::barrier(mmi::shim::SyncPoint::kWarp, line);
}
inline void __syncthreads(int line = __builtin_LINE()) {
  mmi::shim::barrier(mmi::shim::SyncPoint::kBlock, line);
}
template <class T>
T __shfl_sync(unsigned, T value, int source) { return mmi::shim::from_lane(value, source & 31); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return mmi::shim::from_lane(value, mmi::shim::lane() ^ mask);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  mmi::shim::exchange(mmi::shim::SyncPoint::kVote, &vote, sizeof vote);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) {
    votes |= unsigned{*static_cast<const bool*>(mmi::shim::received(i))} << i;
  }
  return votes;
}

namespace mmi {

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;  // .ftz
}
inline float inverse_of(float x) { return 1.0f / x; }

inline uint4 gather(const void* base, unsigned unit) {
  return static_cast<const uint4*>(base)[unit];
}
inline uint4 stream(const uint4* from) { return *from; }
unsigned fma_pairs(Half, unsigned a, unsigned b, unsigned c);
unsigned fma_pairs(BFloat16, unsigned a, unsigned b, unsigned c);
inline float to_float(Half x) { return half_to_float(x.bits); }
inline unsigned pack(Half, float low, float high) {
  return float_to_half(low) | unsigned{float_to_half(high)} << 16;
}
inline unsigned pack(BFloat16, float low, float high) {
  return float_to_bfloat16(low) | unsigned{float_to_bfloat16(high)} << 16;
}
void multiply(Half, float (&c)[4], uint4 a, unsigned b0, unsigned b1);
void multiply(BFloat16, float (&c)[4], uint4 a, unsigned b0, unsigned b1);

}  // namespace mmi
