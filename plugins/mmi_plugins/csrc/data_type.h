// Types of the tensors that the kernels compute in.
#pragma once

#include <cstdint>

namespace mmi {

enum class DataType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

}  // namespace mmi
