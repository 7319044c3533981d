"""The MMFS operator as a custom-op library for ONNX Runtime."""
