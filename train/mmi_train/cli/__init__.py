"""Commands of `mmi` that train and import models: train, evaluate, convert, init."""
