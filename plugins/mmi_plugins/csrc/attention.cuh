// The CUDA kernels of mmi::MultiImageDeformableAttention: device code alone, for nvcc, NVRTC (no
// header of CUDA's or of the host is needed) and, with MMI_SHIM, g++. docs/mmfs_kernel.md explains.
//
// What makes them fast: a warp works on one output row (b, q, h), or on a share of one. Lanes first
// each own a (visible image, point) pair and take its location, once for all levels; then each owns
// an entry (pair, level) and leaves its corners' weights and cells in shared memory, entries that
// touch the map first. Then all lanes gather, 128 bits a lane, several loads in flight. For 16-bit
// values the weighted sum is a tensor-core product in fp32: the four lanes of a quad hold the four
// corners of a point, so a load is an A fragment as it stands, and the weights are B, split into a
// high and a low half so that they keep 22 bits (fp16) or 16 (bf16). For fp32 values it is FMAs.
//
// Letters: b batch, q queries, m images, l levels, h heads, p points, d channels per head, n pool of
// encoded images, s feature cells of one image, r rows of the tables. A unit is 16 bytes of value.
#pragma once

#include "problem.h"

#ifdef MMI_SHIM
#include "shim/device.h"
#endif

namespace mmi {

constexpr int kTable = 40;          // entries: 32 lanes, and what fp32 lane groups read beyond
constexpr int kRowBlocks = 8;       // blocks an SM should hold: 64 registers a thread,
constexpr int kRowLoads = 4;        // which is 4 loads of 128 bits in flight
constexpr int kSplitBlocks = 2;     // 128 registers: a few rows cannot fill an SM,
constexpr int kSplitLoads = 8;      // so that only loads in flight hide latency
constexpr float kLowest = -3.0e38f; // below every logit; -inf would make NaN of a difference
constexpr unsigned kAll = 0xffffffffu;

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
// The 16 bytes at base + 16 * unit: one multiply-add for the 64-bit address. Volatile, so that
// several are on their way before the first is used.
MMI_DEVICE uint4 gather(const void* base, unsigned unit) {
  uint4 x;
  asm volatile(
      "{\n .reg .u64 at;\n mad.wide.u32 at, %5, 16, %4;\n"
      " ld.global.nc.v4.u32 {%0, %1, %2, %3}, [at];\n}"
      : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
      : "l"(base), "r"(unit));
  return x;
}
#define MMI_MMA(TYPE)                                                                      \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                      \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"      \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                            \
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1))
// c += a b on the tensor cores, by all lanes together.
MMI_DEVICE void multiply(Half, float (&c)[4], uint4 a, unsigned b0, unsigned b1) {
  MMI_MMA("f16");
}
MMI_DEVICE void multiply(BFloat16, float (&c)[4], uint4 a, unsigned b0, unsigned b1) {
  MMI_MMA("bf16");
}
#undef MMI_MMA
#endif  // MMI_SHIM

MMI_DEVICE int lane_of() { return threadIdx.x % kLanes; }

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

// e^x to about 1 ulp for x <= 0; 0 below -87, NaN for NaN.
MMI_DEVICE float power(float x, float rest = 0.0f) {
  x = x < -120.0f ? -120.0f : x + rest;
  const float scaled = __fmul_rn(x, 1.44269502f);
  const float lost = fmaf(x, 1.92596303e-8f, fmaf(x, 1.44269502f, -scaled));
  const float y = exp2_fast(scaled);
  return fmaf(y, lost * 0.693147181f, y);
}

// A number as an unevaluated sum of two floats. Plain fp32 locations are 1e-6 pixels off on a map
// 32 wide, which alone costs more than the 1e-6 that fp32 outputs are allowed.
struct Twofold { float whole, rest; };

MMI_DEVICE Twofold two_sum(float a, float b) {  // exact (Knuth)
  const float sum = a + b;
  const float part = sum - a;
  return {sum, (a - (sum - part)) + (b - part)};
}

