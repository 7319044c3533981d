"""Conformance tests of the MMFS operator: calls, implementations under test, comparison."""
