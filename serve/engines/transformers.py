"""transformers' `generate` with its usual key-value cache, on the GPU where there is one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from .base import Prompts, Settings, check_lengths, check_options, held_bytes, plan_names


class TransformersEngine:
    """One batch after the other; the time of a token is taken when `generate` asks whether to stop after it."""

    @classmethod
    def require(cls, options: dict[str, Any]) -> None:
        """Raise ConfigError for any option: there are none."""
        check_options("transformers", options, ())

    def __init__(self, folder: Path, settings: Settings) -> None:
        import torch

        from ...model.architecture import whole_model
        from ...packed.linear import PackedLinear

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = whole_model(folder, dtype=settings.dtype)
        self.model = model.to(self.device)
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        for module in self.model.modules():
            if isinstance(module, PackedLinear) and module.on_device is None:  # a GPU chooses for each call
                module.tune()

    def generate(self, prompts: Prompts, tokens: int) -> list[float]:
        """Continue equally long prompts in one batch."""
        import torch

        times: list[float] = []

        def note(_ids: Any, _scores: Any, **_rest: Any) -> Any:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())
            return going_on

        ids = torch.tensor([list(prompt) for prompt in prompts], device=self.device)
        going_on = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        with torch.inference_mode():
            sequences = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, use_cache=True,
                stopping_criteria=[note],
            )  # fmt: skip
        check_lengths([sequences.shape[1] - ids.shape[1], len(times)], tokens)
        return times

    def describe(self) -> dict[str, Any]:
        """Bytes and kernels of the linear layers in the decoder blocks (`lm_head` is none of them)."""
        from torch import nn

        from ...packed.coded_linear import CodedLinear
        from ...packed.linear import PackedLinear

        sizes, kernels = [], {}
        for name, module in self.model.named_modules():
            if isinstance(module, PackedLinear) and module.on_device is None:  # a GPU chooses for each call
                kernels[f"{module.out_features}x{module.in_features}"] = plan_names(module.kernel_plan.tolist())
            if isinstance(module, PackedLinear | CodedLinear) or (isinstance(module, nn.Linear) and "layers." in name):
                sizes.append(held_bytes(module))
        dtype = str(self.model.dtype).removeprefix("torch.")
        return {"dtype": dtype, "linear_bytes": sum(sizes), "linears": len(sizes), "kernels": kernels}

    def close(self) -> None:
        """Let the model go."""
        del self.model
