"""Export of a model folder to a bundle of ONNX graphs."""
