// Parts that the TensorRT plugins of the library share.
#pragma once

#include <NvInferRuntime.h>

#include <string>

#include "data_type.h"
#include "sizes.h"

#if !defined(TRT_MAJOR_RTX)
static_assert(NV_TENSORRT_MAJOR > 10 || (NV_TENSORRT_MAJOR == 10 && NV_TENSORRT_MINOR >= 12),
              "the plugin needs the headers of TensorRT 10.12 or newer");
#endif

namespace mmi {

constexpr const char* kNamespace = "mmi";
constexpr const char* kVersion = "1";

// Reports one error line about an operator to the logger of the engine that is calling, else to
// stderr.
void report(const char* name, const std::string& reason);

// The creator of mmi::WeightOnlyMatMul (tensorrt_gemv_plugin.cpp).
nvinfer1::IPluginCreatorV3One& gemv_creator();

// Base of both plugins: interfaces, names and fields, which point into the object.
class PluginBase : public nvinfer1::IPluginV3,
                   public nvinfer1::IPluginV3OneCore,
                   public nvinfer1::IPluginV3OneBuild,
                   public nvinfer1::IPluginV3OneRuntime {
 public:
  PluginBase(const PluginBase&) = delete;
  PluginBase& operator=(const PluginBase&) = delete;

  nvinfer1::IPluginCapability* getCapabilityInterface(
      nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE:
        return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD:
        return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME:
        return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }

  const char* getPluginName() const noexcept override { return name_; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override {
    return &collection_;
  }

  // There is only one tactic; the id lets TensorRT time equal layers of an engine once.
  const char* getTimingCacheID() noexcept override { return timing_id_.c_str(); }

  int32_t getNbOutputs() const noexcept override { return 1; }

 protected:
  explicit PluginBase(const char* name) : name_(name) {}

  const char* name_;
  nvinfer1::PluginField fields_[5];
  nvinfer1::PluginFieldCollection collection_;
  std::string timing_id_;
};

inline Shape shape(const nvinfer1::Dims& dims) {
  Shape shape{dims.nbDims, {}};
  for (int32_t axis = 0; axis < dims.nbDims; ++axis) shape.side[axis] = dims.d[axis];
  return shape;
}

inline Shape shape(const nvinfer1::DimsExprs& dims) {
  Shape shape{dims.nbDims, {}};
  for (int32_t axis = 0; axis < dims.nbDims; ++axis) {
    const nvinfer1::IDimensionExpr* side = dims.d[axis];
    shape.side[axis] = side->isConstant() ? side->getConstantValue() : kUnknown;
  }
  return shape;
}

inline Shape shape(const nvinfer1::PluginTensorDesc& tensor) { return shape(tensor.dims); }
inline Shape shape(const nvinfer1::DynamicPluginTensorDesc& tensor) {
  return shape(tensor.desc.dims);
}

inline DataType data_type(nvinfer1::DataType type) {
  if (type == nvinfer1::DataType::kHALF) return DataType::kFloat16;
  return type == nvinfer1::DataType::kBF16 ? DataType::kBFloat16 : DataType::kFloat32;
}

inline std::string name_of(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT: return "float32";
    case nvinfer1::DataType::kHALF: return "float16";
    case nvinfer1::DataType::kBF16: return "bfloat16";
    case nvinfer1::DataType::kINT32: return "int32";
    case nvinfer1::DataType::kINT64: return "int64";
    default: return "TensorRT's data type " + std::to_string(static_cast<int32_t>(type));
  }
}

}  // namespace mmi
