// Calls the plugin of mmi::WeightOnlyMatMul as TensorRT would, without TensorRT:
// driver LIBRARY COMMAND NUMBER... What the plugin refuses it says on stderr itself.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

constexpr int kInputs = 3;

template <typename Interface>
Interface* interface_of(IPluginV3* plugin, PluginCapabilityType type) {
  return static_cast<Interface*>(plugin->getCapabilityInterface(type));
}

void print(const PluginFieldCollection* fields) {
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    std::printf("%s%s=%d", i == 0 ? "" : " ", fields->fields[i].name,
                *static_cast<const int32_t*>(fields->fields[i].data));
  }
  std::printf("\n");
}

// Inputs and output of int4 in blocks of 64, [rows, 192] times [192, 40].
std::vector<DynamicPluginTensorDesc> tensors(DataType type, int rows, int most) {
  const std::vector<std::vector<int64_t>> shapes = {
      {rows, 192}, {3, 2, 256}, {3, 2, 8, 2, 2}, {rows, 40}};
  std::vector<DynamicPluginTensorDesc> tensors(kInputs + 1);
  for (int i = 0; i <= kInputs; ++i) {
    DynamicPluginTensorDesc& tensor = tensors[i];
    tensor.desc.dims.nbDims = static_cast<int32_t>(shapes[i].size());
    for (size_t axis = 0; axis < shapes[i].size(); ++axis) {
      tensor.desc.dims.d[axis] = shapes[i][axis];
    }
    tensor.desc.type = i == 1 ? DataType::kINT32 : type;
    tensor.desc.format = TensorFormat::kLINEAR;
    tensor.min = tensor.max = tensor.opt = tensor.desc.dims;
    if (i == 0 || i == kInputs) tensor.max.d[0] = most;
  }
  return tensors;
}

}  // namespace

int main(int count, char** arguments) {
  void* library = dlopen(arguments[1], RTLD_NOW);
  if (library == nullptr) return std::fprintf(stderr, "%s\n", dlerror()), 3;
  using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
  int32_t creators = 0;
  auto* all = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"))(creators);
  IPluginCreatorV3One* creator = nullptr;
  for (int32_t i = 0; i < creators; ++i) {
    auto* each = static_cast<IPluginCreatorV3One*>(all[i]);
    if (std::strcmp(each->getPluginName(), "WeightOnlyMatMul") == 0) creator = each;
  }
  std::vector<int> numbers;
  for (int i = 3; i < count; ++i) numbers.push_back(std::atoi(arguments[i]));
  const std::string command = arguments[2];

  int32_t format = 2, out = 40, block = 64;
  if (command == "create") format = numbers[0], out = numbers[1], block = numbers[2];
  std::vector<PluginField> fields = {{"format", &format, PluginFieldType::kINT32, 1},
                                     {"out", &out, PluginFieldType::kINT32, 1},
                                     {"block", &block, PluginFieldType::kINT32, 1}};
  if (command == "missing") fields.pop_back();
  if (command == "long") fields[1].length = 2;
  const auto phase = command == "run" ? TensorRTPhase::kRUNTIME : TensorRTPhase::kBUILD;
  const PluginFieldCollection collection = {static_cast<int32_t>(fields.size()), fields.data()};
  std::unique_ptr<IPluginV3> plugin(creator->createPlugin("", &collection, phase));
  if (plugin == nullptr) return std::printf("refused\n"), 0;
  auto* build = interface_of<IPluginV3OneBuild>(plugin.get(), PluginCapabilityType::kBUILD);
  auto* runtime = interface_of<IPluginV3OneRuntime>(plugin.get(), PluginCapabilityType::kRUNTIME);

  if (command == "create") {
    std::printf("made\n");
  } else if (command == "stored") {
    const PluginFieldCollection* stored = runtime->getFieldsToSerialize();
    print(stored);
    std::unique_ptr<IPluginV3> again(creator->createPlugin("", stored, TensorRTPhase::kRUNTIME));
    std::unique_ptr<IPluginV3> copy(again->clone());
    const auto kind = PluginCapabilityType::kRUNTIME;
    std::unique_ptr<IPluginV3> attached(
        interface_of<IPluginV3OneRuntime>(again.get(), kind)->attachToContext(nullptr));
    again.reset();
    print(interface_of<IPluginV3OneRuntime>(attached.get(), kind)->getFieldsToSerialize());
    print(interface_of<IPluginV3OneRuntime>(copy.get(), kind)->getFieldsToSerialize());
  } else if (command == "types") {  // T; the types that each tensor may have, and the output's
    auto all_tensors = tensors(static_cast<DataType>(numbers[0]), 2, 2);
    for (int i = 0; i <= kInputs; ++i) {
      const DynamicPluginTensorDesc right = all_tensors[i];
      for (int type = 0; type <= 8; ++type) {
        all_tensors[i].desc.type = static_cast<DataType>(type);
        if (build->supportsFormatCombination(i, all_tensors.data(), kInputs, 1)) {
          std::printf("%d", type);
        }
      }
      all_tensors[i] = right;
      all_tensors[i].desc.format = TensorFormat::kCHW2;
      if (build->supportsFormatCombination(i, all_tensors.data(), kInputs, 1)) std::printf("!");
      all_tensors[i] = right;
      std::printf(" ");
    }
    DataType types[kInputs], output = DataType::kINT8;
    for (int i = 0; i < kInputs; ++i) types[i] = all_tensors[i].desc.type;
    const int32_t error = build->getOutputDataTypes(&output, 1, types, kInputs);
    std::printf("-> %d %d\n", error, static_cast<int>(output));
  } else if (command == "shapes") {  // rows, most rows; input, axis and size that differ
    auto all_tensors = tensors(DataType::kHALF, numbers[0], numbers[1]);
    if (numbers.size() == 5) all_tensors[numbers[2]].desc.dims.d[numbers[3]] = numbers[4];
    std::vector<PluginTensorDesc> described;
    for (const auto& tensor : all_tensors) described.push_back(tensor.desc);
    std::printf("%d %d %zu\n",
                build->configurePlugin(all_tensors.data(), kInputs, &all_tensors[kInputs], 1),
                runtime->onShapeChange(described.data(), kInputs, &described[kInputs], 1),
                build->getWorkspaceSize(all_tensors.data(), kInputs, &all_tensors[kInputs], 1));
  } else if (command == "enqueue") {  // every address
    auto all_tensors = tensors(DataType::kHALF, 2, 2);
    std::vector<PluginTensorDesc> described;
    for (const auto& tensor : all_tensors) described.push_back(tensor.desc);
    void* address = reinterpret_cast<void*>(static_cast<uintptr_t>(numbers[0]));
    const void* inputs[kInputs] = {address, address, address};
    std::printf("%d\n", runtime->enqueue(described.data(), &described[kInputs], inputs, &address,
                                         address, nullptr));
  }
  return 0;
}
