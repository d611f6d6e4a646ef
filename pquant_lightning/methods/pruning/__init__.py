"""Pruning: weights set to zero for good, and channels removed."""
