"""What healing lowers: the divergence of a model's next-token distributions from the dense model's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CACHED_ROWS, _ROWS = 16, 1024  # in float32 at a time: what a CPU's cache holds, and what a GPU is busy with
_LEAST = 1e-30


def divergence(dense: Tensor, logits: Tensor, top_k: int | None = None) -> Tensor:
    """KL(dense || model) in nats of every row, fp32 (n,), of two sets of logits (n, vocabulary); never far below 0.

    top_k: tell only the dense model's k likeliest tokens apart, and take all others for one more token. Differentiable
    in `logits` alone; the gradient is computed with the value, in the dtype of `logits`, a few rows at a time, so that
    no fp32 copy of either is ever whole.
    """
    rows: Tensor = _Divergence.apply(dense, logits, top_k)  # type: ignore[no-untyped-call]
    return rows


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dense: Tensor, logits: Tensor, top_k: int | None) -> Tensor:
        wanted = ctx.needs_input_grad[1]
        gradient = torch.empty_like(logits) if wanted else None
        values = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        piece = _CACHED_ROWS if logits.device.type == "cpu" else _ROWS
        for first in range(0, len(logits), piece):
            rows = slice(first, first + piece)
            aim = dense[rows].float().log_softmax(-1)
            model = logits[rows].float().log_softmax(-1)
            values[rows], slope = _whole(aim, model) if top_k is None else _likeliest(aim, model, top_k)
            if gradient is not None:
                gradient[rows] = slope
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> tuple[None, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return None, gradient * outer[0].to(gradient.dtype)[:, None], None


def _whole(aim: Tensor, model: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence of rows of log-probabilities, and its derivative by the model's logits."""
    likely = aim.exp()
    return (likely * (aim - model)).sum(-1), model.exp() - likely


def _likeliest(aim: Tensor, model: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """As `_whole`, of the `top_k` likeliest tokens and the rest in one."""
    top, places = aim.topk(min(top_k, aim.shape[-1]), dim=-1)
    ours = model.gather(-1, places)
    likely, probable = top.exp(), model.exp()
    rest = aim.exp().scatter(-1, places, 0).sum(-1, keepdim=True).clamp_min(_LEAST)
    ours_rest = probable.scatter(-1, places, 0).sum(-1, keepdim=True).clamp_min(_LEAST)
    values = (likely * (top - ours)).sum(-1) + (rest * (rest.log() - ours_rest.log())).squeeze(-1)
    return values, (probable * (1 - rest / ours_rest)).scatter(-1, places, ours.exp() - likely)
