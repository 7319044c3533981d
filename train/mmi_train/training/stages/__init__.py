"""Training stages: the batches and losses of each."""

# Before the model's own names in stages that train more modules than the model.
MODEL_PREFIX = "model."

# Before the names of the critic in distribution matching.
CRITIC_PREFIX = "critic."
