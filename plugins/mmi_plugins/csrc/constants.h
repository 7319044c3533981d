// The constants of constants.def as C++. Compiles under nvcc, NVRTC and any C++17 compiler.
#pragma once

namespace mmi {

#define MMI_CONSTANT(name, value) constexpr int name = value;
#include "constants.def"
#undef MMI_CONSTANT

}  // namespace mmi
