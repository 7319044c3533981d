// The CUDA kernels of mmi::MultiImageDeformableAttention: device code alone, for nvcc, NVRTC (which
// has no header of CUDA or of the host) and, with MMI_SHIM, g++. See docs/mmfs_kernel.md.
//
// What makes them fast: a warp computes one output row (b, q, h), or a share of one. First each
// lane owns a (visible image, point) pair and computes its location, once for all levels. Then each
// lane owns an entry (pair, level) and writes its corners' weights and cells to shared memory,
// entries that touch the level first. Then all lanes gather, 128 bits a lane, several loads in
// flight, and sum on the tensor cores (sum.cuh).
//
// Letters: b batch, q queries, m image slots, l levels, h heads, p points, d channels per head,
// n encoded images, s feature cells, r table rows.
// A unit is 16 bytes of `value`.
#pragma once

#include "device.cuh"
#include "location.cuh"
#include "sum.cuh"

namespace mmi {

// `rows`: 8 resident blocks on an SM leave 64 registers a thread: 4 loads of 128 bits in flight.
// `split`: few rows cannot fill an SM, so occupancy gives way to loads in flight, which then hide
// the latency: 2 blocks, 128 registers, 8 loads.
constexpr int kRowBlocks = 8, kRowLoads = 4;
constexpr int kSplitBlocks = 2, kSplitLoads = 8;
constexpr float kMinLogit = -3.0e38f;  // below every logit; the difference of two -inf is NaN

// Shared memory of a warp.
struct alignas(16) Scratch {
  Corner corner[kTable][4];  // (near y, near x), (near y, far x), (far y, near x), (far y, far x)
  DoubleFloat score[kMaxLevels * kLanes];
  int4 level[kMaxLevels];  // height, width, first cell
  int2 image[kLanes];          // slot and table row of a visible image
};

// Online softmax and weighted sum of the entries so far, both divided by e^maximum.
template <class T, bool kWide, int kLoads>
struct OnlineSoftmax {
  WeightedSum<T, kWide, kLoads> sum;
  float maximum = kMinLogit;
  float total = 0.0f;  // this lane's share, until `collect`

  MMI_DEVICE OnlineSoftmax(const KernelParameters& call, int h) : sum(call, h) {}

  MMI_DEVICE void raise_maximum(float logit) {
    const float before = maximum;
    maximum = fmaxf(maximum, logit);
    const float by = exp_of(before - maximum);
    total *= by;
    sum.scale(by);
  }
  MMI_DEVICE void collect() {
    total = warp_sum(total);
    sum.collect();
  }
};

// Index of output row (b, q, h).
MMI_DEVICE unsigned row_of(const KernelParameters& call, int b, int q, int h) {
  return (b * call.q + q) * call.h + h;
}

// Writes the images of [start, start + 32) that are visible to (b, q) to `scratch.image`, packed;
// returns a bit for each.
MMI_DEVICE unsigned list_images(const KernelParameters& call, Scratch& scratch, int b, int q,
                                int start) {
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

// Writes to shared memory what every turn reads: the levels and, where a turn may fill all 32
// entries, zeros for those that fp32 lane groups read beyond them, which no turn writes. Visible
// after the next barrier.
template <class T>
MMI_DEVICE void initialise(const KernelParameters& call, Scratch& scratch, int width) {
  const int lane = lane_of();
  if (sizeof(T) == sizeof(float) && width == kLanes && lane < kTable - kLanes) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scratch.corner[kLanes + lane][i] = {0, 0};
  }
  int cells = 0;
#pragma unroll
  for (int level = 0; level < kMaxLevels; ++level) {
    const int height = call.level_height[level], width = call.level_width[level];
    if (lane == level) scratch.level[level] = make_int4(height, width, cells, 0);
    cells += height * width;
  }
}

// number / divisor, exact where number * divisor < 2^16, with by = reciprocal(divisor). The inverse
// is approximate: where 65536 / divisor is whole, reciprocal() is that or one more, never less.
MMI_DEVICE unsigned reciprocal(int divisor) {
  return static_cast<unsigned>(65536.0f * inverse_of(static_cast<float>(divisor))) + 1;
}
MMI_DEVICE int divided(int number, unsigned by) { return static_cast<int>(number * by >> 16); }

// A (visible image, point) pair, by its index: image in `scratch.image` times points, plus point.
struct Pair {
  int slot, position, point;

