// TensorRT plugin of mmi::WeightOnlyMatMul: one class with the three capabilities of IPluginV3, and
// its creator.
#include <cstring>
#include <new>
#include <string>

#include "gemv_launch.h"
#include "gemv_sizes.h"
#include "tensorrt_common.h"

namespace mmi {
namespace {

using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

constexpr const char* kName = "WeightOnlyMatMul";
constexpr int32_t kFieldsVersion = 1;  // of the serialised fields; any other version is refused

// Whether shapes form a valid call, as far as they are known; reports a reason if not.
bool fits(const GemvAttributes& attributes, const Shape (&shapes)[kGemvInputs]) {
  const GemvSizes sizes(attributes, shapes);
  if (!sizes.fits()) report(kName, sizes.reason());
  return sizes.fits();
}

bool counts_fit(int32_t input_count, int32_t output_count) {
  if (input_count == kGemvInputs && output_count == 1) return true;
  report(kName, "expected 3 inputs and 1 output, got " + std::to_string(input_count) + " and " +
                    std::to_string(output_count));
  return false;
}

template <typename Tensor>
bool fits(const GemvAttributes& attributes, const Tensor* inputs, int32_t input_count,
          int32_t output_count) {
  return counts_fit(input_count, output_count) &&
         fits(attributes, {shape(inputs[0]), shape(inputs[1]), shape(inputs[2])});
}

bool is_activation(nvinfer1::DataType type) {
  return type == nvinfer1::DataType::kHALF || type == nvinfer1::DataType::kBF16;
}

class GemvPlugin final : public PluginBase {
 public:
  explicit GemvPlugin(const GemvAttributes& attributes)
      : PluginBase(kName), attributes_(attributes) {
    fields_[0] = {"format", &attributes_.format, PluginFieldType::kINT32, 1};
    fields_[1] = {"out", &attributes_.out, PluginFieldType::kINT32, 1};
    fields_[2] = {"block", &attributes_.block, PluginFieldType::kINT32, 1};
    fields_[3] = {"plugin_version", &kFieldsVersion, PluginFieldType::kINT32, 1};
    collection_ = {4, fields_};
    timing_id_ = std::to_string(attributes_.format) + " " + std::to_string(attributes_.out) + " " +
                 std::to_string(attributes_.block);
  }

  nvinfer1::IPluginV3* clone() noexcept override {
    return new (std::nothrow) GemvPlugin(attributes_);
  }
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override {
    preload_gemv();
    return clone();
  }

  int32_t getOutputDataTypes(nvinfer1::DataType* output_types, int32_t output_count,
                             const nvinfer1::DataType* types,
                             int32_t input_count) const noexcept override {
    if (!counts_fit(input_count, output_count)) return -1;
    const std::string expected[kGemvInputs] = {"float16 or bfloat16", "int32",
                                               name_of(types[0]) + " as input"};
    const bool right[kGemvInputs] = {is_activation(types[0]),
                                     types[1] == nvinfer1::DataType::kINT32, types[2] == types[0]};
    for (int32_t input = 0; input < kGemvInputs; ++input) {
      if (right[input]) continue;
      report(kName, "wrong type of " + std::string(kGemvInputNames[input]) + "; expected " +
                        expected[input] + ", got " + name_of(types[input]));
      return -1;
    }
    output_types[0] = types[0];
    return 0;
  }

  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count,
                          const nvinfer1::DimsExprs*, int32_t, nvinfer1::DimsExprs* outputs,
                          int32_t output_count,
                          nvinfer1::IExprBuilder& expressions) noexcept override {
    if (!fits(attributes_, inputs, input_count, output_count)) return -1;
    outputs[0] = inputs[0];  // [..., out]
    outputs[0].d[outputs[0].nbDims - 1] = expressions.constant(attributes_.out);
    return 0;
  }

  bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors,
                                 int32_t input_count, int32_t output_count) noexcept override {
    if (input_count != kGemvInputs || output_count != 1) return false;
    const PluginTensorDesc& tensor = tensors[position].desc;
    if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
    if (position == 0) return is_activation(tensor.type);
    if (position == 1) return tensor.type == nvinfer1::DataType::kINT32;
    return tensor.type == tensors[0].desc.type;
  }

