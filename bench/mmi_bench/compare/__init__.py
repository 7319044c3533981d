"""`mmi bench`: the runtime against PyTorch in the published order of work, equal weights."""
