// The CPU kernel for one instruction set, which the compiler's flags and MMI_VARIANT name.
//
// What makes it fast: nearly all work is to read four rows of channels for every point. So all else
// is done beforehand, for a block of queries at a time and as many points at once as a register
// holds, and leaves lists of where to read and how much of it to add: the reading is nothing but
// loads and multiply-adds into registers. Levels are read one after the other, so that the rows of
// a small one stay in the first cache while a block reads them.
//
// Few queries read the pool where it lies. Many first copy a head's slice of an image to one place,
// as floats: in the pool its rows lie h*d numbers apart, often a power of two, so that they fall on
// few lines of the caches and each on a page of its own.
#include <cstdlib>
#include <memory>

#include "attention.h"
#include "attention_cpu_vector.h"

namespace mmi {
namespace MMI_VARIANT {
namespace {

constexpr int kBlock = 32;                               // queries whose points are listed at once
constexpr int kMostEntries = kMostLevels * kMostPoints;  // logits of one image: levels x points
constexpr int kPlaces = kWidth / 2;                      // points located at once, in doubles
constexpr int kListed = kBlock * kMostPoints + kWidth;   // whole vectors may reach beyond the last
constexpr int kMostUnits = 8;     // vectors of channels that are summed in registers at a time
constexpr float kNever = -3.0e38f;  // a logit below every real one
constexpr int kNowhere = -1;        // a point that reads nothing

using Places = Vector<kPlaces>;

// ---- what a call is to one head ------------------------------------------------------------

struct Head {
  const Attention& call;
  int32_t b, h;
  int entries, vectors;  // logits of one image, and how many vectors they take
  int64_t stride;        // numbers from one cell of the pool to the next
  Vector<kWidth>::Ints real[kMostEntries / kWidth];  // all ones for logits, 0 beyond the last

  Head(const Attention& given, int32_t batch, int32_t head)
      : call(given),
        b(batch),
        h(head),
        entries(given.l * given.p),
        vectors((entries + kWidth - 1) / kWidth),
        stride(int64_t{given.h} * given.d) {
    int32_t bits[kMostEntries] = {};
    for (int i = 0; i < entries; ++i) bits[i] = -1;
    std::memcpy(real, bits, sizeof(real));
  }

  int64_t row(int32_t q) const { return (int64_t{b} * call.q + q) * call.h + h; }

  // Relative position of image m as query q sees it; 0 where it does not.
  int32_t position(int32_t q, int32_t m) const {
    const int32_t seen = call.position_queries == 1 ? 0 : q;
    const int32_t r =
        call.image_position[(int64_t{b} * call.position_queries + seen) * call.m + m];
    const int32_t slot = call.image_slot[int64_t{b} * call.m + m];
    return r > 0 && r < call.r && slot >= 0 && slot < call.n ? r : 0;
  }

  bool anyone_sees(int32_t m, int32_t first, int32_t last) const {
    if (call.position_queries == 1) last = first + 1;
    for (int32_t q = first; q < last; ++q) {
      if (position(q, m) != 0) return true;
    }
    return false;
  }

  // The head's channels of the first cell of image m, which must be visible.
  template <typename T>
  const T* image(int32_t m) const {
    const int64_t slot = call.image_slot[int64_t{b} * call.m + m];
    return static_cast<const T*>(call.value) + slot * call.s * stride + int64_t{h} * call.d;
  }
};

// The running softmax of a query.
struct Running {
  float most, total;
  float fade;  // by which the sum is too great since `most` grew
};

// A head's queries, as floats and side by side: in the call they lie h rows apart.
struct Queries {
  float* sums;       // [count, d], the rows weighted so far
  float* logits;     // [count, l, p]; whole vectors may be read beyond the last
  float *x, *y;      // [count, p], offsets; likewise
  Running* running;  // [count]

  Queries from(int i, const Head& head) const {
    const int p = head.call.p;
    return {sums + int64_t{i} * head.call.d, logits + i * head.entries, x + i * p, y + i * p,
            running + i};
  }
};

// ---- weights and locations of a block ------------------------------------------------------

// The points of a block of queries in one image, query after query.
struct Points {
  bool sees[kBlock];
  float weight[kMostLevels][kListed];  // not yet divided by the total
  double x[kListed], y[kListed];       // 0 to 1 across the image
};

// What the tables hold for images at one relative position.
struct TableRow {
  int32_t position = 0;
  Floats logits[kMostEntries / kWidth];
  double x[kMostPoints] = {}, y[kMostPoints] = {};

