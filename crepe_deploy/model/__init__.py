"""A decoder that computes: the table of families, blocks on demand, calibration statistics, proof by logits.

May import the store; knows nothing of pruning.
"""
