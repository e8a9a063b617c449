"""A decoder that computes block by block: its linear layers, and its weights on demand.

A `Decoder` is the architecture built from `config.json` alone. Parameters live on the meta device until a module is
materialised from the checkpoint, on the device that computes, and go back there when it is released, so the model is
never whole in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from crepe_deploy.device import CPU
from crepe_deploy.errors import CalibrationError, CheckpointError, ConfigError, UnsupportedModel
from crepe_deploy.nearest import unknown
from crepe_deploy.store.checkpoint import CheckpointReader, TensorInfo

from .ahead import ReadAhead
from .architecture import build_meta, load_config, outline
from .blocks import find_blocks, is_linear
from .calls import BlockSlot
from .families import family_of
from .pieces import Piece, assembled, exact_routers, expert_pieces
from .probe import probe, run, stand_ins
from .ties import ties_of

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROOF_DTYPE = "float64"  # for comparisons: real models' residuals reach 1e4, where float32 keeps three decimals


@dataclass(frozen=True)
class LinearSpec:
    """A linear layer of a block, or one matrix of an expert.

    path: module path inside the block. key: its weight's name in the checkpoint.
    transposed: stored (in, out), as GPT-2's Conv1D does, rather than (out, in).
    expert: whose matrix it is; `path` is then that of the parameter that holds all of them, `first_row` where in its
    expert's rows this one begins. within: the stored tensor that holds it beside others, `key` being no tensor's.
    """

    path: str
    key: str
    out_features: int
    in_features: int
    transposed: bool
    expert: int | None = None
    first_row: int = 0
    within: str = ""

    @property
    def tensor(self) -> str:
        """The stored tensor that it is, or is in."""
        return self.within or self.key

    def of(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Its weight (out, in) among the tensors of its block by checkpoint name; one memory with them."""
        stored = weights[self.within][self.expert] if self.within else weights[self.key]
        return stored.T if self.transposed else stored

    def computed(self, block: nn.Module) -> Tensor:
        """Its weight (out, in) that the block computes with; one memory with it."""
        if self.expert is None:
            held: Tensor = block.get_submodule(self.path).get_parameter("weight").data
        else:
            held = block.get_parameter(self.path).data[self.expert]
        return held.T if self.transposed else held[self.first_row : self.first_row + self.out_features]


