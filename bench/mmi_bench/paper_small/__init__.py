"""The paper in small: pre-training, the fine-tunings and their benchmarks, on drawn data sets."""
