"""Ablations of the paper on the drawn world: rows of data, each trained with several seeds."""
