// mmi::WeightOnlyMatMul in ONNX Runtime: on the CPU and, with MMI_CUDA, on the GPU.
#include <string>

#include "gemv_cpu.h"
#include "gemv_sizes.h"
#include "onnxruntime_kernel.h"
#ifdef MMI_CUDA
#include "gemv_launch.h"
#endif

namespace mmi {
namespace {

using ort::Api;
using ort::KernelContext;
using ort::Status;

constexpr char kName[] = "WeightOnlyMatMul";

Status* invalid_argument(const Api* api, const std::string& reason) {
  return api->fail(ort::kInvalidArgument, (std::string(kName) + ": " + reason).c_str());
}

// One node of a graph.
struct Kernel {
  const Api* api;
  DataType type;
  GemvAttributes attributes;
};

struct TypedOperator : ort::Operator {
  DataType type;
  ort::ElementType element;
};

Status* create(const ort::Operator* op, const Api* api, const ort::KernelInfo* info, void** made) {
  Kernel kernel{api, static_cast<const TypedOperator*>(op)->type, {}};
  const struct { const char* name; int32_t* to; } fields[] = {
      {"format", &kernel.attributes.format},
      {"out", &kernel.attributes.out},
      {"block", &kernel.attributes.block}};
  for (const auto& field : fields) {
    int64_t wide = 0;
    MMI_TRY(api->int_attribute(info, field.name, &wide));
    if (wide < 0 || wide > INT32_MAX) {
      return invalid_argument(api, std::string(field.name) + " is out of range");
    }
    *field.to = static_cast<int32_t>(wide);
  }
  *made = new Kernel(kernel);
  return nullptr;
}

// Reads sizes and pointers of the call from `context` and allocates its output.
Status* read_call(const Kernel& kernel, KernelContext* context, GemvCall* call) {
  const Api* api = kernel.api;
  Shape shapes[kGemvInputs];
  void* pointer[kGemvInputs];
  for (int32_t input = 0; input < kGemvInputs; ++input) {
    const ort::Value* value = nullptr;
    MMI_TRY(api->input(context, input, &value));
    MMI_TRY(shape_of(api, value, &shapes[input]));
    MMI_TRY(api->data(const_cast<ort::Value*>(value), &pointer[input]));
  }
  GemvSizes sizes(kernel.attributes, shapes);
  if (!sizes.fits()) return invalid_argument(api, sizes.reason());
  *call = sizes.call();
  call->type = kernel.type;
  call->input = pointer[0];
  call->weight = static_cast<const int32_t*>(pointer[1]);
  call->scales = pointer[2];
  Shape& shape = shapes[0];
  shape.side[shape.rank - 1] = call->out;
  ort::Value* output = nullptr;
  MMI_TRY(api->output(context, 0, shape.side, shape.rank, &output));
  return api->data(output, &call->output);
}

Status* compute_on_cpu(void* state, KernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(state);
  GemvCall call;
  MMI_TRY(read_call(kernel, context, &call));
  return kernel.api->parallel_for(
      context,
      [](void* given, size_t tile) {
        gemv_cpu_run(*static_cast<const GemvCall*>(given), static_cast<int64_t>(tile));
      },
      static_cast<size_t>(gemv_tiles(call.out)), &call);
}

#ifdef MMI_CUDA
Status* compute_on_cuda(void* state, KernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(state);
  GemvCall call;
  MMI_TRY(read_call(kernel, context, &call));
  void* stream = nullptr;
  MMI_TRY(kernel.api->gpu_stream(context, &stream));
  const char* reason = launch_gemv(call, static_cast<CUstream_st*>(stream));
  return reason == nullptr ? nullptr : invalid_argument(kernel.api, reason);
}
#endif

TypedOperator make(DataType type, ort::ElementType element, bool cuda) {
  TypedOperator op{};
  fill(op, cuda);
  op.name = [](const ort::Operator*) -> const char* { return kName; };
  op.input_type = [](const ort::Operator* self, size_t index) {
    return index == 1 ? ort::kInt32 : static_cast<const TypedOperator*>(self)->element;
  };
  op.inputs = [](const ort::Operator*) -> size_t { return kGemvInputs; };
  op.output_type = [](const ort::Operator* self, size_t) {
    return static_cast<const TypedOperator*>(self)->element;
  };
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.create_or_fail = create;
  op.compute_or_fail = compute_on_cpu;
#ifdef MMI_CUDA
  if (cuda) op.compute_or_fail = compute_on_cuda;
#endif
  op.type = type;
  op.element = element;
  return op;
}

}  // namespace

Status* add_gemv(const Api* api, ort::Domain* domain) {
  // Static: sessions keep pointers to the operators for as long as they live.
  static const TypedOperator operators[] = {
      make(DataType::kFloat16, ort::kFloat16, false),
      make(DataType::kBFloat16, ort::kBFloat16, false),
#ifdef MMI_CUDA
      make(DataType::kFloat16, ort::kFloat16, true),
      make(DataType::kBFloat16, ort::kBFloat16, true),
#endif
  };
  for (const TypedOperator& op : operators) MMI_TRY(api->add_operator(domain, &op));
  return nullptr;
}

}  // namespace mmi
