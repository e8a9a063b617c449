"""What every causal class of transformers comes to, step by step, on a tiny random model of it."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch
import transformers
from crepe_deploy.exporting.pipeline import export_checkpoint
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from crepe_deploy.api.inspect import inspect
from crepe_deploy.errors import CrepeError
from crepe_deploy.model import calibrate
from crepe_deploy.model.calibrate import Collector, embed
from crepe_deploy.model.decoder import Decoder
from crepe_deploy.model.families import known
from crepe_deploy.model.paired import Pair
from crepe_deploy.model.proof import walk_logits
from crepe_deploy.pattern import NM
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.pruning.prune import prune
from crepe_deploy.quality.perplexity import evaluate
from crepe_deploy.store.manifest import verify
from crepe_deploy.store.sources import resolve_model
from crepe_deploy.texts import CalibrationSet
from tests.model import zoo

TOKENS: Final = torch.randint(3, zoo.VOCAB, (3, 16), generator=torch.Generator().manual_seed(0))
PATTERN: Final = NM(2, 4)


def stock(folder: Path) -> Any:
    """The folder as transformers has it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    return model(input_ids=tokens, use_cache=False).logits.float()


def load(folder: Path, _work: Path) -> None:
    """Before any work: the architecture is taken or refused."""
    Decoder(folder)


def walk(folder: Path, _work: Path) -> None:
    """Block by block, the logits are transformers'."""
    walked = walk_logits(Decoder(folder), TOKENS)
    _same(walked, logits(stock(folder)))


def statistics(folder: Path, _work: Path) -> None:
    """What the dense feed collects, and what both feeds do before anything is pruned, hooks on the whole model see."""
    decoder, model = Decoder(folder), stock(folder)
    paths = {
        spec.key: f"{decoder.blocks_path}.{i}.{spec.path}" for i, specs in enumerate(decoder.linears) for spec in specs
    }
    seen = hooked(model, list(paths.values()))
    (stream,) = embed(decoder, [TOKENS])
    pair = Pair.start(stream.twin(), decoder.config)
    for index, specs in enumerate(decoder.linears):
        collector = Collector(frozenset({"hessian", "col_norm"}))
        with decoder.block(index) as (block, _):
            with collector.watching(block, specs):
                stream.run(block, index, advance=True)
            weighted = {entry.path for entry in pair.residuals if entry.norm}
            for group in pair.groups(block, index, specs, [spec for spec in specs if spec.path not in weighted]):
                paired = pair.stats(block, block, index, group).hessian
                for spec in group:
                    for gram in (collector.stats(spec, len(TOKENS)).hessian, paired):
                        assert gram is not None
                        _same(gram * len(TOKENS) / 2, seen[paths[spec.key]], spec.key)
            pair.advance(block, block, index)


def _same(one: Tensor, two: Tensor, what: str = "") -> None:
    scale = max(1.0, float(two.abs().max()))
    torch.testing.assert_close(one / scale, two / scale, atol=1e-4, rtol=1e-4, msg=lambda text: f"{what}: {text}")


def hooked(model: nn.Module, paths: list[str]) -> dict[str, Tensor]:
    """X^T X of the inputs of these layers in a forward pass of the whole model."""
    grams: dict[str, Tensor] = {}

    def hook(path: str) -> Callable[..., None]:
        def add(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].flatten(0, -2).float()
            grams[path] = grams.get(path, torch.zeros(rows.shape[1], rows.shape[1])) + rows.T @ rows

        return add

    for path in paths:
        model.get_submodule(path).register_forward_pre_hook(hook(path))
    logits(model)
    return grams


def pruned(method: str, **config: Any) -> Callable[[Path, Path], None]:
    """Prune, and reload what was written."""

    def step(folder: Path, work: Path) -> None:
        tokens = CalibrationSet(TOKENS, "random", "", "text", 0, TOKENS.numel(), "random", "none")
        out = work / "-".join([method, *map(str, config.values())])
        prune(resolve_model(str(folder)), out, prune_config(method, PATTERN, **config), tokens)
        verify(out)
        _same(walk_logits(Decoder(out), TOKENS), logits(stock(out)))

    return step


def packed(_folder: Path, work: Path) -> None:
    """Packed, the pruned model computes in transformers what it computes dense."""
    export_checkpoint(work / "magnitude", work / "packed", "packed")
    inspect(work / "packed")
    verify(work / "packed")
    _same(logits(stock(work / "packed")), logits(stock(work / "magnitude")))


def int8(_folder: Path, work: Path) -> None:
    export_checkpoint(work / "magnitude", work / "int8", "int8")
    verify(work / "int8")


def measured(folder: Path, work: Path) -> None:
    text = work / "text.txt"
    text.write_text("the state of the city and the world " * 20, encoding="utf-8")
    evaluate(folder, text, window=16, max_tokens=64)


def inspected(_folder: Path, work: Path) -> None:
    inspect(work / "magnitude")


