"""crepe-deploy: prune language models after training, ship and prove smaller, faster checkpoints.

Importing this package lets `transformers.AutoModelForCausalLM.from_pretrained` load packed checkpoints.
"""

from . import hf_hook

__version__ = "0.1.0"

hf_hook.install()
