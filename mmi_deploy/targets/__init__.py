"""Build targets from portable graphs: rewritten CPU graphs and TensorRT engines."""
