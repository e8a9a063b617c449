"""Where a family's blocks keep experts, how files hold them, how its routers choose. Data only, as `families.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

Spread = Literal["chosen", "all", "nobody"]
COUNTS: Final = ("num_experts", "num_local_experts", "n_routed_experts")  # spellings in config.json


@dataclass(frozen=True)
class Experts:
    """Experts of one size behind a router; a block that has no `module` of this kind is dense.

    module: their path in the block, as this transformers has it; router: its path. stored_at: what files write for
    the first part of both paths.
    stored: a parameter of `module` -> the names of one expert's tensors in files, within what files write for
    `module`, which lie below one another in it; {} is the expert's number. Files may as well hold the parameter
    itself, all experts fused, and of some families they always do.
    per_expert: of the router, what has a row for each expert. correction: its bias that only chooses, in float32.
    softmax: whether a router's weights are shares of one among all experts; else each is its own expert's.
    transposed: whether each expert's matrices are stored (in, out). gate: a linear layer that decides how much shared
    experts say, and is left whole as the router is.
    renormalised: whether the weights of the chosen experts are made to sum to a constant, or the field of the
    configuration that says so. groups: the fields with the number of groups that a token chooses of first, and of
    those chosen.
    """

    module: str = "mlp.experts"
    router: str = "mlp.gate"
    stored_at: str = "mlp"
    stored: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {
            "gate_up_proj": ("{}.gate_proj.weight", "{}.up_proj.weight"),
            "down_proj": ("{}.down_proj.weight",),
        }
    )
    per_expert: tuple[str, ...] = ("weight",)
    correction: str = ""
    softmax: bool = True
    renormalised: bool | str = "norm_topk_prob"
    groups: tuple[str, str] | None = None
    transposed: bool = False
    gate: str = ""

    def spread(self, config: Any) -> Spread:
        """Whose router weights grow when a chosen expert is gone, in models of this configuration."""
        renormalised = getattr(config, self.renormalised) if isinstance(self.renormalised, str) else self.renormalised
        return "chosen" if renormalised else "all" if self.softmax else "nobody"

    def grouping(self, config: Any) -> tuple[int, int]:
        """The number of groups of experts, and how many of them a token chooses."""
        if self.groups is None:
            return 1, 1
        first, second = (int(getattr(config, name) or 1) for name in self.groups)
        return first, second

    def in_files(self, name: str) -> str:
        """What files write for the name of a parameter, within its block or in the whole model."""
        inside = self.module.partition(".")[0]
        return f".{name}".replace(f".{inside}.", f".{self.stored_at}.", 1).removeprefix(".")


MIXTRAL: Final = Experts(
    stored_at="block_sparse_moe",
    stored={"gate_up_proj": ("{}.w1.weight", "{}.w3.weight"), "down_proj": ("{}.w2.weight",)},
    renormalised=True,
)
QWEN: Final = Experts(gate="mlp.shared_expert_gate")
CORRECTED: Final = Experts(
    per_expert=("weight", "e_score_correction_bias"),
    correction="e_score_correction_bias",
    softmax=False,
    groups=("n_group", "topk_group"),
)
GPT_OSS: Final = Experts(
    router="mlp.router", stored={}, per_expert=("weight", "bias"), renormalised=True, transposed=True
)
