"""Building targets: rewritten CPU graphs and TensorRT engines from portable graphs."""