// reference + (offset + table) / base_grid
MMI_DEVICE Twofold moved_by(float reference, float offset, float table, const Problem& call) {
  const Twofold moved = two_sum(offset, table);
  const float step = __fmul_rn(moved.whole, call.inverse_grid);
  const float lost = fmaf(moved.whole, call.inverse_grid, -step) +
                     fmaf(moved.rest, call.inverse_grid, moved.whole * call.inverse_grid_rest);
  const Twofold location = two_sum(reference, step);
  return {location.whole, location.rest + lost};
}

// The two cells that a location lies between along one side of a map, and their shares: 0 outside.
struct Between {
  float near_share, far_share;
  int near_cell, far_cell;  // within the map always
  bool touches;             // either cell is inside
};

MMI_DEVICE Between between(Twofold location, int side) {
  const float length = static_cast<float>(side);
  const float product = __fmul_rn(location.whole, length);
  const float lost = fmaf(location.whole, length, -product) + location.rest * length;
  const float pixel = product - 0.5f;
  const float low = floorf(pixel);
  // Not refloored: bilinear weights just below 0 or above 1 are right to first order.
  const float part = (pixel - low) + lost;
  // Clamped as float, where NaN turns into -2: any location makes a valid integer.
  const int cell = static_cast<int>(fminf(fmaxf(low, -2.0f), length));
  const bool near_inside = static_cast<unsigned>(cell) < static_cast<unsigned>(side);
  const bool far_inside = static_cast<unsigned>(cell + 1) < static_cast<unsigned>(side);
  return {near_inside ? 1.0f - part : 0.0f, far_inside ? part : 0.0f,
          min(max(cell, 0), side - 1), min(max(cell + 1, 0), side - 1),
          near_inside || far_inside};
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

// A corner of a sampled point. `weight` is float bits, or high | low << 16 in T.
struct alignas(8) Corner { unsigned weight, unit; };

template <class T>
MMI_DEVICE unsigned packed_weight(float weight) {
  const unsigned high = pack(T{}, weight, 0.0f);
  const T rounded{static_cast<unsigned short>(high)};
  return pack(T{}, weight, weight - to_float(rounded));
}
template <>
MMI_DEVICE unsigned packed_weight<float>(float weight) { return __float_as_uint(weight); }

// What a warp keeps in shared memory.
struct alignas(16) Scratch {
  Corner corner[kTable][4];  // (near y, near x), (near y, far x), (far y, near x), (far y, far x)
  Twofold score[kMaximumLevels * kLanes];
  int4 level[kMaximumLevels];  // height, width, first cell
  int2 image[kLanes];          // slot and table row of a visible image
};

// The weighted sum of one row over the lanes of a warp; kLoads are in flight together. 16-bit T: lane = 4 * octet + corner, where
// an octet is 8 channels; a second product where a row has more than 8 octets.
template <class T, bool kWide, int kLoads>
struct Sum {
  static constexpr int kProducts = kWide ? 2 : 1;
  static constexpr int kUnroll = kLoads / kProducts;
  float c[kProducts][4] = {};
  const uint4* base[kProducts];
  unsigned select0, select1;

  MMI_DEVICE Sum(const Problem& call, int h) {
    const int octet = lane_of() >> 2, octets = call.d / 8;
    const uint4* head = static_cast<const uint4*>(call.value) + h * octets;
    // Lanes beyond the last octet load it again: no predicate, no further cache line.
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

  // Adds the first `count` entries; those after them, up to a multiple of kUnroll, weigh nothing.
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

  // Afterwards `c[i]` are the four channels from `channel(call, i)` on, in lanes where that is >= 0.
  MMI_DEVICE void collect() {
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) c[i][j] += __shfl_xor_sync(kAll, c[i][j], 2);
    }
  }
  static MMI_DEVICE int channel(const Problem& call, int i) {
    const int corner = lane_of() & 3, octet = (lane_of() >> 2) + 8 * i;
    return corner < 2 && octet < call.d / 8 ? 8 * octet + 4 * corner : -1;
  }
};

