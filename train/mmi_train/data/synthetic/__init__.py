"""The tiny model's training data: a drawn world, its documents, their checkers and vocabulary."""
