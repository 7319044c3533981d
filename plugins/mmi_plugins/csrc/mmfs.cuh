// The CUDA kernels of mmi::MultiImageDeformableAttention: device code alone, for nvcc, NVRTC (no
// header of CUDA's or of the host is needed) and, with MMI_SHIM, g++. docs/mmfs_kernel.md explains.
//
// What makes them fast: a warp works on one output row (b, q, h), or on a share of one. Lanes first
// each own a (visible image, point) pair and take its location, once for all levels; then each owns
// an entry (pair, level) and leaves its corners' weights and cells in shared memory, entries that
// touch the map first. Then all lanes gather, 128 bits a lane, several loads in flight, and sum on
// the tensor cores (sum.cuh).
//
// Letters: b batch, q queries, m images, l levels, h heads, p points, d channels a head, n pool of
// encoded images, s cells of an image, r rows of the tables. A unit is 16 bytes of value.
#pragma once

#include "device.cuh"
#include "location.cuh"
#include "sum.cuh"

namespace mmi {

constexpr int kRowBlocks = 8;    // blocks an SM should hold: 64 registers a thread,
constexpr int kRowLoads = 4;     // which is 4 loads of 128 bits in flight
constexpr int kSplitBlocks = 2;  // 128 registers: a few rows cannot fill an SM,
constexpr int kSplitLoads = 8;   // so that only loads in flight hide latency
constexpr float kLowest = -3.0e38f;  // below every logit; -inf would make NaN of a difference

// What a warp keeps in shared memory.
struct alignas(16) Scratch {
  Corner corner[kTable][4];  // (near y, near x), (near y, far x), (far y, near x), (far y, far x)
  Twofold score[kMaximumLevels * kLanes];
  int4 level[kMaximumLevels];  // height, width, first cell
  int2 image[kLanes];          // slot and table row of a visible image
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

MMI_DEVICE unsigned long long product(unsigned a, unsigned b) {
  return static_cast<unsigned long long>(a) * b;
}

// The number of output row (b, q, h).
MMI_DEVICE unsigned row_of(const Problem& call, int b, int q, int h) {
  return (b * call.q + q) * call.h + h;
}

// Leaves the images of [start, start + 32) that (b, q) sees in `scratch.image`; returns a bit each.
MMI_DEVICE unsigned list_images(const Problem& call, Scratch& scratch, int b, int q, int start) {
  const int at = start + lane_of();
  int slot = -1, position = 0;
  if (at < call.m) {
    const unsigned line = call.position_queries == 1 ? b : b * call.q + q;
    slot = call.image_slot[product(b, call.m) + at];
    position = call.image_position[product(line, call.m) + at];
  }
  const bool seen = static_cast<unsigned>(slot) < static_cast<unsigned>(call.n) &&
                    static_cast<unsigned>(position) - 1 < static_cast<unsigned>(call.r) - 1;
  const unsigned visible = __ballot_sync(kAll, seen);
  const unsigned below = (1u << lane_of()) - 1;
  if (seen) scratch.image[__popc(visible & below)] = make_int2(slot, position);
  __syncwarp();
  return visible;
}

// What every turn reads: the levels and, where all 32 entries of a turn may count, what fp32 lane
// groups read beyond them, which nothing writes later. Visible after the next barrier.
template <class T>
MMI_DEVICE void prepare(const Problem& call, Scratch& scratch, int width) {
  const int lane = lane_of();
  if (sizeof(T) == sizeof(float) && width == kLanes && lane < kTable - kLanes) {
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

// number / divisor where their product is below 2^16, with by = reciprocal(divisor): exact, since
// where 65536 / divisor is whole it may come out as itself or one more, and never as less.
MMI_DEVICE unsigned reciprocal(int divisor) {
  return static_cast<unsigned>(65536.0f * inverse_of(static_cast<float>(divisor))) + 1;
}
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
  const float2 reference = load_pair(call.reference + (call.reference_queries == 1 ? 0u : 2u * q));
  const float2 offset = load_pair(static_cast<const T*>(call.offsets) + product(row, 2 * call.p) +
                                  2 * pair.point);
  const unsigned entry = (pair.position * call.h + h) * call.p + pair.point;
  const float2 table = load_pair(call.offset_table + 2 * entry);
  return {moved_by(reference.x, offset.x, table.x, call),
          moved_by(reference.y, offset.y, table.y, call)};
}

template <class T>
MMI_DEVICE Twofold scored(const Problem& call, const Pair& pair, unsigned row, int h, int level) {
  const int within = level * call.p + pair.point, size = call.l * call.p;
  const unsigned entry = (pair.position * call.h + h) * size + within;
  return two_sum(load(static_cast<const T*>(call.logits) + product(row, size) + within),
                 __ldg(call.logit_table + entry));
}

MMI_DEVICE Twofold from_lane(Twofold x, int lane) {
  return {__shfl_sync(kAll, x.whole, lane), __shfl_sync(kAll, x.rest, lane)};
}

// Adds to `run` what row (b, q, h) sees: of the visible pairs, `width` at a turn (32: the whole
// row), from `first` on in steps of `stride`. A turn stays within 32 images; in the next 32 those
// who share a row go on as they would in one long list, so that shares are equal.
template <class T, bool kWide, int kLoads>
MMI_DEVICE void attend(Running<T, kWide, kLoads>& run, const Problem& call, Scratch& scratch, int b,
                       int q, int h, int first, int stride, int width) {
  const int lane = lane_of();
  const unsigned below = (1u << lane) - 1;
  const unsigned row = row_of(call, b, q, h);
  const unsigned by_points = reciprocal(call.p);
  prepare<T>(call, scratch, width);
  int from = first;
#pragma unroll 1
  for (int start = 0; start < call.m; start += kLanes) {
    const unsigned visible = list_images(call, scratch, b, q, start);
    const int pairs = __popc(visible) * call.p;
#pragma unroll 1
    for (; from < pairs; from += stride) {
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
        const unsigned left = across.near_cell, right = across.far_cell;
        Corner* corner = scratch.corner[place];
        corner[0] = {packed_weight<T>(near * across.near_share), (upper + left) * units};
        corner[1] = {packed_weight<T>(near * across.far_share), (upper + right) * units};
        corner[2] = {packed_weight<T>(far * across.near_share), (lower + left) * units};
        corner[3] = {packed_weight<T>(far * across.far_share), (lower + right) * units};
        __syncwarp();
        run.sum.add(scratch.corner, count);
        __syncwarp();
      }
    }
    from = width == kLanes ? first : from - ((pairs + width - 1) & -width);
    __syncwarp();
  }
}

// Divides by the softmax's total, with the null slot's share: its logit is 0.
struct Finish {
  float scale, null_weight, inverse;

