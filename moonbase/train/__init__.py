"""The training loop, its callbacks, precision and parallelism."""