STEPS: Final[dict[str, Callable[[Path, Path], None]]] = {
    "load": load,
    "walk": walk,
    "statistics": statistics,
    "magnitude": pruned("magnitude"),
    "wanda dense": pruned("wanda", feed="dense"),
    "wanda pruned": pruned("wanda", feed="pruned"),
    "wanda both": pruned("wanda", reconstruct="exact", feed="both"),
    "sparsegpt": pruned("sparsegpt"),
    "fold": pruned("wanda", permute="fold"),
    "packed": packed,
    "int8": int8,
    "eval": measured,
    "inspect": inspected,
}


ANSWERS: Final = ("load", "fold", "packed", "int8")  # what may be refused: all of it, or a step by itself


def outcome(step: str, folder: Path, work: Path) -> str:
    """Nothing, or why not: "refused: ..." by name, or "FAILS: ..."."""
    try:
        with mock.patch.object(calibrate, "BATCH_TOKENS", TOKENS.shape[1]):  # several micro-batches
            STEPS[step](folder, work)
    except CrepeError as error:
        return f"refused: {error}".replace(f"{folder}/", "").replace(f"{folder}", "the folder").replace(f"{work}/", "")
    except Exception as error:  # noqa: BLE001 - any other is what the sweep looks for
        return f"FAILS: {type(error).__name__}: {error}"
    return ""


def sweep(model_type: str, work: Path, steps: tuple[str, ...] = tuple(STEPS)) -> dict[str, str]:
    """Every step's outcome; after a refused first step no other is tried."""
    folder = zoo.make(work / "model", model_type)
    outcomes: dict[str, str] = {}
    for step in steps:
        outcomes[step] = outcome(step, folder, work)
        if step == steps[0] and outcomes[step]:
            break
    shutil.rmtree(work)
    return outcomes


def check(outcomes: dict[str, str]) -> None:
    """Raise AssertionError unless all works, or is refused where that is an answer."""
    for step, said in outcomes.items():
        assert not said or (said.startswith("refused: ") and step in ANSWERS), (step, said)


def row(model_type: str, outcomes: dict[str, str]) -> str:
    """One line of the docs: what works, or why nothing does."""
    check(outcomes)
    first = next(iter(outcomes.values()))
    if first:
        reason = " ".join(first.removeprefix("refused: ").split()).partition("; ")[0].partition(" (experts")[0]
        return f"| `{model_type}` | {reason.replace('|', '/')} |"
    cells = ("yes" if not outcomes[step] else "-" for step in ("fold", "packed", "int8"))
    return f"| `{model_type}` | yes | {' | '.join(cells)} |"


def page(swept: dict[str, dict[str, str]]) -> str:
    """The docs' page of all outcomes."""
    rows = {name: row(name, outcomes) for name, outcomes in swept.items()}
    walked = [line for name, line in rows.items() if not swept[name]["load"]]
    refused = [line for name, line in rows.items() if swept[name]["load"]]
    return HEAD.format(
        version=transformers.__version__, all=len(rows), works=len(walked), refused=len(refused),
        walked="\n".join(walked), refusals="\n".join(refused), experts=known("experts"),
    )  # fmt: skip


HEAD: Final = """# Every causal class of transformers, tried

Each of the {all} model types of transformers {version} that have a causal language model, made tiny (2 layers, or as
many as show every kind of layer, hidden size 64, random weights, float32), goes through every step. {works} work and
{refused} are refused by name, before anything is computed or written. Nothing is said of quality: the models know
nothing. For the eleven families whose steps are known by name see [methods.md](methods.md).

The page is written by `python -m tests.model.sweep docs/architectures.md` (three minutes), and the tests compare every
row with what happens: a share on each run, all steps with `pytest -m faults tests/model/test_architectures.py`.

How a block is called and what it returns is learnt from the model's own forward pass, run once over two tokens with
stand-ins for all weights. Refused is what walking block by block would get wrong: blocks that are not called once each
in their order, that read more of one another than hidden states, that share parameters, that hold experts,
convolutions or layers which text alone does not reach (cross-attention), modules that the model replaces while it runs.
A configuration decides, not a type: Gemma 4 that shares keys and values between layers is refused, one that does not
works; BigBird works with `"attention_type": "original_full"`.

Mixtures of experts of the types {experts} are refused by these steps and handled by others: [experts.md](experts.md).

## What works

prune: the logits of the walk are transformers'; what `--feed dense` and `both` collect is what hooks on the whole model
see, in several batches; magnitude, Wanda with each feed and SparseGPT prune, and transformers reads what they wrote.
fold: `--permute fold`. packed: `--format packed` computes in transformers what its source does. int8: `--format int8`
passes its own proof. `-`: refused by name.

| model type | prune | fold | packed | int8 |
|---|---|---|---|---|
{walked}

## What is refused

| model type | why |
|---|---|
{refusals}
"""

if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    found = {}
    for each in zoo.TYPES:
        with tempfile.TemporaryDirectory() as place:
            found[each] = sweep(each, Path(place) / "work")
        print(each, {step: said for step, said in found[each].items() if said}, flush=True)
    Path(sys.argv[1]).write_text(page(found), encoding="utf-8")
