"""The stages between a checkpoint and a bundle: each a function from file to file."""
