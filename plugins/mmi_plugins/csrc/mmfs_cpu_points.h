// What the CPU kernel knows before it reads a single channel: for the points of a block of queries
// in one image, the weight of each, the cells around it and the share of each cell.
//
// All of it is computed for as many points at once as a register holds. A location is computed once
// for all levels.
#pragma once

#include "mmfs.h"
#include "mmfs_cpu_vector.h"

namespace mmi {
namespace MMI_VARIANT {
namespace {

constexpr int kBlock = 32;                               // queries whose points are listed at once
constexpr int kMostEntries = kMostLevels * kMostPoints;  // logits of one image: levels x points
constexpr int kPlaces = kWidth / 2;                      // points located at once, in doubles
constexpr int kListed = kBlock * kMostPoints + kWidth;   // whole vectors may reach beyond the last
constexpr int kNowhere = -1;                             // a point that reads nothing
constexpr float kNever = -3.0e38f;                       // a logit below every real one

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

}  // namespace
}  // namespace MMI_VARIANT
}  // namespace mmi
