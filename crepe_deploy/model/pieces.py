"""Which stored tensors a parameter is made of: itself as a rule; of experts that files hold one by one, all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crepe_deploy.errors import CheckpointError
from crepe_deploy.store.checkpoint import CheckpointReader

from .experts import Experts


@dataclass(frozen=True)
class Piece:
    """A tensor of the files, by name, and its shape. Where it is not the whole parameter: whose it is, and its rows
    there from `first_row` on."""

    key: str
    shape: tuple[int, ...]
    expert: int | None = None
    first_row: int = 0

    def of(self, whole: Tensor) -> Tensor:
        """What it is of the whole parameter; one memory with it."""
        return whole if self.expert is None else whole[self.expert, self.first_row : self.first_row + self.shape[0]]


def expert_pieces(reader: CheckpointReader, experts: Experts, name: str, shape: tuple[int, ...]) -> list[Piece]:
    """The pieces of a fused parameter of a block, which has its file's prefix; none where it is stored otherwise.

    name: what files would write for it. shape: (experts, rows, columns). Raises CheckpointError where the files hold
    more experts than the configuration says.
    """
    holder, _, leaf = name.rpartition(".")
    templates = experts.stored.get(leaf)
    if templates is None or not holder.endswith(experts.in_files(experts.module)):
        return []
    rows = shape[1] // len(templates)
    if (more := f"{holder}.{templates[0].format(shape[0])}") in reader:
        raise CheckpointError(f"{reader.info(more).file}: tensor '{more}', and config.json says {shape[0]} experts")
    return [
        Piece(f"{holder}.{template.format(expert)}", (rows, shape[2]), expert, part * rows)
        for expert in range(shape[0])
        for part, template in enumerate(templates)
    ]


def assembled(pieces: list[Piece], shape: tuple[int, ...], load: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The pieces by key, in one memory with the whole, which is under "". load: reads one; a copy at a time is held."""
    first = load(pieces[0].key)
    if pieces[0].expert is None:
        return {pieces[0].key: first, "": first}
    whole = torch.empty(shape, dtype=first.dtype, device=first.device)
    weights = {"": whole}
    for piece in pieces:
        weights[piece.key] = piece.of(whole)
        weights[piece.key].copy_(first if piece is pieces[0] else load(piece.key))
    return weights


def exact_routers(model: nn.Module, experts: Experts) -> None:
    """Give biases that only choose experts the dtype that transformers loads them in, float32 whatever is computed in;
    and have experts computed one after another, in memory that the tokens of one need."""
    model.config._experts_implementation = "eager"  # type: ignore[union-attr]
    for module in model.modules():
        if experts.correction in module._buffers:
            module._buffers[experts.correction] = module.get_buffer(experts.correction).float()
