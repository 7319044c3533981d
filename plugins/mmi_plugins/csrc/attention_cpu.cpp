// Splits a call into tasks and sends each to the kernel compiled for this processor.
//
// The kernel is compiled several times (attention_cpu_kernel.cpp), once for each instruction set;
// which one runs is decided here, when the library runs, so that a library may move between
// machines.
#include "attention_cpu.h"

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

constexpr int32_t kQueriesPerTask = 2048;  // a head's slice of an image is copied once for so many
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

int32_t blocks(const Attention& call) { return (call.q + kQueriesPerTask - 1) / kQueriesPerTask; }

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
  const int32_t first = block * kQueriesPerTask;
  const int32_t last = first + kQueriesPerTask < call.q ? first + kQueriesPerTask : call.q;
  rows(call, static_cast<int32_t>(bh / call.h), static_cast<int32_t>(bh % call.h), first, last);
}

}  // namespace mmi
