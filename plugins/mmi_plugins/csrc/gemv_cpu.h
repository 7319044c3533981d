// mmi::WeightOnlyMatMul on the CPU: a task for every tile of output channels.
#pragma once

#include "gemv.h"

namespace mmi {

// Computes tile `tile` of a valid call, 0 .. gemv_tiles(call.out) - 1. Pointers may be unaligned.
void gemv_cpu_run(const GemvCall& call, int64_t tile);

}  // namespace mmi