  void read(const Head& head, int32_t r) {
    const Attention& call = head.call;
    const int64_t row = int64_t{r} * call.h + head.h;
    float wide[kMostEntries];
    for (int i = 0; i < kMostEntries; ++i) wide[i] = kNever;
    widen(call.logit_table + row * head.entries, head.entries, wide);
    std::memcpy(logits, wide, sizeof(logits));
    const float* offsets = call.offset_table + row * call.p * 2;
    for (int j = 0; j < call.p; ++j) {
      x[j] = offsets[2 * j];
      y[j] = offsets[2 * j + 1];
    }
    position = r;
  }
};

// Weights of a query's points in one image: e^(logit - the greatest so far).
MMI_INLINE void weigh(const Head& head, const float* logits, const TableRow& table,
                      Running* running, float* weight) {
  const int vectors = head.vectors;
  const auto logit = [&](int i) {
    return only(head.real[i], load<Floats>(logits + i * kWidth));
  };
  Floats highest = all(kNever);
  for (int i = 0; i < vectors; ++i) {
    const Floats score = logit(i) + table.logits[i];
    highest = score > highest ? score : highest;
  }
  Running now = *running;
  const float most = greatest(highest);
  now.fade = 1.0f;
  if (most > now.most) {
    now.fade = exp_of(all(now.most - most))[0];
    now.most = most;
  }
  Floats powers = {};
  for (int i = 0; i < vectors; ++i) {
    // Added exactly: the sum's rounding would be an error of the weight, however great the logits.
    const Exact score = exact_sum(logit(i), table.logits[i]);
    const Floats power = exp_of((score.sum - now.most) + score.rest);
    powers += power;
    store(weight + i * kWidth, power);
  }
  now.total = now.total * now.fade + total_of(powers);
  *running = now;
}

// Where kPlaces points lie along one axis of the image.
MMI_INLINE void locate(float reference, double per_cell, const float* offsets, const double* table,
                       double* location) {
  const auto own = __builtin_convertvector(load<Places::Floats>(offsets), Places::Doubles);
  store(location, (own + load<Places::Doubles>(table)) * per_cell + double{reference});
}

// Lists the points of `count` queries, the first of which is number `first`, in image m. What whole
// vectors write into the next query's points is overwritten by those.
void list_points(const Head& head, int32_t m, int32_t first, int count, const Queries& queries,
                 TableRow* table, Points* points) {
  const Attention& call = head.call;
  const int p = call.p, levels = call.l, entries = head.entries;
  const double per_cell = 1.0 / call.base_grid;
  const float* reference =
      call.reference + (call.reference_queries == 1 ? 0 : int64_t{first} * 2);
  const int next_reference = call.reference_queries == 1 ? 0 : 2;
  float weight[kMostEntries + kPlaces] = {};
  for (int i = 0; i < count; ++i, reference += next_reference) {
    const int32_t r = head.position(first + i, m);
    points->sees[i] = r != 0;
    if (r == 0) {
      std::memset(weight, 0, sizeof(weight));
    } else {
      if (r != table->position) table->read(head, r);
      weigh(head, queries.logits + i * entries, *table, &queries.running[i], weight);
    }
    for (int j = 0; j < p; j += kPlaces) {
      const int at = i * p + j;
      for (int l = 0; l < levels; ++l) {
        store(points->weight[l] + at, load<Places::Floats>(weight + l * p + j));
      }
      locate(reference[0], per_cell, queries.x + at, table->x + j, points->x + at);
      locate(reference[1], per_cell, queries.y + at, table->y + j, points->y + at);
    }
  }
}

// ---- corners -------------------------------------------------------------------------------

// What to read of one level: for each point two cells side by side, in each of two rows of cells.
struct Corners {
  int32_t upper[kListed], lower[kListed];  // the left cell; upper may be kNowhere
  float share[4][kListed];                 // upper left, upper right, lower left, lower right
};

// Along one axis: the first of two neighbouring cells inside the map, and what share each gets.
struct Neighbours {
  Places::Ints first;
  Places::Floats share[2];
};

MMI_INLINE Neighbours neighbours(const double* location, int32_t side) {
  // In doubles: a float's last bit is too coarse a part of a cell on a large map.
  const Places::Doubles at = load<Places::Doubles>(location) * double(side) - 0.5;
  const Places::Ints last = Places::Ints{} + (side > 1 ? side - 2 : 0);
  Places::Ints first = __builtin_convertvector(at, Places::Ints);  // any, where it does not fit
  first = first > 0 ? first : Places::Ints{};
  first = first < last ? first : last;
  const auto past = __builtin_convertvector(
      at - __builtin_convertvector(first, Places::Doubles), Places::Floats);
  // A cell's share falls from 1 at its centre to 0 at its neighbours'. So the pair is right at a
  // border too, and far outside, and not a number, get nothing.
  const Places::Floats near = 1.0f - magnitude(past);
  const Places::Floats next = (side > 1 ? 1.0f : 0.0f) - magnitude(past - 1.0f);
  return {first, {near > 0.0f ? near : Places::Floats{}, next > 0.0f ? next : Places::Floats{}}};
}

void find_corners(const Points& points, int level, int count, int32_t height, int32_t width,
                  Corners* corners) {
  const int32_t below = height > 1 ? width : 0;
  for (int i = 0; i < count; i += kPlaces) {
    const Neighbours x = neighbours(points.x + i, width), y = neighbours(points.y + i, height);
    const auto weight = load<Places::Floats>(points.weight[level] + i);
    const Places::Floats share[2] = {weight * y.share[0], weight * y.share[1]};
    const Places::Ints upper = y.first * width + x.first;
    const auto any = (share[0] + share[1]) * (x.share[0] + x.share[1]) != 0.0f;
    store(corners->upper + i, any ? upper : Places::Ints{} + kNowhere);
    store(corners->lower + i, upper + below);
    for (int c = 0; c < 4; ++c) store(corners->share[c] + i, share[c / 2] * x.share[c % 2]);
  }
}

// ---- reading -------------------------------------------------------------------------------

// A level's cells, `stride` numbers apart.
template <typename T>
struct Cells {
  const T* first;
  int64_t stride;
  int64_t right;  // from a cell to its right neighbour; 0 on a map one cell wide
};

// Adds the corners of each query's points to `kUnits` vectors of N of its channels.
template <int N, int kUnits, typename T>
void add_channels(const Head& head, const Points& points, const Corners& corners, int count,
                  Cells<T> cells, const Queries& queries, int at, bool fade) {
  const int p = head.call.p;
  float* sums = queries.sums + at;
  for (int i = 0; i < count; ++i, sums += head.call.d) {
    if (!points.sees[i]) continue;
    typename Vector<N>::Floats sum[kUnits];
    for (int u = 0; u < kUnits; ++u) {
      sum[u] = load<typename Vector<N>::Floats>(sums + u * N);
      if (fade) sum[u] *= queries.running[i].fade;
    }
    for (int j = i * p; j < (i + 1) * p; ++j) {
      if (corners.upper[j] == kNowhere) continue;
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

// The same for `units` vectors of a register each, at most kUnits.
template <int kUnits, typename T, typename... Rest>
MMI_INLINE void add_units(int units, const Rest&... rest) {
  if constexpr (kUnits > 1) {
    if (units < kUnits) return add_units<kUnits - 1, T>(units, rest...);
  }
  add_channels<kWidth, kUnits, T>(rest...);
}

// The same for all channels.
template <typename T>
void add_rows(const Head& head, const Points& points, const Corners& corners, int count,
              Cells<T> cells, const Queries& queries, bool fade) {
  const int d = head.call.d;
  int at = 0;
  while (d - at >= kWidth) {
    const int left = (d - at) / kWidth, units = left < kMostUnits ? left : kMostUnits;
    add_units<kMostUnits, T>(units, head, points, corners, count, cells, queries, at, fade);
    at += units * kWidth;
  }
  if constexpr (kWidth > kChannelStep) {
    if (at < d) {
      add_channels<kChannelStep, 1>(head, points, corners, count, cells, queries, at, fade);
    }
  }
}

// ---- one head's queries --------------------------------------------------------------------

// Memory of a thread, kept from call to call.
class Scratch {
 public:
  // At least so many bytes on a cache line, or nullptr.
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

// Whether so many queries read so much of a level that a copy is worth its time.
bool worth_copying(const Attention& call, int32_t count, int level) {
  const int64_t cells = int64_t{call.level_height[level]} * call.level_width[level];
  return int64_t{count} * call.p * 4 > 2 * cells;
}

template <typename T>
void copy_cells(const Head& head, const T* from, int64_t count, float* to) {
  constexpr int kAhead = 8, kLine = 64 / sizeof(T);
  const int d = head.call.d;
  for (int64_t cell = 0; cell < count; ++cell) {
    // The processor foresees nothing across so wide a stride.
    const T* soon = from + (cell + kAhead < count ? kAhead : 0) * head.stride;
    for (int c = 0; c < d; c += kLine) __builtin_prefetch(soon + c);
    widen(from, d, to);
    from += head.stride;
    to += d;
  }
}

// Adds image m to the sums of `count` queries; `copy` [s, d] may be nullptr.
template <typename T>
void look(const Head& head, int32_t m, int32_t first, int32_t count, const Queries& queries,
          float* copy) {
  const Attention& call = head.call;
  const T* image = head.image<T>(m);
  bool copied[kMostLevels];
  int64_t start[kMostLevels], cells = 0;
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
  const Attention& call = head.call;
  const T* logits = static_cast<const T*>(call.logits) + head.row(q) * head.entries;
  const T* offsets = static_cast<const T*>(call.offsets) + head.row(q) * call.p * 2;
  float pairs[2 * kMostPoints];
  widen(logits, head.entries, to.logits);
  widen(offsets, 2 * call.p, pairs);
  for (int j = 0; j < call.p; ++j) {
    to.x[j] = pairs[2 * j];
    to.y[j] = pairs[2 * j + 1];
  }
  *to.running = call.null_slot ? Running{0.0f, 1.0f, 1.0f} : Running{kNever, 0.0f, 1.0f};
  const float* null_value = call.null_value + int64_t{head.h} * call.d;
  for (int32_t c = 0; c < call.d; ++c) to.sums[c] = call.null_slot ? null_value[c] : 0.0f;
}

// Queries first to first + count.
template <typename T>
void attend(const Head& head, int32_t first, int32_t count, const Queries& queries, float* copy) {
  const Attention& call = head.call;
  constexpr int kAhead = 8;  // rows of a head lie far apart: the processor foresees none
  for (int32_t i = 0; i < count; ++i) {
    const int64_t soon = head.row(first + (i + kAhead < count ? i + kAhead : i));
    __builtin_prefetch(static_cast<const T*>(call.logits) + soon * head.entries);
    __builtin_prefetch(static_cast<const T*>(call.logits) + (soon + 1) * head.entries - 1);
    __builtin_prefetch(static_cast<const T*>(call.offsets) + soon * call.p * 2);
    read_query<T>(head, first + i, queries.from(i, head));
  }
  for (int32_t m = 0; m < call.m; ++m) {
    if (!head.anyone_sees(m, first, first + count)) continue;
    look<T>(head, m, first, count, queries, copy);
  }
  for (int32_t i = 0; i < count; ++i) {
    const float total = queries.running[i].total, by = total > 0.0f ? 1.0f / total : 0.0f;
    const float* from = queries.sums + int64_t{i} * call.d;
    T* to = static_cast<T*>(call.output) + head.row(first + i) * call.d;
    const T* soon = to + (i + kAhead < count ? kAhead : 0) * head.stride;
    for (int32_t c = 0; c < call.d; c += 64 / int{sizeof(T)}) __builtin_prefetch(soon + c, 1);
    for (int32_t c = 0; c < call.d; ++c) narrow(from[c] * by, to + c);
  }
}

template <typename T>
void attend(const Head& head, int32_t first, int32_t last) {
  const Attention& call = head.call;
  const int32_t count = last - first;
  static thread_local Scratch scratch;
  if (count > kBlock) {
    const size_t rows = count;
    const size_t parts[] = {size_t(call.s) * call.d, rows * call.d, rows * head.entries + kWidth,
                            rows * call.p + kWidth, rows * call.p + kWidth};
    size_t floats = 0;
    for (size_t part : parts) floats += part;
    if (void* memory = scratch.take(floats * sizeof(float) + rows * sizeof(Running))) {
      float* at[6] = {static_cast<float*>(memory)};
      for (int i = 0; i < 5; ++i) at[i + 1] = at[i] + parts[i];
      const Queries queries{at[1], at[2], at[3], at[4], reinterpret_cast<Running*>(at[5])};
      return attend<T>(head, first, count, queries, at[0]);
    }
  }
  // Few queries, or no memory: block by block, and nothing copied.
  alignas(64) float sums[kBlock * kMostChannels], logits[kBlock * kMostEntries + kWidth];
  alignas(64) float x[kListed], y[kListed];
  Running running[kBlock];
  for (; first < last; first += kBlock) {
    const int32_t some = last - first < kBlock ? last - first : kBlock;
    attend<T>(head, first, some, {sums, logits, x, y, running}, nullptr);
  }
}

}  // namespace

// Queries first to last (exclusive) of head h of row b.
void rows(const Attention& call, int32_t b, int32_t h, int32_t first, int32_t last) {
  const Head head(call, b, h);
  switch (call.type) {
    case DataType::kFloat32: return attend<float>(head, first, last);
    case DataType::kFloat16: return attend<Float16>(head, first, last);
    case DataType::kBFloat16: return attend<BFloat16>(head, first, last);
  }
}

}  // namespace MMI_VARIANT
}  // namespace mmi
