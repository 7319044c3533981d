// Parts that the operators of ONNX Runtime's library share.
#pragma once

#include "onnxruntime_abi.h"
#include "sizes.h"

// Returns from the enclosing function with the status of a call that failed.
#define MMI_TRY(call) \
  if (::mmi::ort::Status* status = (call)) return status

namespace mmi {

inline ort::Status* shape_of(const ort::Api* api, const ort::Value* value, Shape* shape) {
  ort::TensorInfo* info = nullptr;
  MMI_TRY(api->tensor_info(value, &info));
  size_t rank = 0;
  ort::Status* status = api->rank(info, &rank);
  if (!status && rank <= kMaxRank) status = api->sides(info, shape->side, rank);
  shape->rank = static_cast<int32_t>(rank);
  api->release(info);
  return status;
}

// Fills in the fields that are the same for every operator: required inputs in the memory of the
// provider, which is the CPU or, with `cuda`, CUDA's.
inline void fill(ort::Operator& op, bool cuda) {
  op.version = ort::kOperatorVersion;
  op.provider = [](const ort::Operator*) -> const char* { return nullptr; };
  if (cuda) {
    op.provider = [](const ort::Operator*) -> const char* { return "CUDAExecutionProvider"; };
  }
  op.outputs = [](const ort::Operator*) -> size_t { return 1; };
  op.input_kind = op.output_kind = op.input_memory = [](const ort::Operator*, size_t) { return 0; };
  op.least_variadic_inputs = op.variadic_inputs_alike = [](const ort::Operator*) { return 1; };
  op.least_variadic_outputs = op.variadic_outputs_alike = [](const ort::Operator*) { return 1; };
}

// Adds the operators of mmi::WeightOnlyMatMul (onnxruntime_gemv.cpp) to a domain.
ort::Status* add_gemv(const ort::Api* api, ort::Domain* domain);

}  // namespace mmi
