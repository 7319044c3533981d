// The CPU kernel for one instruction set, which the compiler's flags and MMI_VARIANT name.
//
// What makes it fast: nearly all the work is to read four rows of channels for every point. So
// everything else happens first (mmfs_cpu_points.h), for a block of queries at a time, and leaves
// lists of cells and shares: the inner loop has nothing but loads and multiply-adds into registers.
// Levels are read one after the other, so that the rows of a small level stay in the L1 cache while
// a block reads them.
//
// Few queries read the pool in place. Many queries first copy a head's slice of an image into
// contiguous floats: in the pool its rows are h*d numbers apart, often a power of two, so that they
// compete for few cache lines and each takes a memory page of its own.
#include <cstdlib>
#include <memory>

#include "mmfs.h"
#include "mmfs_cpu_points.h"
#include "mmfs_cpu_vector.h"

namespace mmi {
namespace MMI_VARIANT {
namespace {

// Vectors of channels whose sums are held in registers at a time.
#if defined(__aarch64__)
constexpr int kMaxUnits = 16;
#else
constexpr int kMaxUnits = 8;
#endif

// ---- gather and sum ------------------------------------------------------------------------

// A level's cells, `stride` numbers apart.
template <typename T>
struct Cells {
  const T* first;
  int64_t stride;
  int64_t right;  // from a cell to its right neighbour; 0 on a map one cell wide
};

// Adds the corners of each query's points to its sums, in `kUnits` vectors of N channels from `at`.
template <int N, int kUnits, typename T>
void add_channels(const Head& head, const Points& points, const Corners& corners, int count,
                  Cells<T> cells, const Queries& queries, int at, bool rescale) {
  const int p = head.call.p;
  float* sums = queries.sums + at;
  for (int i = 0; i < count; ++i, sums += head.call.d) {
    if (!points.sees[i]) continue;
    typename Vector<N>::Floats sum[kUnits];
    for (int u = 0; u < kUnits; ++u) {
      sum[u] = load<typename Vector<N>::Floats>(sums + u * N);
      if (rescale) sum[u] *= queries.softmax[i].rescale;
    }
    for (int j = i * p; j < (i + 1) * p; ++j) {
      if (corners.upper[j] == kNoCell) continue;
      const T* upper = cells.first + at + corners.upper[j] * cells.stride;
      const T* lower = cells.first + at + corners.lower[j] * cells.stride;
      const T* corner[4] = {upper, upper + cells.right, lower, lower + cells.right};
      for (int c = 0; c < 4; ++c) {
        const float share = corners.share[c][j];
        for (int u = 0; u < kUnits; ++u) sum[u] += share * widened<N>(corner[c] + u * N);
      }
    }
    for (int u = 0; u < kUnits; ++u) store(sums + u * N, sum[u]);
  }
}

// add_channels for `units` vectors of a register each, at most kUnits.
template <int kUnits, typename T, typename... Rest>
MMI_INLINE void add_units(int units, const Rest&... rest) {
  if constexpr (kUnits > 1) {
    if (units < kUnits) return add_units<kUnits - 1, T>(units, rest...);
  }
  add_channels<kWidth, kUnits, T>(rest...);
}

// add_channels for all channels.
template <typename T>
void add_rows(const Head& head, const Points& points, const Corners& corners, int count,
              Cells<T> cells, const Queries& queries, bool rescale) {
  const int d = head.call.d;
  int at = 0;
  while (d - at >= kWidth) {
    const int left = (d - at) / kWidth, units = left < kMaxUnits ? left : kMaxUnits;
    add_units<kMaxUnits, T>(units, head, points, corners, count, cells, queries, at, rescale);
    at += units * kWidth;
  }
  if constexpr (kWidth > kChannelStep) {
    if (at < d) {
      add_channels<kChannelStep, 1>(head, points, corners, count, cells, queries, at, rescale);
    }
  }
}

// ---- one head's queries --------------------------------------------------------------------

// Scratch memory of a thread, kept from call to call.
class Scratch {
 public:
  // At least `bytes` bytes, aligned to a cache line, or nullptr.
  void* take(size_t bytes) {
    if (bytes > held_) {
      memory_.reset();
      void* fresh = nullptr;
      held_ = posix_memalign(&fresh, 64, bytes) == 0 ? bytes : 0;
      memory_.reset(held_ ? fresh : nullptr);
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<void, decltype(&std::free)> memory_{nullptr, &std::free};
  size_t held_ = 0;
};

// Whether `count` queries read each row of a level twice on average, which makes a copy worthwhile.
bool worth_copying(const MmfsCall& call, int32_t count, int level) {
  const int64_t cells = int64_t{call.level_height[level]} * call.level_width[level];
  const int64_t passes = (call.d - 1) / (kMaxUnits * kWidth) + 1;  // over the channels
  return int64_t{count} * call.p * 4 * passes > 2 * cells;
}

template <typename T>
void copy_cells(const Head& head, const T* from, int64_t count, float* to) {
  constexpr int kAhead = 8, kLine = 64 / sizeof(T);
  const int d = head.call.d;
  for (int64_t cell = 0; cell < count; ++cell) {
    // Software prefetch: the hardware prefetcher does not follow so wide a stride.
    const T* soon = from + (cell + kAhead < count ? kAhead : 0) * head.stride;
    for (int c = 0; c < d; c += kLine) __builtin_prefetch(soon + c);
    widen(from, d, to);
    from += head.stride;
    to += d;
  }
}

// Adds image m to the sums of `count` queries; `copy` [s, d] may be nullptr.
template <typename T>
void add_image(const Head& head, int32_t m, int32_t first, int32_t count, const Queries& queries,
          float* copy) {
  const MmfsCall& call = head.call;
  const T* image = head.image<T>(m);
  bool copied[kMaxLevels];
  int64_t start[kMaxLevels], cells = 0;
  for (int l = 0; l < call.l; ++l) {
    start[l] = cells;
    const int64_t area = int64_t{call.level_height[l]} * call.level_width[l];
    copied[l] = copy != nullptr && worth_copying(call, count, l);
    if (copied[l]) {
      copy_cells(head, image + start[l] * head.stride, area, copy + start[l] * call.d);
    }
    cells += area;
  }
  Points points;
  Corners corners;
  TableRow table;
  for (int32_t i = 0; i < count; i += kBlock) {
    const int some = count - i < kBlock ? count - i : kBlock;
    const Queries block = queries.from(i, head);
    list_points(head, m, first + i, some, block, &table, &points);
    for (int l = 0; l < call.l; ++l) {
      const int32_t height = call.level_height[l], width = call.level_width[l];
      find_corners(points, l, some * call.p, height, width, &corners);
      const int64_t beside = width > 1;
      if (copied[l]) {
        const Cells<float> near{copy + start[l] * call.d, call.d, beside * call.d};
        add_rows(head, points, corners, some, near, block, l == 0);
      } else {
        const Cells<T> far{image + start[l] * head.stride, head.stride, beside * head.stride};
        add_rows(head, points, corners, some, far, block, l == 0);
      }
    }
  }
}

template <typename T>
void read_query(const Head& head, int32_t q, const Queries& to) {
  const MmfsCall& call = head.call;
  const T* logits = static_cast<const T*>(call.logits) + head.row(q) * head.entries;
  const T* offsets = static_cast<const T*>(call.offsets) + head.row(q) * call.p * 2;
  float pairs[2 * kMaxPoints];
  widen(logits, head.entries, to.logits);
  widen(offsets, 2 * call.p, pairs);
  for (int j = 0; j < call.p; ++j) {
    to.x[j] = pairs[2 * j];
    to.y[j] = pairs[2 * j + 1];
  }
  // The null slot's logit is 0.
  *to.softmax =
      call.null_slot ? OnlineSoftmax{0.0f, 1.0f, 1.0f} : OnlineSoftmax{kMinLogit, 0.0f, 1.0f};
  const float* null_value = call.null_value + int64_t{head.h} * call.d;
  for (int32_t c = 0; c < call.d; ++c) to.sums[c] = call.null_slot ? null_value[c] : 0.0f;
}

// Queries first to first + count (exclusive).
template <typename T>
void attend(const Head& head, int32_t first, int32_t count, const Queries& queries, float* copy) {
  const MmfsCall& call = head.call;
  constexpr int kAhead = 8;  // prefetch distance: rows of a head are too far apart for the hardware
  for (int32_t i = 0; i < count; ++i) {
    const int64_t soon = head.row(first + (i + kAhead < count ? i + kAhead : i));
    __builtin_prefetch(static_cast<const T*>(call.logits) + soon * head.entries);
    __builtin_prefetch(static_cast<const T*>(call.logits) + (soon + 1) * head.entries - 1);
    __builtin_prefetch(static_cast<const T*>(call.offsets) + soon * call.p * 2);
    read_query<T>(head, first + i, queries.from(i, head));
  }
  for (int32_t m = 0; m < call.m; ++m) {
    if (!head.any_query_sees(m, first, first + count)) continue;
    add_image<T>(head, m, first, count, queries, copy);
  }
  for (int32_t i = 0; i < count; ++i) {
    const float total = queries.softmax[i].total, by = total > 0.0f ? 1.0f / total : 0.0f;
    const float* from = queries.sums + int64_t{i} * call.d;
    T* to = static_cast<T*>(call.output) + head.row(first + i) * call.d;
    const T* soon = to + (i + kAhead < count ? kAhead : 0) * head.stride;
    for (int32_t c = 0; c < call.d; c += 64 / int{sizeof(T)}) __builtin_prefetch(soon + c, 1);
    for (int32_t c = 0; c < call.d; ++c) narrow(from[c] * by, to + c);
  }
}

template <typename T>
void attend(const Head& head, int32_t first, int32_t last) {
  const MmfsCall& call = head.call;
  const int32_t count = last - first;
  static thread_local Scratch scratch;
  if (count > kBlock) {
    const size_t rows = count;
    const size_t parts[] = {size_t(call.s) * call.d, rows * call.d, rows * head.entries + kWidth,
                            rows * call.p + kWidth, rows * call.p + kWidth};
    size_t floats = 0;
    for (size_t part : parts) floats += part;
    if (void* memory = scratch.take(floats * sizeof(float) + rows * sizeof(OnlineSoftmax))) {
      float* at[6] = {static_cast<float*>(memory)};
      for (int i = 0; i < 5; ++i) at[i + 1] = at[i] + parts[i];
      const Queries queries{at[1], at[2], at[3], at[4], reinterpret_cast<OnlineSoftmax*>(at[5])};
      return attend<T>(head, first, count, queries, at[0]);
    }
  }
  // Few queries, or no memory: block by block, without a copy.
  alignas(64) float sums[kBlock * kMaxChannels], logits[kBlock * kMaxEntries + kWidth];
  alignas(64) float x[kListed], y[kListed];
  OnlineSoftmax softmax[kBlock];
  for (; first < last; first += kBlock) {
    const int32_t some = last - first < kBlock ? last - first : kBlock;
    attend<T>(head, first, some, {sums, logits, x, y, softmax}, nullptr);
  }
}

}  // namespace

// Queries first to last (exclusive) of head h of row b.
void rows(const MmfsCall& call, int32_t b, int32_t h, int32_t first, int32_t last) {
  const Head head(call, b, h);
  switch (call.type) {
    case DataType::kFloat32: return attend<float>(head, first, last);
    case DataType::kFloat16: return attend<Float16>(head, first, last);
    case DataType::kBFloat16: return attend<BFloat16>(head, first, last);
  }
}

}  // namespace MMI_VARIANT
}  // namespace mmi
