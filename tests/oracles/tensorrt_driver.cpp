// Calls a plugin library as TensorRT would, without TensorRT: driver LIBRARY COMMAND ARGUMENT...
// Sizes are given as letter=number; what the plugin refuses it says on stderr itself.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

const char* const kAxes[] = {"nshd", "bm", "bqhp2", "bqhlp", "rhp2", "rhlp", "b*m", "*2", "hd"};
constexpr int kInputs = 9;

template <typename Interface>
Interface* interface_of(IPluginV3* plugin, PluginCapabilityType type) {
  return static_cast<Interface*>(plugin->getCapabilityInterface(type));
}

void print(const PluginFieldCollection* fields) {
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    const PluginField& field = fields->fields[i];
    std::printf("%s%s=", i == 0 ? "" : " ", field.name);
    for (int32_t j = 0; j < field.length; ++j) {
      std::printf(j == 0 ? "" : ",");
      if (field.type == PluginFieldType::kINT32) {
        std::printf("%d", static_cast<const int32_t*>(field.data)[j]);
      } else {
        std::printf("%g", static_cast<const float*>(field.data)[j]);
      }
    }
  }
  std::printf("\n");
}

// The inputs and the output of a call in `narrow`; `letters` replaces sizes.
std::vector<PluginTensorDesc> tensors(DataType narrow, std::map<char, int32_t> letters) {
  std::map<char, int32_t> sizes = {{'b', 1}, {'q', 7}, {'m', 2}, {'h', 2}, {'l', 2}, {'p', 4},
                                   {'d', 32}, {'n', 3}, {'s', 20}, {'r', 8}, {'2', 2}, {'*', 1}};
  for (auto [letter, size] : letters) sizes[letter] = size;
  std::vector<PluginTensorDesc> tensors(kInputs + 1);
  for (int i = 0; i <= kInputs; ++i) {
    PluginTensorDesc& tensor = tensors[i];
    const std::string axes = i == kInputs ? "bqc" : kAxes[i];
    sizes['c'] = sizes['h'] * sizes['d'];
    tensor.dims.nbDims = static_cast<int32_t>(axes.size());
    for (size_t axis = 0; axis < axes.size(); ++axis) tensor.dims.d[axis] = sizes[axes[axis]];
    const bool is_narrow = i == 0 || i == 2 || i == 3 || i == kInputs;
    tensor.type = is_narrow ? narrow : i == 1 || i == 6 ? DataType::kINT32 : DataType::kFLOAT;
    tensor.format = TensorFormat::kLINEAR;
  }
  return tensors;
}

std::vector<DynamicPluginTensorDesc> dynamic(const std::vector<PluginTensorDesc>& tensors) {
  std::vector<DynamicPluginTensorDesc> dynamic;
  for (const PluginTensorDesc& tensor : tensors) {
    dynamic.push_back({tensor, tensor.dims, tensor.dims, tensor.dims});
  }
  return dynamic;
}

}  // namespace

int main(int count, char** arguments) {
  void* library = dlopen(arguments[1], RTLD_NOW);
  if (library == nullptr) return std::fprintf(stderr, "%s\n", dlerror()), 3;
  using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
  int32_t creators = 0;
  auto* creator = static_cast<IPluginCreatorV3One*>(
      reinterpret_cast<GetCreators>(dlsym(library, "getCreators"))(creators)[0]);

  const int32_t heights[] = {4, 2}, widths[] = {4, 2}, null_slot = 1;
  const float base_grid = 16;
  const PluginField fields[] = {{"level_heights", heights, PluginFieldType::kINT32, 2},
                                {"level_widths", widths, PluginFieldType::kINT32, 2},
                                {"base_grid", &base_grid, PluginFieldType::kFLOAT32, 1},
                                {"null_slot", &null_slot, PluginFieldType::kINT32, 1}};
  const PluginFieldCollection collection = {4, fields};
  std::unique_ptr<IPluginV3> plugin(creator->createPlugin("", &collection, TensorRTPhase::kBUILD));
  auto* build = interface_of<IPluginV3OneBuild>(plugin.get(), PluginCapabilityType::kBUILD);
  auto* runtime = interface_of<IPluginV3OneRuntime>(plugin.get(), PluginCapabilityType::kRUNTIME);

  const std::string command = arguments[2];
  std::map<char, int32_t> letters;
  std::vector<int> numbers;
  for (int i = 3; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument.size() > 2 && argument[1] == '=') {
      letters[argument[0]] = std::atoi(argument.c_str() + 2);
    } else {
      numbers.push_back(std::atoi(argument.c_str()));
    }
  }
  std::vector<PluginTensorDesc> described = tensors(DataType::kHALF, letters);

  if (command == "stored") {
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
  } else if (command == "types") {  // T, then each tensor's type and format in turn
    described = tensors(static_cast<DataType>(numbers[0]), letters);
    std::vector<DynamicPluginTensorDesc> all = dynamic(described);
    for (int i = 0; i <= kInputs; ++i) {
      std::string takes;
      const DynamicPluginTensorDesc right = all[i];
      for (int type = 0; type <= 8; ++type) {
        all[i].desc.type = static_cast<DataType>(type);
        if (build->supportsFormatCombination(i, all.data(), kInputs, 1)) takes += char('0' + type);
      }
      all[i] = right;
      all[i].desc.format = TensorFormat::kCHW2;
      if (build->supportsFormatCombination(i, all.data(), kInputs, 1)) takes += '!';
      all[i] = right;
      std::printf("%s%s", i == 0 ? "" : " ", takes.c_str());
    }
    DataType types[kInputs], output = DataType::kINT8;
    for (int i = 0; i < kInputs; ++i) types[i] = described[i].type;
    const int32_t error = build->getOutputDataTypes(&output, 1, types, kInputs);
    std::printf(" -> %d %d\n", error, static_cast<int>(output));
  } else if (command == "shapes") {  // input and axis that get another size, if any
    if (numbers.size() == 3) described[numbers[0]].dims.d[numbers[1]] = numbers[2];
    std::vector<DynamicPluginTensorDesc> all = dynamic(described);
    std::printf("%d %d\n", build->configurePlugin(all.data(), kInputs, &all[kInputs], 1),
                runtime->onShapeChange(described.data(), kInputs, &described[kInputs], 1));
  } else if (command == "workspace") {
    std::vector<DynamicPluginTensorDesc> all = dynamic(described);
    std::printf("%zu\n", build->getWorkspaceSize(all.data(), kInputs, &all[kInputs], 1));
  } else if (command == "enqueue") {  // every address
    void* address = reinterpret_cast<void*>(static_cast<uintptr_t>(numbers[0]));
    const void* inputs[kInputs];
    for (const void*& input : inputs) input = address;
    std::printf("%d\n", runtime->enqueue(described.data(), &described[kInputs], inputs, &address,
                                         address, nullptr));
  }
  return 0;
}
