// TensorRT plugin of mmi::MultiImageDeformableAttention: one class with the three capabilities of
// IPluginV3, its creator, and the two functions through which TensorRT loads a plugin library, that
// of mmi::WeightOnlyMatMul (tensorrt_gemv_plugin.cpp) included.
//
// The library refers to no symbol of TensorRT, so one file serves TensorRT and TensorRT-RTX and can
// be opened where neither is linked. With MMI_REGISTER_TENSORRT_PLUGIN it instead registers its
// creator when it is opened, and takes `getPluginRegistry` and `getInferLibVersion` from the
// process: for tools that only dlopen a plugin.
#include <atomic>
#include <cstdio>
#include <mutex>
#include <new>
#include <string>

#include "mmfs.h"
#include "launch.h"
#include "sizes.h"
#include "tensorrt_common.h"

namespace mmi {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

constexpr const char* kName = "MultiImageDeformableAttention";
constexpr int32_t kFieldsVersion = 1;  // of the serialised fields; any other version is refused

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};
std::mutex last_line_mutex;
std::string last_line;

void report(const std::string& reason) { mmi::report(kName, reason); }

// Whether the tensors form a valid call, as far as their shapes are known; reports a reason if not.
template <typename Tensor>
bool fits(Sizes& sizes, const Tensor* inputs, int32_t input_count, int32_t output_count) {
  if (input_count != kInputs || output_count != 1) {
    report("expected 9 inputs and 1 output, got " + std::to_string(input_count) + " and " +
           std::to_string(output_count));
    return false;
  }
  bool fits = true;
  for (int32_t input = 0; fits && input < kInputs; ++input) {
    fits = sizes.take(input, shape(inputs[input]));
  }
  fits = fits && sizes.complete();
  if (!fits) report(sizes.reason());
  return fits;
}

bool is_index(int32_t input) { return input == kImageSlot || input == kImagePosition; }
bool is_narrow(int32_t input) { return input == kOffsets || input == kLogits; }

bool type_fits(int32_t input, nvinfer1::DataType type, nvinfer1::DataType value_type) {
  if (input == kValue) {
    return type == nvinfer1::DataType::kFLOAT || type == nvinfer1::DataType::kHALF ||
           type == nvinfer1::DataType::kBF16;
  }
  if (is_narrow(input)) return type == value_type;
  return type == (is_index(input) ? nvinfer1::DataType::kINT32 : nvinfer1::DataType::kFLOAT);
}

class MmfsPlugin final : public PluginBase {
 public:
  explicit MmfsPlugin(const Attributes& attributes)
      : PluginBase(kName), attributes_(attributes) {
    const int32_t levels = attributes_.levels;
    fields_[0] = {"level_heights", attributes_.level_height, PluginFieldType::kINT32, levels};
    fields_[1] = {"level_widths", attributes_.level_width, PluginFieldType::kINT32, levels};
    fields_[2] = {"base_grid", &attributes_.base_grid, PluginFieldType::kFLOAT32, 1};
    fields_[3] = {"null_slot", &attributes_.null_slot, PluginFieldType::kINT32, 1};
    fields_[4] = {"plugin_version", &kFieldsVersion, PluginFieldType::kINT32, 1};
    collection_ = {5, fields_};
    for (int32_t level = 0; level < levels; ++level) {
      timing_id_ += std::to_string(attributes_.level_height[level]) + "x" +
                    std::to_string(attributes_.level_width[level]) + " ";
    }
    timing_id_ += attributes_.null_slot != 0 ? "null" : "plain";
  }

  nvinfer1::IPluginV3* clone() noexcept override {
    return new (std::nothrow) MmfsPlugin(attributes_);
  }
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override {
    preload();
    return clone();
  }

