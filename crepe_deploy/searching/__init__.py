"""Finding a score's hyperparameters: a space, proxies that need no model, optimisers, the losses of the masked model.

May import model, pruning and store; knows nothing of exports or benchmarks.
"""
