"""Specification shared by training, export, builds and runtime: configuration, graph contract,
token layout, schedules and targets.
"""
