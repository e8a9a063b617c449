"""Finding a score's hyperparameters: a space, proxies that need no model, optimisers, and a judge that does."""
