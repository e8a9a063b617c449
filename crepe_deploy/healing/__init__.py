"""Training a pruned model back towards its dense parent with its zeros held; the command `heal` and what others need.

`zeros.py` holds the zeros of a model while anything trains it, and `callback.py` does so inside a transformers Trainer:
both are public. The rest is `heal`: `loss.py`, what is trained (`student.py`, `lora.py`), on what (`batches.py`), the
loop (`train.py`, `optimizer.py`, `checkpoints.py`), what is written (`write.py`). Imports everything above it on the
map and neither export, serve nor bench.
"""

from .callback import HoldZeros
from .zeros import HeldZeros, hold_zeros

__all__ = ["HeldZeros", "HoldZeros", "hold_zeros"]
