"""Training stages: batches and losses of each."""
