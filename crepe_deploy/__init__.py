"""crepe-deploy: prune language models after training, ship and prove smaller, faster checkpoints."""

__version__ = "0.1.0"
