// The part of ONNX Runtime's C ABI that the library uses, declared here because the Python package
// ships no headers. Functions are slots of a table that only grows, so their indices hold for every
// later version; the library requests the table of the first version that has all of them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mmi::ort {

constexpr uint32_t kTableVersion = 18;  // the first with KernelInfoGetAllocator
constexpr uint32_t kOperatorVersion = 16;  // of struct Operator below

struct Status;
struct KernelInfo;
struct KernelContext;
struct SessionOptions;
struct Domain;
struct Value;
struct TensorInfo;

// Memory of a provider, from its arena: OrtAllocator.
struct Allocator {
  uint32_t version;
  void* (*allocate)(Allocator*, size_t);
  void (*free)(Allocator*, void*);
};

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };
enum ElementType : int { kFloat = 1, kInt32 = 6, kFloat16 = 10, kBFloat16 = 16 };

// The table of functions: `slot<Function>(index)`.
struct Api {
  const void* slots[1];

  template <typename Function>
  Function* slot(size_t number) const {
    return reinterpret_cast<Function*>(const_cast<void*>(slots[number]));
  }

  Status* fail(ErrorCode code, const char* text) const {
    return slot<Status*(ErrorCode, const char*)>(0)(code, text);
  }
  Status* create_domain(const char* name, Domain** domain) const {
    return slot<Status*(const char*, Domain**)>(26)(name, domain);
  }
  Status* add_operator(Domain* domain, const struct Operator* op) const {
    return slot<Status*(Domain*, const struct Operator*)>(27)(domain, op);
  }
  Status* add_domain(SessionOptions* options, Domain* domain) const {
    return slot<Status*(SessionOptions*, Domain*)>(28)(options, domain);
  }
  Status* data(Value* value, void** bytes) const {
    return slot<Status*(Value*, void**)>(51)(value, bytes);
  }
  Status* rank(const TensorInfo* info, size_t* axes) const {
    return slot<Status*(const TensorInfo*, size_t*)>(61)(info, axes);
  }
  Status* sides(const TensorInfo* info, int64_t* sides, size_t axes) const {
    return slot<Status*(const TensorInfo*, int64_t*, size_t)>(62)(info, sides, axes);
  }
  Status* tensor_info(const Value* value, TensorInfo** info) const {
    return slot<Status*(const Value*, TensorInfo**)>(65)(value, info);
  }
  Status* float_attribute(const KernelInfo* info, const char* name, float* to) const {
    return slot<Status*(const KernelInfo*, const char*, float*)>(85)(info, name, to);
  }
  Status* int_attribute(const KernelInfo* info, const char* name, int64_t* to) const {
    return slot<Status*(const KernelInfo*, const char*, int64_t*)>(86)(info, name, to);
  }
  Status* input(const KernelContext* context, size_t index, const Value** value) const {
    return slot<Status*(const KernelContext*, size_t, const Value**)>(90)(context, index, value);
  }
  Status* output(KernelContext* context, size_t index, const int64_t* sides, size_t axes,
                 Value** value) const {
    return slot<Status*(KernelContext*, size_t, const int64_t*, size_t, Value**)>(91)(
        context, index, sides, axes, value);
  }
  void release(TensorInfo* info) const { slot<void(TensorInfo*)>(99)(info); }
  Status* int_attributes(const KernelInfo* info, const char* name, int64_t* to,
                         size_t* count) const {
    return slot<Status*(const KernelInfo*, const char*, int64_t*, size_t*)>(163)(info, name, to,
                                                                               count);
  }
  Status* gpu_stream(const KernelContext* context, void** stream) const {
    return slot<Status*(const KernelContext*, void**)>(193)(context, stream);
  }
  // The allocator of a node's provider, in its own memory; to be given back.
  Status* allocator(const KernelInfo* info, Allocator** found) const {
    return slot<Status*(const KernelInfo*, int, Allocator**)>(278)(info, 0, found);
  }
  void release(Allocator* allocator) const { slot<void(Allocator*)>(132)(allocator); }
  // Calls `task` for 0 .. count - 1 on the session's threads, this one included; a thread takes the
  // next index as soon as it is free.
  Status* parallel_for(const KernelContext* context, void (*task)(void*, size_t), size_t count,
                       void* given) const {
    return slot<Status*(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(
        274)(context, task, count, count, given);
  }
};

struct ApiBase {
  const Api* (*api)(uint32_t version);
  const char* (*version)();
};

// A custom operator, with the fields of version 16.
struct Operator {
  uint32_t version;
  void* (*create)(const Operator*, const Api*, const KernelInfo*);
  const char* (*name)(const Operator*);
  const char* (*provider)(const Operator*);
  ElementType (*input_type)(const Operator*, size_t);
  size_t (*inputs)(const Operator*);
  ElementType (*output_type)(const Operator*, size_t);
  size_t (*outputs)(const Operator*);
  void (*compute)(void*, KernelContext*);
  void (*destroy)(void*);
  int (*input_kind)(const Operator*, size_t);   // 0: required
  int (*output_kind)(const Operator*, size_t);
  int (*input_memory)(const Operator*, size_t);  // 0: memory of the provider
  int (*least_variadic_inputs)(const Operator*);
  int (*variadic_inputs_alike)(const Operator*);
  int (*least_variadic_outputs)(const Operator*);
  int (*variadic_outputs_alike)(const Operator*);
  Status* (*create_or_fail)(const Operator*, const Api*, const KernelInfo*, void**);
  Status* (*compute_or_fail)(void*, KernelContext*);
};

}  // namespace mmi::ort