// fp32: lanes in groups of d / 4, a point a group; lanes left over double the last group's work.
template <bool kWide, int kLoads>
struct Sum<float, kWide, kLoads> {
  static constexpr int kProducts = 1;
  static constexpr int kUnroll = kLoads / 4;
  float c[1][4] = {};
  const float4* base;
  int group, groups, size;

  MMI_DEVICE Sum(const Problem& call, int h) {
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
  static MMI_DEVICE int channel(const Problem& call, int) {
    return 4 * lane_of() < call.d ? 4 * lane_of() : -1;
  }
};

// Softmax and weighted sum so far: sums are relative to e^most.
template <class T, bool kWide, int kLoads>
struct Running {
  Sum<T, kWide, kLoads> sum;
  float most = kLowest;
  float total = 0.0f;  // this lane's share, until `collect`

  MMI_DEVICE Running(const Problem& call, int h) : sum(call, h) {}

  MMI_DEVICE void raise(float logit) {
    const float before = most;
    most = fmaxf(most, logit);
    const float by = power(before - most);
    total *= by;
    sum.scale(by);
  }
  MMI_DEVICE void collect() {
    total = warp_sum(total);
    sum.collect();
  }
};

// Leaves the images of [start, start + 32) that (b, q) sees in `scratch.image`; returns a bit each.
MMI_DEVICE unsigned list_images(const Problem& call, Scratch& scratch, int b, int q, int start) {
  const int at = start + lane_of();
  int slot = -1, position = 0;
  if (at < call.m) {
    const int query = call.position_queries == 1 ? 0 : q;
    slot = call.image_slot[static_cast<long long>(b) * call.m + at];
    position = call.image_position[(static_cast<long long>(b) * call.position_queries + query) *
                                       call.m + at];
  }
  const bool seen = position > 0 && position < call.r && slot >= 0 && slot < call.n;
  const unsigned visible = __ballot_sync(kAll, seen);
  const unsigned below = (1u << lane_of()) - 1;
  if (seen) scratch.image[__popc(visible & below)] = make_int2(slot, position);
  __syncwarp();
  return visible;
}

// What every turn reads: the levels, and the entries beyond the last, which fp32 lane groups may
// read and nothing writes later. Visible after the next barrier.
MMI_DEVICE void prepare(const Problem& call, Scratch& scratch) {
  const int lane = lane_of();
  if (lane < kTable - kLanes) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scratch.corner[kLanes + lane][i] = {0, 0};
  }
  int cells = 0;
#pragma unroll
  for (int level = 0; level < kMaximumLevels; ++level) {
    const int height = call.level_height[level], width = call.level_width[level];
    if (lane == level) scratch.level[level] = make_int4(height, width, cells, 0);
    cells += height * width;
  }
}

// number / divisor where their product is below 2^16, with by = reciprocal(divisor).
MMI_DEVICE unsigned reciprocal(int divisor) { return 65536u / static_cast<unsigned>(divisor) + 1; }
MMI_DEVICE int divided(int number, unsigned by) { return static_cast<int>(number * by >> 16); }

// A (visible image, point) pair by its number in `scratch.image`.
struct Pair {
  int slot, position, point;

  MMI_DEVICE Pair(const Problem& call, const Scratch& scratch, int number, unsigned by_points) {
    const int image = divided(number, by_points);
    slot = scratch.image[image].x;
    position = scratch.image[image].y;
    point = number - image * call.p;
  }
};

struct Location {
  Twofold x, y;
};

template <class T>
MMI_DEVICE Location locate(const Problem& call, const Pair& pair, unsigned row, int q, int h) {
  const float2 reference =
      load_pair(call.reference + (call.reference_queries == 1 ? 0LL : 2LL * q));
  const float2 offset = load_pair(static_cast<const T*>(call.offsets) +
                                  (static_cast<long long>(row) * call.p + pair.point) * 2);
  const long long entry = static_cast<long long>(pair.position) * call.h + h;
  const float2 table = load_pair(call.offset_table + (entry * call.p + pair.point) * 2);
  return {moved_by(reference.x, offset.x, table.x, call),
          moved_by(reference.y, offset.y, table.y, call)};
}

