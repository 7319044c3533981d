// Device primitives: PTX for which CUDA has no intrinsic, loads and stores of every type, warp
// reductions. With MMI_SHIM, mmi_emulator's shim_device.h replaces the device.
#pragma once

#include "kernel_parameters.h"

#ifdef MMI_SHIM
#include "shim_device.h"
#endif

namespace mmi {

constexpr unsigned kAll = 0xffffffffu;  // lanes of a warp

#ifndef MMI_SHIM
#define MMI_DEVICE __device__ __forceinline__
#define MMI_SHARED(Type, name, count) __shared__ Type name[count]

MMI_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
MMI_DEVICE float inverse_of(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
MMI_DEVICE float to_float(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
// Two numbers rounded and packed, `low` in the lower 16 bits.
MMI_DEVICE unsigned pack(Half, float low, float high) {
  unsigned y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
MMI_DEVICE unsigned pack(BFloat16, float low, float high) {
  unsigned y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
// The 16 bytes at base + 16 * unit, with one multiply-add for the 64-bit address. Volatile, so that
// the compiler issues several loads before the first result is used.
MMI_DEVICE uint4 gather(const void* base, unsigned unit) {
  uint4 x;
  asm volatile(
      "{\n .reg .u64 at;\n mad.wide.u32 at, %5, 16, %4;\n"
      " ld.global.nc.v4.u32 {%0, %1, %2, %3}, [at];\n}"
      : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
      : "l"(base), "r"(unit));
  return x;
}
// The 16 bytes at `from`, which no other load reads again. Volatile as `gather` is.
MMI_DEVICE uint4 stream(const uint4* from) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from));
  return x;
}
// a b + c, rounded, on two numbers of a type at a time.
MMI_DEVICE unsigned fma_pairs(Half, unsigned a, unsigned b, unsigned c) {
  unsigned y;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  return y;
}
MMI_DEVICE unsigned fma_pairs(BFloat16, unsigned a, unsigned b, unsigned c) {
  unsigned y;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  return y;
}
#define MMI_MMA(TYPE)                                                                      \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                      \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"      \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                            \
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1))
// c += a b on the tensor cores, by all lanes of a warp.
MMI_DEVICE void multiply(Half, float (&c)[4], uint4 a, unsigned b0, unsigned b1) {
  MMI_MMA("f16");
}
MMI_DEVICE void multiply(BFloat16, float (&c)[4], uint4 a, unsigned b0, unsigned b1) {
  MMI_MMA("bf16");
}
#undef MMI_MMA
#endif  // MMI_SHIM

MMI_DEVICE int lane_of() { return threadIdx.x % kLanes; }

MMI_DEVICE unsigned long long product(unsigned a, unsigned b) {
  return static_cast<unsigned long long>(a) * b;
}

MMI_DEVICE float to_float(float x) { return x; }
MMI_DEVICE float to_float(BFloat16 x) { return __uint_as_float(unsigned{x.bits} << 16); }
MMI_DEVICE unsigned pack(float, float weight, float) { return __float_as_uint(weight); }

template <class T>
MMI_DEVICE float load(const T* from) { return to_float(*from); }

template <class T>
MMI_DEVICE float2 load_pair(const T* from) {
  const unsigned both = __ldg(reinterpret_cast<const unsigned*>(from));
  const T x{static_cast<unsigned short>(both)}, y{static_cast<unsigned short>(both >> 16)};
  return make_float2(to_float(x), to_float(y));
}
MMI_DEVICE float2 load_pair(const float* from) {
  return __ldg(reinterpret_cast<const float2*>(from));
}

template <class T>
MMI_DEVICE void store(T* to, const float (&x)[4]) {  // four channels, at a multiple of four
  *reinterpret_cast<uint2*>(to) = make_uint2(pack(T{}, x[0], x[1]), pack(T{}, x[2], x[3]));
}
MMI_DEVICE void store(float* to, const float (&x)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
}

MMI_DEVICE void store_one(float* to, float x) { *to = x; }
template <class T>
MMI_DEVICE void store_one(T* to, float x) {
  to->bits = static_cast<unsigned short>(pack(T{}, x, 0.0f));
}

MMI_DEVICE float warp_maximum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) x = fmaxf(x, __shfl_xor_sync(kAll, x, step));
  return x;
}
MMI_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(kAll, x, step);
  return x;
}

}  // namespace mmi
