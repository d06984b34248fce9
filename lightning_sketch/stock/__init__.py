"""Optimizers without an update rule of ours: their states are decoded, stepped by their own step, and encoded again."""
