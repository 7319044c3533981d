"""The specification that training, export, builds and runtime share: configuration, graph contract,
token layout, schedules and targets.
"""
