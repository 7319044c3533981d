"""Readers of the paper's data sets in their published formats."""
