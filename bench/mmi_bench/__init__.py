"""How fast deployment is: the runtime against the same weights, run as the published code does."""
