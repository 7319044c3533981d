"""Test tools for the CUDA kernels without a GPU: PTX emulator, CPU shim, mutants, budgets.

Not part of the wheel; used by the tests and by `python -m mmi_plugins.check`.
"""