  int32_t getOutputDataTypes(nvinfer1::DataType* output_types, int32_t output_count,
                             const nvinfer1::DataType* types,
                             int32_t input_count) const noexcept override {
    if (input_count != kInputs || output_count != 1) {
      report("expected 9 inputs and 1 output, got " + std::to_string(input_count));
      return -1;
    }
    for (int32_t input = 0; input < kInputs; ++input) {
      if (type_fits(input, types[input], types[kValue])) continue;
      const std::string expected = input == kValue    ? "float32, float16 or bfloat16"
                                   : is_narrow(input) ? name_of(types[kValue]) + " as value"
                                   : is_index(input)  ? "int32"
                                                      : "float32";
      report("wrong type of " + std::string(kInputNames[input]) + "; expected " + expected +
             ", got " + name_of(types[input]));
      return -1;
    }
    output_types[0] = types[kValue];
    return 0;
  }

  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count,
                          const nvinfer1::DimsExprs*, int32_t, nvinfer1::DimsExprs* outputs,
                          int32_t output_count,
                          nvinfer1::IExprBuilder& expressions) noexcept override {
    Sizes sizes(attributes_);
    if (!fits(sizes, inputs, input_count, output_count)) return -1;
    const nvinfer1::DimsExprs &value = inputs[kValue], &offsets = inputs[kOffsets];
    outputs[0].nbDims = 3;  // [b, q, h * d]
    outputs[0].d[0] = offsets.d[0];
    outputs[0].d[1] = offsets.d[1];
    outputs[0].d[2] =
        expressions.operation(nvinfer1::DimensionOperation::kPROD, *value.d[2], *value.d[3]);
    return 0;
  }

  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                 int32_t input_count, int32_t output_count) noexcept override {
    if (input_count != kInputs || output_count != 1) return false;
    const PluginTensorDesc& tensor = tensors[position].desc;
    const nvinfer1::DataType value_type = tensors[kValue].desc.type;
    if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
    if (position == kInputs) return tensor.type == value_type;
    return type_fits(position, tensor.type, value_type);
  }

  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc*,
                          int32_t output_count) noexcept override {
    Sizes sizes(attributes_);
    return fits(sizes, inputs, input_count, output_count) ? 0 : -1;
  }

  int32_t onShapeChange(const PluginTensorDesc* inputs, int32_t input_count,
                        const PluginTensorDesc*, int32_t output_count) noexcept override {
    Sizes sizes(attributes_);
    return fits(sizes, inputs, input_count, output_count) ? 0 : -1;
  }

  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t,
                          const nvinfer1::DynamicPluginTensorDesc*,
                          int32_t) const noexcept override {
    Sizes sizes(attributes_);
    for (int32_t input = 0; input < kInputs; ++input) sizes.grow(input, shape(inputs[input].max));
    return workspace_bytes(sizes.call());
  }

  int32_t enqueue(const PluginTensorDesc* descriptions, const PluginTensorDesc*,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override {
    Sizes sizes(attributes_);
    if (!fits(sizes, descriptions, kInputs, 1)) return -1;
    MmfsCall& call = sizes.call();
    call.type = data_type(descriptions[kValue].type);
    call.value = inputs[kValue];
    call.image_slot = static_cast<const int32_t*>(inputs[kImageSlot]);
    call.offsets = inputs[kOffsets];
    call.logits = inputs[kLogits];
    call.offset_table = static_cast<const float*>(inputs[kOffsetTable]);
    call.logit_table = static_cast<const float*>(inputs[kLogitTable]);
    call.image_position = static_cast<const int32_t*>(inputs[kImagePosition]);
    call.reference = static_cast<const float*>(inputs[kReference]);
    call.null_value = static_cast<const float*>(inputs[kNullValue]);
    call.output = outputs[0];
    const char* reason = launch(call, workspace, stream);
    if (reason != nullptr) report(reason);
    return reason == nullptr ? 0 : -1;
  }

 private:
  Attributes attributes_;
};

// Checks type and length of a field before its data is read.
bool field_fits(const PluginField& field, PluginFieldType type, int32_t most) {
  const char* kind = type == PluginFieldType::kFLOAT32 ? "float32" : "int32";
  if (field.type == type && field.data != nullptr && 1 <= field.length && field.length <= most) {
    return true;
  }
  report("attribute " + std::string(field.name) + "; expected " +
         (most == 1 ? "one " : "1 to 4 ") + kind + ", got " + std::to_string(field.length) +
         " of TensorRT's field type " + std::to_string(static_cast<int32_t>(field.type)));
  return false;
}

class MmfsPluginCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  const char* getPluginName() const noexcept override { return kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  // Attributes of the ONNX node, for the parser; the version of the fields is not an attribute.
  const PluginFieldCollection* getFieldNames() noexcept override {
    static const PluginField fields[] = {
        {"level_heights", nullptr, PluginFieldType::kINT32, 1},
        {"level_widths", nullptr, PluginFieldType::kINT32, 1},
        {"base_grid", nullptr, PluginFieldType::kFLOAT32, 1},
        {"null_slot", nullptr, PluginFieldType::kINT32, 1},
    };
    static const PluginFieldCollection collection = {4, fields};
    return &collection;
  }

