"""Hot operations: each has a readable reference and, behind the same signature, a fast twin."""