@dataclass(frozen=True)
class Head:
    """Everything outside the blocks, in memory: tokens (batch, length), states behind the blocks -> logits.

    Both may be on the host; logits come on the decoder's device, where the weights are.
    weights: what it holds by checkpoint name, in the file's dtype; one memory with the module's, as in `Decoder.block`.
    """

    run: Callable[[Tensor, Tensor], Tensor]
    weights: dict[str, Tensor]

    def __call__(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        return self.run(tokens, hidden)


class Decoder:
    """A causal language model on the meta device, bound to the checkpoint that holds its weights.

    model: the transformers module whose decoder blocks have been replaced by `slots`.
    blocks: the real blocks. linears: per block, what can be pruned. dtype: of computation. device: that it computes
    on. reads: paths of linear layers whose weight the model's code reads beside calling them. experts: whether whoever
    asks knows of layers with experts, which are among no linears; without it a model that has any is refused.
    Raises UnsupportedModel naming what is missing, CheckpointError, ConfigError.
    """

    def __init__(self, root: Path, dtype: str = "auto", device: torch.device = CPU, *, experts: bool = False) -> None:
        self.device = device
        self._ahead = ReadAhead()
        self.reader = CheckpointReader(root)
        self.config = load_config(root)
        self.dtype = self._compute_dtype(dtype)
        self.model = outline(root, self.config, len(self.reader.tensors))
        self.experts = family_of(self.config.model_type).experts if experts else None
        find_blocks(self.model, experts=experts)
        self.ties = ties_of(self.model, self.reader, self._find)
        self.ties.settle(self.model)
        self._check_weights()
        self.model = build_meta(self.config, self.dtype)
        if self.experts is not None:
            exact_routers(self.model, self.experts)
        self.ties.settle(self.model)
        self.blocks_path, blocks = find_blocks(self.model, experts=experts)
        self.blocks: list[nn.Module] = list(blocks)
        probed = probe(self.model, self.blocks_path, self.blocks)
        self.reads = probed.reads
        self.linears = [self._linears(index) for index in range(len(self.blocks))]
        self.slots = [BlockSlot(block, form) for block, form in zip(self.blocks, probed.forms, strict=True)]
        self.model.set_submodule(self.blocks_path, nn.ModuleList(self.slots))
        with stand_ins(self.model, {}, set()):
            run(self.model, type(self.model).__name__)  # with slots for blocks as well
        for module in (self.model, *self.blocks):
            _move_buffers(module, device)

    def _compute_dtype(self, dtype: str) -> torch.dtype:
        check_dtype(dtype)
        if dtype == PROOF_DTYPE:
            return torch.float64
        if dtype != "auto":
            return COMPUTE_DTYPES[dtype]
        largest = max(self.reader, key=lambda info: info.size_bytes, default=None)
        if largest is None or largest.dtype not in COMPUTE_DTYPES.values():
            held = "no tensors" if largest is None else f"{largest.dtype} weights"
            raise UnsupportedModel(f"{self.reader.root} holds {held}; bfloat16, float16 or float32 weights are needed")
        return largest.dtype

    @property
    def context_length(self) -> int:
        """The longest window the model accepts, in tokens."""
        return int(getattr(self.config, "max_position_embeddings", None) or 2048)

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)

    def key(self, name: str) -> str:
        """The checkpoint's name for a parameter of the module tree. Raises CheckpointError, UnsupportedModel."""
        from transformers.conversion_mapping import get_model_conversion_mapping

        found = self._find(self.ties.instead.get(name, name))
        if found is not None:
            return found
        if get_model_conversion_mapping(self.model, add_legacy=False):
            raise UnsupportedModel(
                f"{self.reader.root}: transformers renames tensors of model type '{self.config.model_type}' as it "
                f"loads them, which is not handled ('{name}' is missing)"
            )
        raise CheckpointError(f"{self.reader.root}: tensor '{name}' is missing")

    def pieces(self, name: str, shape: tuple[int, ...]) -> list[Piece]:
        """The stored tensors of a parameter of this shape in the module tree. Raises as `key` does."""
        pieces: list[Piece] = []
        if self.experts is not None and self._find(name) is None:
            pieces = expert_pieces(self.reader, self.experts, self.experts.in_files(name), shape)
        return pieces or [Piece(self.key(name), shape)]

    def _find(self, name: str) -> str | None:
        prefix = f"{self.model.base_model_prefix}."
        renamed = name
        for module, spelled in family_of(self.config.model_type).renamed.items():
            renamed = spelled + renamed.removeprefix(module) if renamed.startswith(module) else renamed
        renamed = renamed if self.experts is None else self.experts.in_files(renamed)
        for candidate in (name, renamed, name.removeprefix(prefix), prefix + name):
            if candidate in self.reader:
                return candidate
        return None

    def _check_weights(self) -> None:
        tied = set(getattr(self.model, "all_tied_weights_keys", {}) or {})
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if name not in tied:
                pieces = self.pieces(name, tuple(parameter.shape))
                for piece in pieces:
                    self._check_stored(self.reader.info(piece.key), piece.shape)
                if len({self.reader.info(piece.key).dtype for piece in pieces}) > 1:
                    raise UnsupportedModel(f"{self.reader.root}: the experts of '{name}' are stored in several dtypes")
        for name, buffer in self.model.named_buffers():
            if self.experts is not None and name.rpartition(".")[2] == self.experts.correction:
                self._check_stored(self.reader.info(name), tuple(buffer.shape))

    def _check_stored(self, info: TensorInfo, shape: tuple[int, ...]) -> None:
        if info.shape != shape:
            raise CheckpointError(
                f"{info.file}: tensor '{info.name}' has shape {info.shape}, and config.json asks for {shape}"
            )
        if info.dtype not in (torch.float64, *COMPUTE_DTYPES.values()):
            kind = str(info.dtype).removeprefix("torch.")
            raise UnsupportedModel(f"{info.file}: tensor '{info.name}' holds {kind}; give the unquantised model")

    def _linears(self, index: int) -> list[LinearSpec]:
        specs = []
        for path, module in self.blocks[index].named_modules():
            if not is_linear(module) or (self.experts is not None and path == self.experts.gate):
                continue
            transposed = not isinstance(module, nn.Linear)
            weight = module.weight
            out_features, in_features = weight.shape[::-1] if transposed else weight.shape
            key = self.key(f"{self.blocks_path}.{index}.{path}.weight")
            specs.append(LinearSpec(path, key, int(out_features), int(in_features), transposed))
        return specs

    def block_keys(self, index: int) -> list[str]:
        """The checkpoint names of every parameter of one block."""
        prefix = f"{self.blocks_path}.{index}."
        named = self.blocks[index].named_parameters()
        return [piece.key for name, of in named for piece in self.pieces(prefix + name, tuple(of.shape))]

    @contextlib.contextmanager
    def block(self, index: int) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
        """Yield a block with its weights in memory, and those weights by checkpoint name in the file's dtype.

        Where the file's dtype is the compute dtype both are one memory: writing to a weight changes the block. While
        another device than the CPU computes, the host reads the next block.
        """
        prefix = f"{self.blocks_path}.{index}."
        with self._materialised(self.blocks[index], prefix) as weights:
            if self.device != CPU and index + 1 < len(self.blocks):  # the CPU reads no faster for being busy
                self._ahead.start(self.block_keys(index + 1), self.reader.load_finite)
            yield self.blocks[index], weights

    def _loaded(self, key: str) -> Tensor:
        return self._ahead.get(key, self.reader.load_finite).to(self.device)

    @contextlib.contextmanager
    def _materialised(self, module: nn.Module, prefix: str) -> Iterator[dict[str, Tensor]]:
        weights: dict[str, Tensor] = {}
        meta: dict[str, nn.Parameter] = dict(module.named_parameters())
        try:
            for name, parameter in meta.items():
                pieces = self.pieces(prefix + name, tuple(parameter.shape))
                weights |= assembled(pieces, tuple(parameter.shape), self._loaded)
                _assign(module, name, weights.pop("").to(self.dtype))
            for name, buffer in module.named_buffers():
                if prefix + name in self.reader:
                    buffer.copy_(self.reader.load_finite(prefix + name))
            yield weights
        finally:
            for name, parameter in meta.items():
                _replace(module, name, parameter)

    @contextlib.contextmanager
    def embedder(self) -> Iterator[Callable[[Tensor], list[BlockSlot]]]:
        """Yield a function that runs everything before the blocks: token ids (batch, length) -> the called slots."""
        base = self.model.base_model
        prefix = next((f"{name}." for name, module in self.model.named_modules() if module is base and name), "")
        with self._materialised(base, prefix), torch.inference_mode():

            def embed(tokens: Tensor) -> list[BlockSlot]:
                try:
                    base(input_ids=tokens.to(self.device), use_cache=False)
                except torch.OutOfMemoryError:
                    raise
                except (IndexError, RuntimeError) as error:
                    raise CalibrationError(
                        f"model type '{self.config.model_type}' cannot embed {tokens.shape[1]} tokens with ids up to "
                        f"{int(tokens.max())} ({error}): give shorter windows, or the model's own tokenizer"
                    ) from error
                return self.slots

            yield embed

    def logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Run everything after the blocks: tokens (batch, length), hidden (batch, length, width) -> fp32 logits."""
        with self.head() as run:
            return run(tokens, hidden).float()

    @contextlib.contextmanager
    def head(self) -> Iterator[Head]:
        """Yield what `logits` runs, loaded once for many calls; its logits are in the dtype of computation."""
        tied = getattr(self.model, "all_tied_weights_keys", {}) or {}
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._tied_released(tied))
            weights = stack.enter_context(self._materialised(self.model, ""))
            for name, source in tied.items():
                _assign(self.model, name, self.model.get_parameter(source).data)

            def run(tokens: Tensor, hidden: Tensor) -> Tensor:
                self.slots[-1].replacement = hidden.to(self.device)
                try:
                    with torch.inference_mode():
                        logits: Tensor = self.model(input_ids=tokens.to(self.device), use_cache=False).logits
                finally:
                    self.slots[-1].replacement = None
                return logits

            yield Head(run, weights)

    @contextlib.contextmanager
    def _tied_released(self, tied: dict[str, str]) -> Iterator[None]:
        """Untie `tied` parameters while they are filled by hand, so that none is looked for in the checkpoint."""
        before = {name: self.model.get_parameter(name) for name in tied}
        for name in tied:
            module, _, leaf = name.rpartition(".")
            self.model.get_submodule(module)._parameters[leaf] = None
        try:
            yield
        finally:
            for name, parameter in before.items():
                _replace(self.model, name, parameter)


def follow(parameter: Tensor, stored: Tensor) -> None:
    """Bring a block's own copy of a tensor up to date where it is one, in the dtype of computation."""
    if parameter.data_ptr() != stored.data_ptr():
        parameter.data.copy_(stored)


def refuse_experts(root: Path) -> None:
    """For whoever does not handle them: raise UnsupportedModel naming the experts of the model in a folder, if any."""
    if family_of(load_config(root).model_type).experts is not None:
        Decoder(root)


def check_dtype(dtype: str) -> None:
    """Raise ConfigError unless this names a dtype to compute in."""
    if dtype not in ("auto", PROOF_DTYPE, *COMPUTE_DTYPES):
        raise ConfigError(unknown("dtype", dtype, ["auto", *COMPUTE_DTYPES]))


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = buffer.to(device)


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    _replace(module, name, nn.Parameter(tensor, requires_grad=False))


def _replace(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner)._parameters[leaf] = parameter
