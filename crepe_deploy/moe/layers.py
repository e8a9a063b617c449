"""The layers of a model that hold experts, from configuration and headers: how many, of what size, what may go."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from crepe_deploy.errors import ConfigError, UnsupportedModel
from crepe_deploy.model.blocks import expert_layer
from crepe_deploy.model.decoder import Decoder
from crepe_deploy.model.families import known


@dataclass(frozen=True)
class ExpertLayers:
    """indices: of the layers that hold experts. experts: in each. per_token: routed to a token.

    groups, groups_per_token: of experts, a token choosing groups first. parameters: in all files; of them in_experts.
    beyond: layers in the files that the model itself does not run (multi-token prediction).
    """

    indices: list[int]
    experts: int
    per_token: int
    groups: int
    groups_per_token: int
    parameters: int
    in_experts: int
    beyond: list[int]

    def sizes(self, kept: int | None = None) -> dict[str, int]:
        """Parameters held, and active for a token, with `kept` experts in each layer; None: all."""
        expert = self.in_experts // self.experts
        held = self.parameters - expert * (self.experts - (self.experts if kept is None else kept))
        return {"held": held, "active": self.parameters - expert * (self.experts - self.per_token)}

    def record(self) -> dict[str, Any]:
        """What `plan` and `inspect` say of them; held_without: parameters that stay, by share removed."""
        shares = {str(share): math.floor(share * self.experts + 0.5) for share in (0.25, 0.5)}
        return {
            "layers": len(self.indices), "experts": self.experts, "per_token": self.per_token, "groups": self.groups,
            "parameters": self.sizes(),
            "held_without": {share: self.sizes(self.experts - count)["held"] for share, count in shares.items()},
        }  # fmt: skip

    def count_removed(self, remove: float) -> int:
        """How many experts of each layer go: `remove` of them below 1, a share, rounded; or so many.

        Raises ConfigError, naming what would do.
        """
        count = math.floor(remove * self.experts + 0.5) if 0 < remove < 1 else int(remove)
        fewest = max(self.per_token, math.ceil(self.per_token / self.groups_per_token) * self.groups)
        most = self.experts - max(fewest, 2 * self.groups)  # a group is judged by its two best experts
        possible = list(range(self.groups, most + 1, self.groups))
        if remove >= 1 and count != remove:
            raise ConfigError(f"--remove {remove}: a share below 1, or a whole number of experts of each layer")
        if count not in possible:
            near = sorted(sorted(possible, key=lambda one: abs(one - count))[:2])
            because = [f"{self.per_token} of {self.experts} experts are routed to a token"]
            because += [f"all {self.groups} groups lose equally many"] if self.groups > 1 else []
            offer = f"; --remove {' or '.join(map(str, near))} would do" if near else ""
            raise ConfigError(f"--remove {remove:g} is {count} experts of each layer, and {', '.join(because)}{offer}")
        return count


def layers_if_any(decoder: Decoder) -> ExpertLayers | None:
    """As `expert_layers`; None for a model without experts that are known."""
    held = decoder.experts is not None and any(expert_layer(block, decoder.experts) for block in decoder.blocks)
    return expert_layers(decoder) if held else None


def expert_layers(decoder: Decoder) -> ExpertLayers:
    """Of a model whose decoder was made with `experts=True`. Raises UnsupportedModel where no layer holds any."""
    kind, root = decoder.config.model_type, decoder.reader.root
    if decoder.experts is None:
        raise UnsupportedModel(f"{root}: model type '{kind}' has no experts that are known; {known('experts')} have")
    indices, counts, inside = [], set[int](), 0
    for index, block in enumerate(decoder.blocks):
        layer = expert_layer(block, decoder.experts)
        if layer is not None:
            indices.append(index)
            counts.add(len(layer[1].get_parameter("down_proj")))
            inside += sum(parameter.numel() for parameter in layer[1].parameters())
    if len(counts) != 1:
        raise UnsupportedModel(f"{root}: none of its {len(decoder.blocks)} layers holds experts")
    groups, chosen = decoder.experts.grouping(decoder.config)
    prefix = f"{decoder.blocks_path}."
    numbers = {
        name.removeprefix(prefix).partition(".")[0] for name in decoder.reader.tensors if name.startswith(prefix)
    }
    return ExpertLayers(
        indices=indices,
        experts=counts.pop(),
        per_token=int(decoder.config.num_experts_per_tok),
        groups=groups,
        groups_per_token=chosen,
        parameters=sum(math.prod(info.shape) for info in decoder.reader),
        in_experts=inside,
        beyond=sorted(int(one) for one in numbers if one.isdecimal() and int(one) >= len(decoder.blocks)),
    )