  MMI_DEVICE Finish(float most, float total, int null_slot) {
    // Relative to the larger of the two maxima; one of the shares is 1.
    const float smaller = power(-fabsf(most));
    scale = null_slot && most < 0.0f ? smaller : 1.0f;
    null_weight = !null_slot ? 0.0f : most < 0.0f ? 1.0f : smaller;
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
  T* out = static_cast<T*>(call.output) + product(row_of(call, b, q, h), call.d);
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
MMI_DEVICE void finish_channel(const Problem& call, const Merged& merged, unsigned row, int h,
                               int channel) {
  const Finish finish(merged.most, merged.total, call.null_slot);
  store_one(static_cast<T*>(call.output) + product(row, call.d) + channel,
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
  const unsigned row = row_of(call, b, q, h);
  if (call.parts == 1) {
    finish_channel<T>(call, merged, row, h, channel);
    return;
  }
  float* out = call.partial + (row * call.parts + part) * stride;  // few rows: far below 2^31
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
  const unsigned row = row_of(call, b, q, h);
  const Merged merged(call.partial + row * call.parts * stride, call.parts, stride, channel);
  finish_channel<T>(call, merged, row, h, channel);
}

}  // namespace mmi

// Threads of a block, and the registers that they may take.
#define MMI_ROWS_BOUNDS __launch_bounds__(mmi::kLanes * mmi::kRowWarps, mmi::kRowBlocks)
#define MMI_SPLIT_BOUNDS __launch_bounds__(mmi::kLanes * mmi::kSplitWarps, mmi::kSplitBlocks)

// The kernels of one variant: NAME_rows, NAME_split and NAME_merge.
#define MMI_ROWS_KERNEL(NAME, T, WIDE)                                  \
  extern "C" __global__ void MMI_ROWS_BOUNDS NAME##_rows(               \
      const __grid_constant__ mmi::Problem call) {                      \
    mmi::attend_rows<T, WIDE>(call);                                    \
  }
#define MMI_SPLIT_KERNEL(NAME, T, WIDE)                                 \
  extern "C" __global__ void MMI_SPLIT_BOUNDS NAME##_split(             \
      const __grid_constant__ mmi::Problem call) {                      \
    mmi::attend_split<T, WIDE>(call);                                   \
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