  nvinfer1::IPluginV3* createPlugin(const char*, const PluginFieldCollection* collection,
                                    nvinfer1::TensorRTPhase phase) noexcept override {
    Attributes attributes;
    int32_t heights = 0, widths = 0, grids = 0, nulls = 0;  // lengths of the fields
    int32_t version = 0;
    const int32_t count = collection == nullptr ? 0 : collection->nbFields;
    for (int32_t index = 0; index < count; ++index) {
      const PluginField& field = collection->fields[index];
      if (!read(field, "level_heights", attributes.level_height, kMaxLevels, heights) ||
          !read(field, "level_widths", attributes.level_width, kMaxLevels, widths) ||
          !read(field, "base_grid", &attributes.base_grid, 1, grids) ||
          !read(field, "null_slot", &attributes.null_slot, 1, nulls)) {
        return nullptr;
      }
      int32_t length = 0;
      if (field.type == PluginFieldType::kINT32 &&
          !read(field, "plugin_version", &version, 1, length)) {
        return nullptr;
      }
    }
    if (heights == 0 || widths == 0 || grids == 0 || nulls == 0) {
      report("attributes missing; expected level_heights, level_widths, base_grid and null_slot");
      return nullptr;
    }
    if (heights != widths) {
      report("level_heights and level_widths differ in length; got " + std::to_string(heights) +
             " and " + std::to_string(widths));
      return nullptr;
    }
    if (phase == nvinfer1::TensorRTPhase::kRUNTIME && version != kFieldsVersion) {
      report("the engine holds fields of version " + std::to_string(version) +
             ", this library reads version 1; build the engine again");
      return nullptr;
    }
    attributes.levels = heights;
    Sizes sizes(attributes);
    if (!sizes.complete()) {
      report(sizes.reason());
      return nullptr;
    }
    return new (std::nothrow) MmfsPlugin(attributes);
  }

 private:
  // Copies the field if it has that name. Reports a wrong type or length and returns false.
  template <typename Number>
  static bool read(const PluginField& field, const char* name, Number* data, int32_t most,
                   int32_t& length) {
    if (std::strcmp(field.name, name) != 0) return true;
    constexpr bool kFloat = static_cast<Number>(0.5) != Number{0};
    if (!field_fits(field, kFloat ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32, most)) {
      return false;
    }
    std::memcpy(data, field.data, field.length * sizeof(Number));
    length = field.length;
    return true;
  }
};

}  // namespace

void report(const char* name, const std::string& reason) {
  const std::string line = std::string(kNamespace) + "::" + name + ": " + reason;
  {
    const std::lock_guard<std::mutex> lock(last_line_mutex);
    last_line = line;
  }
  nvinfer1::ILoggerFinder* finder = logger_finder.load();
  nvinfer1::ILogger* logger = finder == nullptr ? nullptr : finder->findLogger();
  if (logger != nullptr) {
    logger->log(nvinfer1::ILogger::Severity::kERROR, line.c_str());
  } else {
    std::fprintf(stderr, "%s\n", line.c_str());
  }
}

}  // namespace mmi

#define MMI_TEXT_OF(number) #number
#define MMI_TEXT(number) MMI_TEXT_OF(number)
#define MMI_EXPORT extern "C" __attribute__((visibility("default")))

// Version of the headers this library was built with; the loader compares it with the runtime.
MMI_EXPORT const char* mmi_tensorrt_headers() {
#if defined(TRT_MAJOR_RTX)
  return "RTX " MMI_TEXT(NV_TENSORRT_MAJOR) "." MMI_TEXT(NV_TENSORRT_MINOR);
#else
  return "TensorRT " MMI_TEXT(NV_TENSORRT_MAJOR) "." MMI_TEXT(NV_TENSORRT_MINOR);
#endif
}

// Copies the last reported line: TensorRT itself only says that a call failed.
MMI_EXPORT void mmi_last_report(char* line, size_t size) {
  const std::lock_guard<std::mutex> lock(mmi::last_line_mutex);
  std::snprintf(line, size, "%s", mmi::last_line.c_str());
}

MMI_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  mmi::logger_finder.store(finder);
}

#if defined(MMI_REGISTER_TENSORRT_PLUGIN)
namespace mmi {
namespace {

// Like REGISTER_TENSORRT_PLUGIN, but into namespace `mmi`, and only where the major version agrees:
// otherwise the registry's class differs from the headers' and the call would be undefined.
struct Registrar {
  Registrar() {
    const int32_t version = getInferLibVersion();  // 110100: 11.1.0
    if (version / 10000 == NV_TENSORRT_MAJOR) {
      getPluginRegistry()->registerCreator(creator, kNamespace);
      getPluginRegistry()->registerCreator(gemv_creator(), kNamespace);
    } else {
      report(std::string("this library was built for another TensorRT; expected ") +
             mmi_tensorrt_headers() + ", got " + std::to_string(version / 10000) + "." +
             std::to_string(version / 100 % 100) + "; build it again");
    }
  }
  MmfsPluginCreator creator;
} registrar;

}  // namespace
}  // namespace mmi
#else
MMI_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static mmi::MmfsPluginCreator creator;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator, &mmi::gemv_creator()};
  count = 2;
  return creators;
}
#endif