template <class T>
MMI_DEVICE Twofold scored(const Problem& call, const Pair& pair, unsigned row, int h, int level) {
  const long long entry = static_cast<long long>(pair.position) * call.h + h;
  const int within = level * call.p + pair.point, size = call.l * call.p;
  return two_sum(
      load(static_cast<const T*>(call.logits) + static_cast<long long>(row) * size + within),
      __ldg(call.logit_table + entry * size + within));
}

MMI_DEVICE Twofold from_lane(Twofold x, int lane) {
  return {__shfl_sync(kAll, x.whole, lane), __shfl_sync(kAll, x.rest, lane)};
}

// Adds to `run` what row (b, q, h) sees: of the visible pairs of every 32 images, `width` at a turn,
// from `first` on in steps of `stride`.
template <class T, bool kWide, int kLoads>
MMI_DEVICE void attend(Running<T, kWide, kLoads>& run, const Problem& call, Scratch& scratch, int b,
                       int q, int h, int first, int stride, int width) {
  const int lane = lane_of();
  const unsigned below = (1u << lane) - 1;
  const unsigned row = (static_cast<unsigned>(b) * call.q + q) * call.h + h;
  const unsigned by_points = reciprocal(call.p);
  prepare(call, scratch);
#pragma unroll 1
  for (int start = 0; start < call.m; start += kLanes) {
    const unsigned visible = list_images(call, scratch, b, q, start);
    const int pairs = __popc(visible) * call.p;
#pragma unroll 1
    for (int from = first; from < pairs; from += stride) {
      const int held = min(width, pairs - from), entries = held * call.l;
      // Of this lane's pair; lanes beyond the last double the first.
      const Pair own(call, scratch, lane < held ? from + lane : from, by_points);
      const Location location = locate<T>(call, own, row, q, h);
      const unsigned cells = static_cast<unsigned>(own.slot) * call.s;

      const unsigned by_held = reciprocal(held);  // an entry is level * held + pair
      float most = kLowest;
#pragma unroll 1
      for (int entry = lane; entry < entries; entry += kLanes) {
        const int level = divided(entry, by_held);
        const Pair pair(call, scratch, from + entry - level * held, by_points);
        const Twofold score = scored<T>(call, pair, row, h, level);
        most = fmaxf(most, score.whole);
        scratch.score[entry] = score;  // read by this lane alone
      }
      run.raise(warp_maximum(most));

#pragma unroll 1
      for (int begin = 0; begin < entries; begin += kLanes) {
        const bool mine = begin + lane < entries;
        const int entry = mine ? begin + lane : begin;
        const int level = divided(entry, by_held), owner = entry - level * held;
        const Twofold score = scratch.score[mine ? entry : lane];
        const float weight = mine ? power(score.whole - run.most, score.rest) : 0.0f;
        run.total += weight;

        const int4 map = scratch.level[level];
        const Between across = between(from_lane(location.x, owner), map.y);
        const Between down = between(from_lane(location.y, owner), map.x);
        const bool counts = across.touches && down.touches && weight != 0.0f;
        const unsigned live = __ballot_sync(kAll, counts);
        const int count = __popc(live);
        // Entries that count come first; the others follow with no weight, to fill up the table.
        const int place = counts ? __popc(live & below) : count + __popc(~live & below);
        const float near = counts ? weight * down.near_share : 0.0f;
        const float far = counts ? weight * down.far_share : 0.0f;
        const unsigned units = call.h * call.d * static_cast<unsigned>(sizeof(T)) / 16;  // a cell
        const unsigned level_cells = __shfl_sync(kAll, cells, owner) + map.z;
        const unsigned upper = level_cells + down.near_cell * map.y;
        const unsigned lower = level_cells + down.far_cell * map.y;
        Corner* corner = scratch.corner[place];
        corner[0] = {packed_weight<T>(near * across.near_share), (upper + across.near_cell) * units};
        corner[1] = {packed_weight<T>(near * across.far_share), (upper + across.far_cell) * units};
        corner[2] = {packed_weight<T>(far * across.near_share), (lower + across.near_cell) * units};
        corner[3] = {packed_weight<T>(far * across.far_share), (lower + across.far_cell) * units};
        __syncwarp();
        run.sum.add(scratch.corner, count);
        __syncwarp();
      }
    }
    __syncwarp();
  }
}

