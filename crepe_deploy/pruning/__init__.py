"""Pruning a checkpoint: what is asked for (config, recipes, presets), methods, the steps around them, the pipeline.

May import the store and the model; knows nothing of export, packing, search or commands.
"""
