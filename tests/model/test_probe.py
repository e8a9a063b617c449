"""What a model does with its blocks is seen before any weight is read, and what cannot be walked is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from crepe_deploy.exporting.pipeline import export_checkpoint
from torch import Tensor, nn

from crepe_deploy.errors import CalibrationError, UnsupportedModel
from crepe_deploy.model.blocks import find_blocks
from crepe_deploy.model.calibrate import embed
from crepe_deploy.model.calls import Form
from crepe_deploy.model.decoder import Decoder
from crepe_deploy.model.probe import Probed, probe
from crepe_deploy.pattern import NM
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.pruning.prune import prune
from crepe_deploy.store.sources import resolve_model
from tests.model import toy, zoo
from tests.pico import make_pico, make_pico_llama, pico_tokenizer

WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Any:
        return hidden + self.down(self.up(hidden))


class Model(nn.Module):
    """Three blocks; `between` is what is done to the hidden states on their way from one to the next."""

    block: type[nn.Module] = Block

    def __init__(self) -> None:
        super().__init__()
        self.words, self.readout = nn.Embedding(4, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(self.block() for _ in range(3))

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden: Tensor = self.words(input_ids)
        notes: dict[str, Tensor] = {}
        for block in self.blocks:
            returned = block(hidden, notes)
            hidden = self.between(returned if isinstance(returned, Tensor) else returned[0])
        return self.readout(hidden)

    def between(self, hidden: Tensor) -> Tensor:
        return hidden


def probed(model: nn.Module) -> Probed:
    path, blocks = find_blocks(model)
    return probe(model, path, list(blocks))


def with_block(forward: Any) -> Model:
    block = type("Other", (Block,), {"forward": forward})
    return type("Other", (Model,), {"block": block})()  # type: ignore[no-any-return]


def test_it_costs_nothing_and_changes_nothing() -> None:
    with torch.device("meta"):
        model = Model()
    before = dict(model.named_modules()), dict(model.named_parameters())
    assert probed(model) == Probed([Form()] * 3, frozenset())
    assert (dict(model.named_modules()), dict(model.named_parameters())) == before


def test_tuples_and_names_are_learnt() -> None:
    model = with_block(lambda self, hidden, notes: (Block.forward(self, hidden), None))
    assert probed(model).forms == [Form(0, 2)] * 3


def test_a_weight_that_is_read_beside_a_call_is_noticed() -> None:
    model = with_block(lambda self, hidden, notes: Block.forward(self, hidden.to(self.up.weight.dtype)))
    assert probed(model).reads == {f"blocks.{index}.up" for index in range(3)}


def twice(self: Model, input_ids: Tensor, use_cache: bool) -> Tensor:
    hidden = self.words(input_ids)
    for block in (*self.blocks, *self.blocks):
        hidden = block(hidden)
    return hidden


def reads_notes(self: Block, hidden: Tensor, notes: dict[str, Tensor]) -> Tensor:
    notes["first"] = notes.get("first", hidden)
    return Block.forward(self, hidden)


def replaces(self: Block, hidden: Tensor, notes: Any) -> Tensor:
    self.up = nn.Linear(WIDTH, 16)
    return hidden + self.down(hidden.repeat(1, 1, 2))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (type("Twice", (Model,), {"forward": twice})(), "not called once each in their order, but: 0, 1, 2, 0"),
        (type("Scaled", (Model,), {"between": lambda self, hidden: hidden * 2})(), "blocks.1' does not read what"),
        (with_block(reads_notes), "blocks.1' reads what an earlier block wrote down"),
        (with_block(lambda self, hidden, notes: hidden + self.down(self.up(hidden) + self.up(hidden))), "called 2 ti"),
        (with_block(lambda self, hidden, notes: hidden), "blocks.0.up' is not called"),
        (with_block(lambda self, hidden, notes: Block.forward(self, hidden)[0]), "sequence of vectors"),
        (with_block(lambda self, hidden, images: images["pixels"]), "cannot be run on token ids alone.*'pixels'"),
        (with_block(replaces), "replaces modules of its own"),
    ],
)  # fmt: skip
def test_what_cannot_be_walked_is_refused_by_name(model: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        probed(model)


def test_blocks_that_share_parameters_are_refused() -> None:
    model = Model()
    model.blocks[2].get_submodule("up").weight = model.blocks[0].get_submodule("up").weight
    with pytest.raises(UnsupportedModel, match=r"blocks\.0\.up\.weight' and 'blocks\.2\.up\.weight' are one parameter"):
        probed(model)


def test_keys_and_values_that_layers_share_are_refused(tmp_path: Path) -> None:
    config = {
        key: value for key, value in zoo.tiny_config("gemma4_text").to_dict().items() if key != "per_layer_config"
    }
    config |= {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
    made = make_pico(tmp_path / "m", tf.AutoConfig.for_model(**{**config, "num_hidden_layers": 4}))
    with pytest.raises(UnsupportedModel, match=r"layers\.2' reads what an earlier block wrote down"):
        Decoder(made)


def test_more_tokens_than_positions_are_an_answer(tmp_path: Path) -> None:
    decoder = Decoder(make_pico(tmp_path / "m", zoo.tiny_config("roberta")))
    with pytest.raises(CalibrationError, match="cannot embed 128 tokens"):
        embed(decoder, [torch.full((1, 128), 5)])


def test_calls_of_batches_keep_their_own_contents(tmp_path: Path) -> None:
    decoder = Decoder(make_pico_llama(tmp_path / "m"))
    (stream,) = embed(decoder, [torch.randint(3, 300, (4, 1024))])
    first, second = (calls[0].kwargs["position_embeddings"] for calls in stream.calls)
    assert first[0] is second[0]  # equal, so held once


def test_what_reads_weights_is_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.register()
    forward = toy.Digest.forward
    monkeypatch.setattr(toy.Digest, "forward", lambda self, hidden: forward(self, hidden.to(self.narrow.weight.dtype)))
    tf.AutoModelForCausalLM.from_config(toy.ToyConfig()).save_pretrained(tmp_path / "m")
    pico_tokenizer().save_pretrained(tmp_path / "m")
    prune(resolve_model(str(tmp_path / "m")), tmp_path / "pruned", prune_config("magnitude", NM(2, 4)), None)
    with pytest.raises(UnsupportedModel, match=r"reads 'trunk\.stages\.0\.digest\.narrow\.weight' beside calling"):
        export_checkpoint(tmp_path / "pruned", tmp_path / "packed", "packed")
    assert not (tmp_path / "packed").exists()
