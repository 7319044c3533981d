"""`python -m mmi_train.golden DIR`: our modules against runs of the published code."""
