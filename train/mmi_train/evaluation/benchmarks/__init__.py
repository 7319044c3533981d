"""The paper's benchmarks: references of each set, files of predictions, scores, submissions."""
