"""Checkpoints on disk: reading, writing, hashing, proving what lies there, and where models come from.

May import only errors, pattern, machine and progress; knows nothing of models or of pruning.
"""
