"""Benchmark of a server: load, client, measures, reports, and the comparison of two results."""
