"""Metrics of the paper's benchmarks, a file each: functions of answers and references alone."""
