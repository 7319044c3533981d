// Points of a block of queries in one image: softmax weights, locations, and the cells around each
// point with their bilinear shares. The CPU kernel lists them before it reads a channel.
//
// Each step runs on as many points at once as a register holds. A location is computed once for all
// levels.
#pragma once

#include "mmfs.h"
#include "mmfs_cpu_vector.h"

namespace mmi {
namespace MMI_VARIANT {
namespace {

constexpr int kBlock = 32;                              // queries whose points are listed at once
constexpr int kMaxEntries = kMaxLevels * kMaxPoints;  // logits of one image: levels x points
constexpr int kPlaces = kWidth / 2;                      // points located at once, as doubles
constexpr int kListed = kBlock * kMaxPoints + kWidth;   // room for whole vectors at the end
constexpr int kNoCell = -1;                             // marks a point that reads nothing
constexpr float kMinLogit = -3.0e38f;                   // below every logit

using Places = Vector<kPlaces>;

// ---- one head of a call --------------------------------------------------------------------

struct Head {
  const MmfsCall& call;
  int32_t b, h;
  int entries, vectors;  // logits of one image, and how many vectors they take
  int64_t stride;        // numbers from one cell of the pool to the next
  Vector<kWidth>::Ints real[kMaxEntries / kWidth];  // mask: all ones for logits, 0 beyond the last

  Head(const MmfsCall& given, int32_t batch, int32_t head)
      : call(given),
        b(batch),
        h(head),
        entries(given.l * given.p),
        vectors((entries + kWidth - 1) / kWidth),
        stride(int64_t{given.h} * given.d) {
    int32_t bits[kMaxEntries] = {};
    for (int i = 0; i < entries; ++i) bits[i] = -1;
    std::memcpy(real, bits, sizeof(real));
  }

  int64_t row(int32_t q) const { return (int64_t{b} * call.q + q) * call.h + h; }

  // Relative position of image m for query q; 0 where it is hidden.
  int32_t position(int32_t q, int32_t m) const {
    const int32_t seen = call.position_queries == 1 ? 0 : q;
    const int32_t r =
        call.image_position[(int64_t{b} * call.position_queries + seen) * call.m + m];
    const int32_t slot = call.image_slot[int64_t{b} * call.m + m];
    return r > 0 && r < call.r && slot >= 0 && slot < call.n ? r : 0;
  }

  bool any_query_sees(int32_t m, int32_t first, int32_t last) const {
    if (call.position_queries == 1) last = first + 1;
    for (int32_t q = first; q < last; ++q) {
      if (position(q, m) != 0) return true;
    }
    return false;
  }

  // This head's channels of the first cell of image m, which must be visible.
  template <typename T>
  const T* image(int32_t m) const {
    const int64_t slot = call.image_slot[int64_t{b} * call.m + m];
    return static_cast<const T*>(call.value) + slot * call.s * stride + int64_t{h} * call.d;
  }
};

// Maximum and total of a softmax over the logits so far.
struct OnlineSoftmax {
  float maximum, total;
  float rescale;  // factor that the sums still lack since `maximum` grew
};

// A head's queries as contiguous floats; in the call they are h rows apart.
struct Queries {
  float* sums;       // [count, d], weighted sums so far
  float* logits;     // [count, l, p], with room for whole vectors at the end
  float *x, *y;      // [count, p], offsets; likewise
  OnlineSoftmax* softmax;  // [count]

  Queries from(int i, const Head& head) const {
    const int p = head.call.p;
    return {sums + int64_t{i} * head.call.d, logits + i * head.entries, x + i * p, y + i * p,
            softmax + i};
  }
};

// ---- weights and locations of a block ------------------------------------------------------

// The points of a block of queries in one image, query after query.
struct Points {
  bool sees[kBlock];
  float weight[kMaxLevels][kListed];  // not yet divided by the total
  double x[kListed], y[kListed];       // 0 to 1 across the image
};

// Row of the tables for one relative position.
struct TableRow {
  int32_t position = 0;
  Floats logits[kMaxEntries / kWidth];
  double x[kMaxPoints] = {}, y[kMaxPoints] = {};

