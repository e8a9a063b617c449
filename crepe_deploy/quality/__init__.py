"""What a model is worth: perplexity, KL to a dense model, zero-shot accuracy, each with its convention.

May import the store and the model; knows nothing of pruning.
"""
