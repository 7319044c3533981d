"""Training stages: the batches and losses of each."""