// Divides by the softmax's total, with the null slot's share: its logit is 0.
struct Finish {
  float scale, null_weight, inverse;

  MMI_DEVICE Finish(float most, float total, int null_slot) {
    const float top = null_slot ? fmaxf(most, 0.0f) : most;
    scale = power(most - top);
    null_weight = null_slot ? power(-top) : 0.0f;
    const float whole = fmaf(total, scale, null_weight);
    inverse = whole == 0.0f ? 0.0f : inverse_of(whole);  // a row that sees nothing is 0
  }
  MMI_DEVICE float operator()(float sum, float null_value) const {
    return fmaf(sum, scale, null_weight * null_value) * inverse;
  }
};

// Many queries: a warp a row. Grid (q / kRowWarps, h, b).
template <class T, bool kWide>
MMI_DEVICE void attend_rows(const Problem& call) {
  MMI_SHARED(Scratch, scratch, kRowWarps);
  const int warp = threadIdx.x / kLanes;
  const int b = blockIdx.z, q = blockIdx.x * kRowWarps + warp, h = blockIdx.y;
  if (q >= call.q) return;
  Running<T, kWide, kRowLoads> run(call, h);
  attend(run, call, scratch[warp], b, q, h, 0, kLanes, kLanes);
  run.collect();
  const Finish finish(run.most, run.total, call.null_slot);
  T* out = static_cast<T*>(call.output) +
           ((static_cast<long long>(b) * call.q + q) * call.h + h) * call.d;
#pragma unroll
  for (int i = 0; i < run.sum.kProducts; ++i) {
    const int channel = run.sum.channel(call, i);
    if (channel < 0) continue;
    const float4 null =
        __ldg(reinterpret_cast<const float4*>(call.null_value + h * call.d + channel));
    const float result[4] = {finish(run.sum.c[i][0], null.x), finish(run.sum.c[i][1], null.y),
                             finish(run.sum.c[i][2], null.z), finish(run.sum.c[i][3], null.w)};
    store(out + channel, result);
  }
}

// Several partial rows of (most, total, d sums), `stride` floats apart, as one: the channel's sum.
struct Merged {
  float most = kLowest, total = 0.0f, sum = 0.0f;

  MMI_DEVICE Merged(const float* partial, int count, int stride, int channel) {
    for (int i = 0; i < count; ++i) most = fmaxf(most, partial[i * stride]);
    for (int i = 0; i < count; ++i) {
      const float by = power(partial[i * stride] - most);
      total = fmaf(partial[i * stride + 1], by, total);
      sum = fmaf(partial[i * stride + 2 + channel], by, sum);
    }
  }
};

MMI_DEVICE void store_one(float* to, float x) { *to = x; }
template <class T>
MMI_DEVICE void store_one(T* to, float x) {
  to->bits = static_cast<unsigned short>(pack(T{}, x, 0.0f));
}

template <class T>
MMI_DEVICE void finish_channel(const Problem& call, const Merged& merged, long long row, int h,
                               int channel) {
  const Finish finish(merged.most, merged.total, call.null_slot);
  store_one(static_cast<T*>(call.output) + row * call.d + channel,
            finish(merged.sum, __ldg(call.null_value + h * call.d + channel)));
}

