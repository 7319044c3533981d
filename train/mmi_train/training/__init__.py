"""Training loop, optimiser, checkpoints, stages, and the recipe of a model from scratch."""
