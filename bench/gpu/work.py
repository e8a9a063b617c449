"""What is measured: layer shapes of real models, batches, patterns, and random weights of those shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from ...packed.format import pack

Shapes = dict[str, dict[str, tuple[int, int]]]

SHAPES: Final[Shapes] = {
    "Llama-3.1-8B": {"gate_up": (28672, 4096), "down": (4096, 14336), "qkv": (6144, 4096), "o": (4096, 4096)},
    "Llama-3.2-1B": {"gate_up": (16384, 2048), "down": (2048, 8192), "qkv": (3072, 2048), "o": (2048, 2048)},
    "Qwen2.5-7B": {"gate_up": (37888, 3584), "down": (3584, 18944), "qkv": (4608, 3584), "o": (3584, 3584)},
}
PATTERNS: Final = {"2:4": 4, "16:32": 32}
DENSE: Final = "dense"
LLAMA_8B: Final[dict[str, Any]] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
TINY: Final[dict[str, Any]] = LLAMA_8B | {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
_DRAWN_ROWS: Final = 64


@dataclass(frozen=True)
class Plan:
    """The sizes of one run; `rehearsal` is the same run at sizes an interpreter can do.

    pruned: of the Llama that is pruned. windows: of its calibration, and tokens in each. prunings: by name, options.
    """

    device: str
    shapes: Shapes
    batches: tuple[int, ...]
    model: dict[str, Any]
    prompt: int
    rounds: int
    cold_bytes: int
    copied_bytes: int
    square: int
    variants: tuple[str, ...]
    pruned: dict[str, Any]
    windows: tuple[int, int]
    prunings: dict[str, dict[str, Any]]

    @property
    def on_gpu(self) -> bool:
        """Whether this is the real thing."""
        return self.device == "cuda"


REAL: Final = Plan(
    "cuda",
    SHAPES,
    (1, 2, 4, 8, 16, 32, 64, 256, 1024, 2048),
    LLAMA_8B,
    2048,
    9,
    256 << 20,
    1 << 30,
    8192,
    (DENSE, *PATTERNS),
    LLAMA_8B | {"vocab_size": 4096, "num_hidden_layers": 2},
    (64, 1024),
    {**{name: {"method": name} for name in ("wanda", "crepe", "sparsegpt")}, "best": {"recipe": "best"}},
)
REHEARSAL: Final = Plan(
    "cpu", {"tiny": {"o": (16, 96)}}, (1, 16), TINY, 2, 0, 1, 1 << 10, 8, (DENSE, "2:4"), TINY, (8, 16),
    {"crepe": {"method": "crepe"}, "best": {"recipe": "best"}},
)  # fmt: skip


def random_packed(shape: tuple[int, int], group: int, device: str) -> tuple[Tensor, Tensor]:
    """A stored bf16 pair of `shape` (out, in) with a random half of every group kept; some rows are repeated."""
    rows, columns = shape
    drawn = min(_DRAWN_ROWS, rows)
    scores = torch.rand(drawn, columns // group, group)
    mask = torch.zeros(scores.shape, dtype=torch.bool).scatter_(2, scores.topk(group // 2).indices, True)
    weight = (torch.randn(drawn, columns) / columns**0.5).bfloat16()
    values, mask_bytes = pack(weight, mask.view(drawn, columns))
    times = -(-rows // drawn)
    return tuple(t.repeat(times, 1)[:rows].contiguous().to(device) for t in (values, mask_bytes))  # type: ignore[return-value]