  int32_t configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const DynamicPluginTensorDesc*, int32_t output_count) noexcept override {
    return fits(attributes_, inputs, input_count, output_count) ? 0 : -1;
  }

  int32_t onShapeChange(const PluginTensorDesc* inputs, int32_t input_count,
                        const PluginTensorDesc*, int32_t output_count) noexcept override {
    return fits(attributes_, inputs, input_count, output_count) ? 0 : -1;
  }

  size_t getWorkspaceSize(const DynamicPluginTensorDesc*, int32_t, const DynamicPluginTensorDesc*,
                          int32_t) const noexcept override {
    return 0;
  }

  int32_t enqueue(const PluginTensorDesc* descriptions, const PluginTensorDesc*,
                  const void* const* inputs, void* const* outputs, void*,
                  cudaStream_t stream) noexcept override {
    GemvSizes sizes(attributes_,
                    {shape(descriptions[0]), shape(descriptions[1]), shape(descriptions[2])});
    if (!sizes.fits()) {
      report(kName, sizes.reason());
      return -1;
    }
    GemvCall& call = sizes.call();
    call.type = data_type(descriptions[0].type);
    call.input = inputs[0];
    call.weight = static_cast<const int32_t*>(inputs[1]);
    call.scales = inputs[2];
    call.output = outputs[0];
    const char* reason = launch_gemv(call, stream);
    if (reason != nullptr) report(kName, reason);
    return reason == nullptr ? 0 : -1;
  }

 private:
  GemvAttributes attributes_;
};

class GemvPluginCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  const char* getPluginName() const noexcept override { return kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  // Attributes of the ONNX node, for the parser; the version of the fields is not an attribute.
  const PluginFieldCollection* getFieldNames() noexcept override {
    static const PluginField fields[] = {
        {"format", nullptr, PluginFieldType::kINT32, 1},
        {"out", nullptr, PluginFieldType::kINT32, 1},
        {"block", nullptr, PluginFieldType::kINT32, 1},
    };
    static const PluginFieldCollection collection = {3, fields};
    return &collection;
  }

  nvinfer1::IPluginV3* createPlugin(const char*, const PluginFieldCollection* collection,
                                    nvinfer1::TensorRTPhase phase) noexcept override {
    GemvAttributes attributes;
    int32_t version = 0;
    const struct { const char* name; int32_t* to; } wanted[] = {{"format", &attributes.format},
                                                                {"out", &attributes.out},
                                                                {"block", &attributes.block},
                                                                {"plugin_version", &version}};
    int32_t found = 0;  // a bit for each
    const int32_t count = collection == nullptr ? 0 : collection->nbFields;
    for (int32_t index = 0; index < count; ++index) {
      const PluginField& field = collection->fields[index];
      for (int32_t place = 0; place < 4; ++place) {
        if (std::strcmp(field.name, wanted[place].name) != 0) continue;
        if (field.type != PluginFieldType::kINT32 || field.data == nullptr || field.length != 1) {
          report(kName, "attribute " + std::string(field.name) + "; expected one int32, got " +
                            std::to_string(field.length) + " of TensorRT's field type " +
                            std::to_string(static_cast<int32_t>(field.type)));
          return nullptr;
        }
        std::memcpy(wanted[place].to, field.data, sizeof(int32_t));
        found |= 1 << place;
      }
    }
    if ((found & 7) != 7) {
      report(kName, "attributes missing; expected format, out and block");
      return nullptr;
    }
    if (phase == nvinfer1::TensorRTPhase::kRUNTIME && version != kFieldsVersion) {
      report(kName, "the engine holds fields of version " + std::to_string(version) +
                        ", this library reads version 1; build the engine again");
      return nullptr;
    }
    GemvCall call{};  // some call with these attributes
    call.type = DataType::kFloat16;
    call.format = static_cast<WeightFormat>(attributes.format);
    call.rows = 1;
    call.in = kGemvStep;
    call.out = attributes.out;
    call.block = attributes.block;
    if (const char* reason = invalid_reason(call)) {
      report(kName, reason);
      return nullptr;
    }
    return new (std::nothrow) GemvPlugin(attributes);
  }
};

}  // namespace

nvinfer1::IPluginCreatorV3One& gemv_creator() {
  static GemvPluginCreator creator;
  return creator;
}

}  // namespace mmi