  void read(const Head& head, int32_t r) {
    const MmfsCall& call = head.call;
    const int64_t row = int64_t{r} * call.h + head.h;
    float wide[kMaxEntries];
    for (int i = 0; i < kMaxEntries; ++i) wide[i] = kMinLogit;
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

// Weights of a query's points in one image, e^(logit - maximum so far), for the online softmax.
MMI_INLINE void softmax_weights(const Head& head, const float* logits, const TableRow& table,
                                OnlineSoftmax* softmax, float* weight) {
  const int vectors = head.vectors;
  const auto logit = [&](int i) {
    return only(head.real[i], load<Floats>(logits + i * kWidth));
  };
  Floats highest = all(kMinLogit);
  for (int i = 0; i < vectors; ++i) {
    const Floats score = logit(i) + table.logits[i];
    highest = score > highest ? score : highest;
  }
  OnlineSoftmax now = *softmax;
  const float maximum = greatest(highest);
  now.rescale = 1.0f;
  if (maximum > now.maximum) {
    now.rescale = exp_of(all(now.maximum - maximum))[0];
    now.maximum = maximum;
  }
  Floats powers = {};
  for (int i = 0; i < vectors; ++i) {
    // Added exactly: for large logits the rounding of the sum would be an error of the weight.
    const Exact score = exact_sum(logit(i), table.logits[i]);
    const Floats power = exp_of((score.sum - now.maximum) + score.rest);
    powers += power;
    store(weight + i * kWidth, power);
  }
  now.total = now.total * now.rescale + total_of(powers);
  *softmax = now;
}

// Locations of kPlaces points along one axis, 0 to 1 across the image.
MMI_INLINE void locate(float reference, double per_cell, const float* offsets, const double* table,
                       double* location) {
  const auto own = __builtin_convertvector(load<Places::Floats>(offsets), Places::Doubles);
  store(location, (own + load<Places::Doubles>(table)) * per_cell + double{reference});
}

// Lists the points in image m of `count` queries from query `first` on. Queries go in order: whole
// vectors write into the next query's points, which then overwrite them.
void list_points(const Head& head, int32_t m, int32_t first, int count, const Queries& queries,
                 TableRow* table, Points* points) {
  const MmfsCall& call = head.call;
  const int p = call.p, levels = call.l, entries = head.entries;
  const double per_cell = 1.0 / call.base_grid;
  const float* reference =
      call.reference + (call.reference_queries == 1 ? 0 : int64_t{first} * 2);
  const int next_reference = call.reference_queries == 1 ? 0 : 2;
  float weight[kMaxEntries + kPlaces] = {};
  for (int i = 0; i < count; ++i, reference += next_reference) {
    const int32_t r = head.position(first + i, m);
    points->sees[i] = r != 0;
    if (r == 0) {
      std::memset(weight, 0, sizeof(weight));
    } else {
      if (r != table->position) table->read(head, r);
      softmax_weights(head, queries.logits + i * entries, *table, &queries.softmax[i], weight);
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

// Cells to read of one level: for each point two neighbours in each of two rows of cells.
struct Corners {
  int32_t upper[kListed], lower[kListed];  // the left cell; upper may be kNoCell
  float share[4][kListed];                 // upper left, upper right, lower left, lower right
};

// Along one axis: the first of two neighbouring cells inside the level, and the share of each.
struct Neighbours {
  Places::Ints first;
  Places::Floats share[2];
};

MMI_INLINE Neighbours neighbours(const double* location, int32_t side) {
  // In doubles: on a large level, a float's last bit is too coarse a part of a cell.
  const Places::Doubles at = load<Places::Doubles>(location) * double(side) - 0.5;
  const Places::Ints last = Places::Ints{} + (side > 1 ? side - 2 : 0);
  // Any integer where `at` does not fit: clamped next, and far enough away for shares of 0.
  Places::Ints first = __builtin_convertvector(at, Places::Ints);
  first = first > 0 ? first : Places::Ints{};
  first = first < last ? first : last;
  const auto past = __builtin_convertvector(
      at - __builtin_convertvector(first, Places::Doubles), Places::Floats);
  // A cell's share falls from 1 at its centre to 0 at its neighbours' centres. So the clamped pair
  // is right at a border too, and a location far outside, or NaN, has shares of 0.
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
    store(corners->upper + i, any ? upper : Places::Ints{} + kNoCell);
    store(corners->lower + i, upper + below);
    for (int c = 0; c < 4; ++c) store(corners->share[c] + i, share[c / 2] * x.share[c % 2]);
  }
}

}  // namespace
}  // namespace MMI_VARIANT
}  // namespace mmi
