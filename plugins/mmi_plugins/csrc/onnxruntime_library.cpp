// Custom-op library for ONNX Runtime: mmi::MultiImageDeformableAttention and
// mmi::WeightOnlyMatMul (onnxruntime_gemv.cpp) on the CPU and, with MMI_CUDA, on the GPU.
//
// A session that loads the library runs these kernels in place of the model-local function of the
// operator; a session that does not load it runs the function.
#include <string>

#include "mmfs.h"
#include "mmfs_cpu.h"
#include "onnxruntime_kernel.h"
#include "sizes.h"
#ifdef MMI_CUDA
#include "launch.h"
#endif

#if defined(_WIN32)
#define MMI_EXPORT extern "C" __declspec(dllexport)
#else
#define MMI_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace mmi {
namespace {

using ort::Api;
using ort::ElementType;
using ort::KernelContext;
using ort::Status;

constexpr char kDomain[] = "mmi";
constexpr char kName[] = "MultiImageDeformableAttention";

Status* invalid_argument(const Api* api, const std::string& reason) {
  return api->fail(ort::kInvalidArgument, (std::string(kName) + ": " + reason).c_str());
}

// One node of a graph.
struct Kernel {
  const Api* api;
  DataType type;
  Attributes attributes;
  ort::Allocator* allocator;  // of device memory; null on the CPU
};

struct TypedOperator : ort::Operator {
  DataType type;
  ElementType element;
};

Status* read_levels(const Api* api, const ort::KernelInfo* info, const char* name, int32_t* sides,
                    int32_t* levels) {
  int64_t wide[kMaxLevels];
  size_t count = 0;
  MMI_TRY(api->int_attributes(info, name, nullptr, &count));
  if (count < 1 || count > kMaxLevels) {
    return invalid_argument(api, std::string(name) + " must name 1 to 4 levels");
  }
  MMI_TRY(api->int_attributes(info, name, wide, &count));
  for (size_t i = 0; i < count; ++i) {
    if (wide[i] < 1 || wide[i] > (1 << 20)) {
      return invalid_argument(api, std::string(name) + " is not the side of a level");
    }
    sides[i] = static_cast<int32_t>(wide[i]);
  }
  *levels = static_cast<int32_t>(count);
  return nullptr;
}

Status* create(const ort::Operator* op, const Api* api, const ort::KernelInfo* info, void** made) {
  Kernel kernel{api, static_cast<const TypedOperator*>(op)->type, {}, nullptr};
  Attributes& attributes = kernel.attributes;
  int32_t widths = 0;
  int64_t null_slot = 0;
  MMI_TRY(read_levels(api, info, "level_heights", attributes.level_height, &attributes.levels));
  MMI_TRY(read_levels(api, info, "level_widths", attributes.level_width, &widths));
  if (widths != attributes.levels) {
    return invalid_argument(api, "level_heights and level_widths differ in the number of levels");
  }
  MMI_TRY(api->float_attribute(info, "base_grid", &attributes.base_grid));
  MMI_TRY(api->int_attribute(info, "null_slot", &null_slot));
  attributes.null_slot = null_slot != 0;
  *made = new Kernel(kernel);
  return nullptr;
}

void destroy(void* state) {
  auto* kernel = static_cast<Kernel*>(state);
  if (kernel->allocator != nullptr) kernel->api->release(kernel->allocator);
  delete kernel;
}

// Reads sizes and pointers of the call from `context` and allocates its output.
Status* read_call(const Kernel& kernel, KernelContext* context, MmfsCall* call) {
  const Api* api = kernel.api;
  Sizes sizes(kernel.attributes);
  const void* pointer[kInputs];
  for (int32_t input = 0; input < kInputs; ++input) {
    const ort::Value* value = nullptr;
    MMI_TRY(api->input(context, input, &value));
    Shape shape;
    MMI_TRY(shape_of(api, value, &shape));
    if (!sizes.take(input, shape)) return invalid_argument(api, sizes.reason());
    void* bytes = nullptr;
    MMI_TRY(api->data(const_cast<ort::Value*>(value), &bytes));
    pointer[input] = bytes;
  }
  if (!sizes.complete()) return invalid_argument(api, sizes.reason());
  *call = sizes.call();
  call->type = kernel.type;
  call->value = pointer[kValue];
  call->image_slot = static_cast<const int32_t*>(pointer[kImageSlot]);
  call->offsets = pointer[kOffsets];
  call->logits = pointer[kLogits];
  call->offset_table = static_cast<const float*>(pointer[kOffsetTable]);
  call->logit_table = static_cast<const float*>(pointer[kLogitTable]);
  call->image_position = static_cast<const int32_t*>(pointer[kImagePosition]);
  call->reference = static_cast<const float*>(pointer[kReference]);
  call->null_value = static_cast<const float*>(pointer[kNullValue]);
  const int64_t sides[3] = {call->b, call->q, int64_t{call->h} * call->d};
  ort::Value* output = nullptr;
  MMI_TRY(api->output(context, 0, sides, 3, &output));
  return api->data(output, &call->output);
}

Status* compute_on_cpu(void* state, KernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(state);
  MmfsCall call;
  MMI_TRY(read_call(kernel, context, &call));
  const int64_t tasks = cpu_tasks(call);
  if (cpu_is_small(call)) {
    for (int64_t task = 0; task < tasks; ++task) cpu_run(call, task);
    return nullptr;
  }
  return kernel.api->parallel_for(
      context,
      [](void* given, size_t task) {
        cpu_run(*static_cast<const MmfsCall*>(given), static_cast<int64_t>(task));
      },
      static_cast<size_t>(tasks), &call);
}

#ifdef MMI_CUDA
Status* create_on_cuda(const ort::Operator* op, const Api* api, const ort::KernelInfo* info,
                       void** made) {
  preload();
  MMI_TRY(create(op, api, info, made));
  Status* status = api->allocator(info, &static_cast<Kernel*>(*made)->allocator);
  if (status) {
    destroy(*made);
    *made = nullptr;
  }
  return status;
}

Status* compute_on_cuda(void* state, KernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(state);
  MmfsCall call;
  MMI_TRY(read_call(kernel, context, &call));
  void* stream = nullptr;
  MMI_TRY(kernel.api->gpu_stream(context, &stream));
  // From the provider's arena, which has grown before a CUDA graph is captured: an allocation on
  // the stream would become a node of the graph.
  void* workspace = nullptr;
  const size_t bytes = workspace_bytes(call);
  if (bytes > 0) {
    workspace = kernel.allocator->allocate(kernel.allocator, bytes);
    if (workspace == nullptr) return invalid_argument(kernel.api, "no memory for its workspace");
  }
  const char* reason = launch(call, workspace, static_cast<CUstream_st*>(stream));
  // Its next user runs on the same stream, after this call.
  if (workspace != nullptr) kernel.allocator->free(kernel.allocator, workspace);
  return reason == nullptr ? nullptr : invalid_argument(kernel.api, reason);
}
#endif

ElementType input_type(const ort::Operator* op, size_t index) {
  switch (index) {
    case kValue:
    case kOffsets:
    case kLogits: return static_cast<const TypedOperator*>(op)->element;
    case kImageSlot:
    case kImagePosition: return ort::kInt32;
    default: return ort::kFloat;
  }
}

TypedOperator make(DataType type, ElementType element, bool cuda) {
  TypedOperator op{};
  fill(op, cuda);
  op.name = [](const ort::Operator*) -> const char* { return kName; };
  op.input_type = input_type;
  op.inputs = [](const ort::Operator*) -> size_t { return kInputs; };
  op.output_type = [](const ort::Operator* self, size_t) {
    return static_cast<const TypedOperator*>(self)->element;
  };
  op.destroy = destroy;
  op.create_or_fail = create;
  op.compute_or_fail = compute_on_cpu;
#ifdef MMI_CUDA
  if (cuda) {
    op.create_or_fail = create_on_cuda;
    op.compute_or_fail = compute_on_cuda;
  }
#endif
  op.type = type;
  op.element = element;
  return op;
}

Status* register_all(const Api* api, ort::SessionOptions* options) {
  // Static: sessions keep pointers to the operators and the domain for as long as they live.
  static const TypedOperator operators[] = {
      make(DataType::kFloat32, ort::kFloat, false),
      make(DataType::kFloat16, ort::kFloat16, false),
      make(DataType::kBFloat16, ort::kBFloat16, false),
#ifdef MMI_CUDA
      make(DataType::kFloat32, ort::kFloat, true),
      make(DataType::kFloat16, ort::kFloat16, true),
      make(DataType::kBFloat16, ort::kBFloat16, true),
#endif
  };
  ort::Domain* domain = nullptr;
  MMI_TRY(api->create_domain(kDomain, &domain));
  for (const TypedOperator& op : operators) MMI_TRY(api->add_operator(domain, &op));
  MMI_TRY(add_gemv(api, domain));
  return api->add_domain(options, domain);
}

}  // namespace
}  // namespace mmi

// Entry point: ONNX Runtime calls it when a session loads the library.
MMI_EXPORT mmi::ort::Status* RegisterCustomOps(mmi::ort::SessionOptions* options,
                                               const mmi::ort::ApiBase* base) {
  const mmi::ort::Api* api = base->api(mmi::ort::kTableVersion);
  if (api == nullptr) {
    // Older versions have at least the table of version 1, whose slot 0 makes a status.
    return base->api(1)->fail(mmi::ort::kFail,
                              "mmi: this library needs ONNX Runtime 1.18 or newer");
  }
  return mmi::register_all(api, options);
}