  MMI_DEVICE Pair(const KernelParameters& call, const Scratch& scratch, int number,
                  unsigned by_points) {
    const int image = divided(number, by_points);
    slot = scratch.image[image].x;
    position = scratch.image[image].y;
    point = number - image * call.p;
  }
};

struct Location {
  DoubleFloat x, y;
};

template <class T>
MMI_DEVICE Location locate(const KernelParameters& call, const Pair& pair, unsigned row, int q,
                           int h) {
  const float2 reference = load_pair(call.reference + (call.reference_queries == 1 ? 0u : 2u * q));
  const float2 offset = load_pair(static_cast<const T*>(call.offsets) + product(row, 2 * call.p) +
                                  2 * pair.point);
  const unsigned entry = (pair.position * call.h + h) * call.p + pair.point;
  const float2 table = load_pair(call.offset_table + 2 * entry);
  return {moved_by(reference.x, offset.x, table.x, call),
          moved_by(reference.y, offset.y, table.y, call)};
}

template <class T>
MMI_DEVICE DoubleFloat scored(const KernelParameters& call, const Pair& pair, unsigned row, int h,
                              int level) {
  const int within = level * call.p + pair.point, size = call.l * call.p;
  const unsigned entry = (pair.position * call.h + h) * size + within;
  return two_sum(load(static_cast<const T*>(call.logits) + product(row, size) + within),
                 __ldg(call.logit_table + entry));
}

MMI_DEVICE DoubleFloat from_lane(DoubleFloat x, int lane) {
  return {__shfl_sync(kAll, x.high, lane), __shfl_sync(kAll, x.low, lane)};
}

// Adds the visible pairs of row (b, q, h) to `run`, `width` in a turn, from pair `first` in steps
// of `stride`; the whole row is (0, 32, 32). A turn stays within 32 images. Warps that share a row
// count pairs through the whole list of images, not anew in every 32: so their shares are equal.
template <class T, bool kWide, int kLoads>
MMI_DEVICE void attend(OnlineSoftmax<T, kWide, kLoads>& run, const KernelParameters& call,
                       Scratch& scratch, int b, int q, int h, int first, int stride, int width) {
  const int lane = lane_of();
  const unsigned below = (1u << lane) - 1;
  const unsigned row = row_of(call, b, q, h);
  const unsigned by_points = reciprocal(call.p);
  initialise<T>(call, scratch, width);
  int from = first;
#pragma unroll 1
  for (int start = 0; start < call.m; start += kLanes) {
    const unsigned visible = list_images(call, scratch, b, q, start);
    const int pairs = __popc(visible) * call.p;
#pragma unroll 1
    for (; from < pairs; from += stride) {
      const int held = min(width, pairs - from), entries = held * call.l;
      // This lane's pair; lanes beyond the last pair repeat the first, and give it no weight.
      const Pair own(call, scratch, lane < held ? from + lane : from, by_points);
      const Location location = locate<T>(call, own, row, q, h);
      const unsigned cells = static_cast<unsigned>(own.slot) * call.s;

      const unsigned by_held = reciprocal(held);  // an entry is level * held + pair
      float maximum = kMinLogit;
#pragma unroll 1
      for (int entry = lane; entry < entries; entry += kLanes) {
        const int level = divided(entry, by_held);
        const Pair pair(call, scratch, from + entry - level * held, by_points);
        const DoubleFloat score = scored<T>(call, pair, row, h, level);
        maximum = fmaxf(maximum, score.high);
        scratch.score[entry] = score;  // read by this lane alone
      }
      run.raise_maximum(warp_maximum(maximum));

#pragma unroll 1
      for (int begin = 0; begin < entries; begin += kLanes) {
        const bool mine = begin + lane < entries;
        const int entry = mine ? begin + lane : begin;
        const int level = divided(entry, by_held), owner = entry - level * held;
        const DoubleFloat score = scratch.score[mine ? entry : lane];
        const float weight = mine ? exp_of(score.high - run.maximum, score.low) : 0.0f;
        run.total += weight;

        const int4 map = scratch.level[level];
        const AxisSample across = sample_axis(from_lane(location.x, owner), map.y);
        const AxisSample down = sample_axis(from_lane(location.y, owner), map.x);
        const bool counts = across.touches && down.touches && weight != 0.0f;
        const unsigned live = __ballot_sync(kAll, counts);
        const int count = __popc(live);
        // Entries that count come first, so that the gather ends after them; the others follow
        // with weight 0, since the gather reads whole groups of kUnroll entries.
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
    // In the list of pairs that goes on with the next 32 images, rounded up to whole turns.
    from = width == kLanes ? first : from - ((pairs + width - 1) & -width);
    __syncwarp();
  }
}

// Division by the softmax's total, the null slot included, whose logit is 0.
struct Normalisation {
  float scale, null_weight, inverse;

  MMI_DEVICE Normalisation(float maximum, float total, int null_slot) {
    // Relative to the larger of maximum and 0, so that no power overflows.
    const float smaller = exp_of(-fabsf(maximum));
    scale = null_slot && maximum < 0.0f ? smaller : 1.0f;
    null_weight = !null_slot ? 0.0f : maximum < 0.0f ? 1.0f : smaller;
    const float whole = fmaf(total, scale, null_weight);
    inverse = whole == 0.0f ? 0.0f : inverse_of(whole);  // a row without a visible image is 0
  }
  MMI_DEVICE float operator()(float sum, float null_value) const {
    return fmaf(sum, scale, null_weight * null_value) * inverse;
  }
};

// Kernel for many rows: a warp for each. Grid (q / kRowWarps, h, b).
template <class T, bool kWide>
MMI_DEVICE void attend_rows(const KernelParameters& call) {
  MMI_SHARED(Scratch, scratch, kRowWarps);
  const int warp = threadIdx.x / kLanes;
  const int b = blockIdx.z, q = blockIdx.x * kRowWarps + warp, h = blockIdx.y;
  if (q >= call.q) return;
  OnlineSoftmax<T, kWide, kRowLoads> run(call, h);
  attend(run, call, scratch[warp], b, q, h, 0, kLanes, kLanes);
  run.collect();
  const Normalisation normalise(run.maximum, run.total, call.null_slot);
  T* out = static_cast<T*>(call.output) + product(row_of(call, b, q, h), call.d);
#pragma unroll
  for (int i = 0; i < run.sum.kProducts; ++i) {
    const int channel = run.sum.channel(call, i);
    if (channel < 0) continue;
    const float4 null =
        __ldg(reinterpret_cast<const float4*>(call.null_value + h * call.d + channel));
    const float(&sum)[4] = run.sum.c[i];
    const float result[4] = {normalise(sum[0], null.x), normalise(sum[1], null.y),
                             normalise(sum[2], null.z), normalise(sum[3], null.w)};
    store(out + channel, result);
  }
}

// One channel of several partial rows (maximum, total, d sums), `stride` floats apart, merged.
struct MergedParts {
  float maximum = kMinLogit, total = 0.0f, sum = 0.0f;

  MMI_DEVICE MergedParts(const float* partial, int count, int stride, int channel) {
    for (int i = 0; i < count; ++i) maximum = fmaxf(maximum, partial[i * stride]);
    for (int i = 0; i < count; ++i) {
      const float by = exp_of(partial[i * stride] - maximum);
      total = fmaf(partial[i * stride + 1], by, total);
      sum = fmaf(partial[i * stride + 2 + channel], by, sum);
    }
  }
};

template <class T>
MMI_DEVICE void store_channel(const KernelParameters& call, const MergedParts& merged,
                              unsigned row, int h, int channel) {
  const Normalisation normalise(merged.maximum, merged.total, call.null_slot);
  store_one(static_cast<T*>(call.output) + product(row, call.d) + channel,
            normalise(merged.sum, __ldg(call.null_value + h * call.d + channel)));
}

// Kernel for few rows: the warps of a block, and `parts` blocks, share a row.
// Grid (q * parts, h, b).
template <class T, bool kWide>
MMI_DEVICE void attend_split(const KernelParameters& call) {
  MMI_SHARED(Scratch, scratch, kSplitWarps);
  MMI_SHARED(float, partial, kSplitWarps * (kMaxChannels + 2));
  const int warp = threadIdx.x / kLanes;
  const int b = blockIdx.z, q = blockIdx.x / call.parts, h = blockIdx.y;
  const int part = blockIdx.x % call.parts, stride = call.d + 2;
  OnlineSoftmax<T, kWide, kSplitLoads> run(call, h);
  attend(run, call, scratch[warp], b, q, h, (part * kSplitWarps + warp) * kSplitPairs,
         call.parts * kSplitWarps * kSplitPairs, kSplitPairs);
  run.collect();
  float* mine = partial + warp * stride;
  if (lane_of() == 0) {
    mine[0] = run.maximum;
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
  const MergedParts merged(partial, kSplitWarps, stride, channel);
  const unsigned row = row_of(call, b, q, h);
  if (call.parts == 1) {
    store_channel<T>(call, merged, row, h, channel);
    return;
  }
  float* out = call.partial + (row * call.parts + part) * stride;  // rows are few: far below 2^31
  if (channel == 0) {
    out[0] = merged.maximum;
    out[1] = merged.total;
  }
  out[2 + channel] = merged.sum;
}

// Kernel that merges the parts of a row. Grid (q, h, b), a thread for each channel.
template <class T>
MMI_DEVICE void merge_parts(const KernelParameters& call) {
  const int b = blockIdx.z, q = blockIdx.x, h = blockIdx.y, channel = threadIdx.x;
  if (channel >= call.d) return;
  const int stride = call.d + 2;
  const unsigned row = row_of(call, b, q, h);
  const MergedParts merged(call.partial + row * call.parts * stride, call.parts, stride, channel);
  store_channel<T>(call, merged, row, h, channel);
}

}  // namespace mmi

// Threads of a block, and resident blocks, which bound the registers of a thread.
#define MMI_ROWS_BOUNDS __launch_bounds__(mmi::kLanes * mmi::kRowWarps, mmi::kRowBlocks)
#define MMI_SPLIT_BOUNDS __launch_bounds__(mmi::kLanes * mmi::kSplitWarps, mmi::kSplitBlocks)

// The kernels of one variant: NAME_rows, NAME_split and NAME_merge.
#define MMI_ROWS_KERNEL(NAME, T, WIDE)                             \
  extern "C" __global__ void MMI_ROWS_BOUNDS NAME##_rows(          \
      const __grid_constant__ mmi::KernelParameters call) {        \
    mmi::attend_rows<T, WIDE>(call);                               \
  }
#define MMI_SPLIT_KERNEL(NAME, T, WIDE)                            \
  extern "C" __global__ void MMI_SPLIT_BOUNDS NAME##_split(        \
      const __grid_constant__ mmi::KernelParameters call) {        \
    mmi::attend_split<T, WIDE>(call);                              \
  }
#define MMI_MERGE_KERNEL(NAME, T, WIDE)                            \
  extern "C" __global__ void __launch_bounds__(mmi::kMaxChannels)  \
      NAME##_merge(const __grid_constant__ mmi::KernelParameters call) { \
    mmi::merge_parts<T>(call);                                     \
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
