"""Random models sliced to random plans, and ways to load them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from crepe_deploy.exporting.structural import assemble
from transformers import AutoModelForCausalLM

from crepe_deploy.model.decoder import Decoder
from crepe_deploy.store.sources import resolve_model
from crepe_deploy.structural.plan import Geometry, LayerPlan
from tests.structural.random_plans import Kept, make_model, masked_model_logits, random_plans

TOKENS = torch.arange(2, 42).view(2, 20)
EVEN: tuple[Kept, ...] = ((2, 2, 32),) * 3


def plans_for(model: Path, kept: tuple[Kept, ...], seed: int = 0) -> list[LayerPlan]:
    return random_plans(Geometry.from_config(Decoder(model).config), kept, seed)


def assembled(folder: Path, family: str, kept: tuple[Kept, ...], widths: Any, **options: Any) -> tuple[Path, Any]:
    """A random model, sliced: the folder and the masked model's logits."""
    overrides = options.pop("overrides", {})
    model = make_model(folder / "model", family, **overrides)
    plans = plans_for(model, kept)
    assemble(resolve_model(str(model)), plans, folder / "out", widths=widths, **options)
    return folder / "out", masked_model_logits(model, plans, TOKENS)


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(TOKENS).logits
    return found


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))


LOAD = """
import json, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
folder, options = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
with torch.inference_mode():
    torch.save(model(torch.arange(2, 42).view(2, 20)).logits, sys.argv[3])
assert not any(name.startswith("crepe_deploy") for name in sys.modules)
"""


def plain(folder: Path, code: str = LOAD, **options: Any) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Run `code` where crepe_deploy is never imported; the file that it writes logits to."""
    target = folder.parent / "logits.pt"
    environment = os.environ | {"HF_MODULES_CACHE": str(folder.parent / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", code, str(folder), json.dumps(options), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3600, check=False)
    return done, target
