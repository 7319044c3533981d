// Splits a call into tasks and sends each to the kernel compiled for this processor.
//
// The kernel is compiled several times (mmfs_cpu_kernel.cpp), once for each instruction set;
// which one runs is decided here, when the library runs, so that a library may move between
// machines.
#include "mmfs_cpu.h"

#include <cstdlib>
#include <cstring>

namespace mmi {

using Rows = void (*)(const Attention&, int32_t b, int32_t h, int32_t first, int32_t last);

namespace base {
void rows(const Attention&, int32_t b, int32_t h, int32_t first, int32_t last);
}
#ifdef MMI_X86
namespace avx2 {
void rows(const Attention&, int32_t b, int32_t h, int32_t first, int32_t last);
}
namespace avx512 {
void rows(const Attention&, int32_t b, int32_t h, int32_t first, int32_t last);
}
#endif

namespace {

// A task is so many of a head's queries: many, for each task copies the images it reads; but few
// enough to make kTasks tasks, so that many cores have work.
constexpr int32_t kMostQueries = 2048, kFewestQueries = 128;
constexpr int64_t kTasks = 16;
constexpr int64_t kSmall = 1 << 19;  // multiply-adds; about 20 microseconds of one core

// The best instruction set of this processor; MMI_CPU=base or avx2 asks for a lesser one.
Rows choose() {
#ifdef MMI_X86
  const char* asked = std::getenv("MMI_CPU");
  const bool base_only = asked != nullptr && std::strcmp(asked, "base") == 0;
  const bool no_avx512 = asked != nullptr && std::strcmp(asked, "avx2") == 0;
  __builtin_cpu_init();
  if (!base_only && !no_avx512 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw")) {
    return avx512::rows;
  }
  if (!base_only && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return avx2::rows;
  }
#endif
  return base::rows;
}

int32_t queries_per_task(const Attention& call) {
  const int64_t even = (int64_t{call.b} * call.h * call.q + kTasks - 1) / kTasks;
  if (even < kFewestQueries) return kFewestQueries;
  return even < kMostQueries ? static_cast<int32_t>(even) : kMostQueries;
}

int32_t blocks(const Attention& call) { return (call.q - 1) / queries_per_task(call) + 1; }

}  // namespace

int64_t cpu_tasks(const Attention& call) { return int64_t{call.b} * call.h * blocks(call); }

bool cpu_is_small(const Attention& call) {
  const int64_t rows = int64_t{call.b} * call.q * call.h;
  return rows * call.m * call.l * call.p * call.d * 4 < kSmall;
}

void cpu_run(const Attention& call, int64_t task) {
  static const Rows rows = choose();
  // A head's queries follow one another: they read the same slice of the images.
  const int32_t block = static_cast<int32_t>(task % blocks(call));
  const int64_t bh = task / blocks(call);
  const int32_t some = queries_per_task(call), first = block * some;
  const int32_t last = call.q - first < some ? call.q : first + some;
  rows(call, static_cast<int32_t>(bh / call.h), static_cast<int32_t>(bh % call.h), first, last);
}

}  // namespace mmi