// Few queries: the warps of a block, and `parts` blocks, share a row. Grid (q * parts, h, b).
template <class T, bool kWide>
MMI_DEVICE void attend_split(const Problem& call) {
  MMI_SHARED(Scratch, scratch, kSplitWarps);
  MMI_SHARED(float, partial, kSplitWarps * (kMaximumChannels + 2));
  const int warp = threadIdx.x / kLanes;
  const int b = blockIdx.z, q = blockIdx.x / call.parts, h = blockIdx.y;
  const int part = blockIdx.x % call.parts, stride = call.d + 2;
  Running<T, kWide, kSplitLoads> run(call, h);
  attend(run, call, scratch[warp], b, q, h, (part * kSplitWarps + warp) * kSplitPairs,
         call.parts * kSplitWarps * kSplitPairs, kSplitPairs);
  run.collect();
  float* mine = partial + warp * stride;
  if (lane_of() == 0) {
    mine[0] = run.most;
    mine[1] = run.total;
  }
#pragma unroll
  for (int i = 0; i < run.sum.kProducts; ++i) {
    const int channel = run.sum.channel(call, i);
    if (channel < 0) continue;
#pragma unroll
    for (int j = 0; j < 4; ++j) mine[2 + channel + j] = run.sum.c[i][j];
  }
  __syncthreads();
  const int channel = threadIdx.x;
  if (channel >= call.d) return;
  const Merged merged(partial, kSplitWarps, stride, channel);
  const long long row = (static_cast<long long>(b) * call.q + q) * call.h + h;
  if (call.parts == 1) {
    finish_channel<T>(call, merged, row, h, channel);
    return;
  }
  float* out = call.partial + (row * call.parts + part) * stride;
  if (channel == 0) {
    out[0] = merged.most;
    out[1] = merged.total;
  }
  out[2 + channel] = merged.sum;
}

// The parts of a row as one. Grid (q, h, b), a thread a channel.
template <class T>
MMI_DEVICE void merge_parts(const Problem& call) {
  const int b = blockIdx.z, q = blockIdx.x, h = blockIdx.y, channel = threadIdx.x;
  if (channel >= call.d) return;
  const int stride = call.d + 2;
  const long long row = (static_cast<long long>(b) * call.q + q) * call.h + h;
  const Merged merged(call.partial + row * call.parts * stride, call.parts, stride, channel);
  finish_channel<T>(call, merged, row, h, channel);
}

}  // namespace mmi

// The kernels of one variant: NAME_rows, NAME_split and NAME_merge.
#define MMI_ROWS_KERNEL(NAME, T, WIDE)                                                    \
  extern "C" __global__ void __launch_bounds__(mmi::kLanes * mmi::kRowWarps, mmi::kRowBlocks)              \
      NAME##_rows(const __grid_constant__ mmi::Problem call) {                            \
    mmi::attend_rows<T, WIDE>(call);                                                      \
  }
#define MMI_SPLIT_KERNEL(NAME, T, WIDE)                                                   \
  extern "C" __global__ void __launch_bounds__(mmi::kLanes * mmi::kSplitWarps, mmi::kSplitBlocks)            \
      NAME##_split(const __grid_constant__ mmi::Problem call) {                           \
    mmi::attend_split<T, WIDE>(call);                                                     \
  }
#define MMI_MERGE_KERNEL(NAME, T, WIDE)                                                   \
  extern "C" __global__ void __launch_bounds__(mmi::kMaximumChannels)                     \
      NAME##_merge(const __grid_constant__ mmi::Problem call) {                           \
    mmi::merge_parts<T>(call);                                                            \
  }

// Every kernel: X(NAME, T, WIDE).
#define MMI_ROWS_AND_SPLITS(X)                \
  X(mmfs_float32, float, false)               \
  X(mmfs_float16, mmi::Half, false)           \
  X(mmfs_float16_wide, mmi::Half, true)       \
  X(mmfs_bfloat16, mmi::BFloat16, false)      \
  X(mmfs_bfloat16_wide, mmi::BFloat16, true)
#define MMI_MERGES(X)                         \
  X(mmfs_float32, float, false)               \
  X(mmfs_float16, mmi::Half, false)           \
  X(mmfs_bfloat16, mmi::BFloat16, false)
