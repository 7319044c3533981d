"""`mmi bench`: the runtime against the published way of running the same weights."""
