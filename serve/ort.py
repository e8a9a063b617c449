"""Running an exported ONNX folder: `Graph` in ONNX Runtime, either flavour; `Generator` in onnxruntime-genai.

Both continue a batch of prompts: `start(prompts)` reads them, `step(tokens)` adds one token to each.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError, ConfigError, ServeError
from ..extras import require
from ..store.reading import read_object

GRAPH_NAME: Final = "model.onnx"
GENAI_CONFIG: Final = "genai_config.json"

Logits = npt.NDArray[np.float32]
Prompts = Sequence[Sequence[int]]


class Runner(Protocol):
    """What continues prompts."""

    def start(self, prompts: Prompts) -> Logits:
        """Forget everything, read the prompts; logits (batch, vocab) of the token after each."""

    def step(self, tokens: Sequence[int]) -> Logits:
        """Add one token to every prompt; logits (batch, vocab) of the next."""


def is_onnx(folder: Path) -> bool:
    """Whether the folder holds an exported graph."""
    return (folder / GRAPH_NAME).is_file()


def flavor_of(folder: Path) -> str:
    """ "genai" where onnxruntime-genai's configuration lies beside the graph, else "portable"."""
    return "genai" if (folder / GENAI_CONFIG).is_file() else "portable"


def require_onnx(flavor: str, purpose: str) -> None:
    """Raise MissingExtra unless the libraries that run this flavour are installed."""
    require(purpose, "onnxruntime", *(["onnxruntime_genai"] if flavor == "genai" else []))


def load_runner(folder: Path, max_tokens: int, threads: int = 0) -> Runner:
    """What serves this folder best: genai folders through onnxruntime-genai, others through ONNX Runtime.

    max_tokens: of the longest sequence. threads: 0 for the library's own choice. Raises MissingExtra, CheckpointError.
    """
    flavor = flavor_of(folder)
    require_onnx(flavor, "running an ONNX folder")
    if flavor == "genai":
        return Generator(folder, max_tokens, threads)
    return Graph(folder, threads)


def session_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises for a graph that it cannot load or run; its errors share no class of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented", "RuntimeException",
             "InvalidArgument", "EPFail")  # fmt: skip
    return (*(getattr(state, name) for name in names), RuntimeError)


class Graph:
    """A decoder graph in ONNX Runtime on the CPU. The key-value cache stays in the runtime between steps.

    Raises CheckpointError for a graph that is no such decoder or that the runtime refuses.
    """

    def __init__(self, folder: Path, threads: int = 0) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self.session = ort.InferenceSession(folder / GRAPH_NAME, options, providers=["CPUExecutionProvider"])
        except session_errors() as error:
            raise CheckpointError(f"ONNX Runtime cannot load {folder / GRAPH_NAME}: {error}") from error
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.caches = [name for name in self.inputs if name.startswith("past_key_values.")]
        if not self.caches or "input_ids" not in self.inputs or self.outputs[0] != "logits":
            raise CheckpointError(f"{folder / GRAPH_NAME} is no decoder with a key-value cache: {list(self.inputs)}")
        self.pads = "position_ids" in self.inputs  # without them attention takes each row to start at its first column
        genai = folder / GENAI_CONFIG
        self.head_size = int(read_object(genai)["model"]["decoder"]["head_size"]) if genai.is_file() else 0
        self.mask = np.zeros((0, 0), np.int64)
        self.past: dict[str, Any] = {}

    def prefill(self, prompts: Prompts) -> Logits:
        """Forget everything, read the prompts; logits (batch, longest, vocab). Shorter ones are padded on the left.

        Raises ConfigError for prompts of different lengths where the graph cannot tell padding from text.
        """
        longest = max(map(len, prompts))
        if not self.pads and any(len(prompt) != longest for prompt in prompts):
            raise ConfigError("this graph takes prompts of one length: its attention gives padded rows wrong answers")
        ids = np.zeros((len(prompts), longest), np.int64)
        self.mask = np.zeros((len(prompts), longest), np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = prompt
            self.mask[row, longest - len(prompt) :] = 1
        self.past = {name: self._empty(name, len(prompts)) for name in self.caches}
        return self._run(ids)

    def start(self, prompts: Prompts) -> Logits:
        """Forget everything, read the prompts; logits (batch, vocab) of the token after each."""
        return self.prefill(prompts)[:, -1]

    def step(self, tokens: Sequence[int]) -> Logits:
        """Add one token to every prompt; logits (batch, vocab) of the next."""
        ids = np.asarray(tokens, np.int64)[:, None]
        self.mask = np.concatenate([self.mask, np.ones_like(ids)], axis=1)
        return self._run(ids)[:, -1]

    def _empty(self, name: str, batch: int) -> Any:
        import onnxruntime as ort

        _, heads, _, width = self.inputs[name].shape
        shape = (batch, int(heads), 0, int(width if isinstance(width, int) else self.head_size))  # genai leaves it open
        half = self.inputs[name].type == "tensor(float16)"
        return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float16) if half else np.zeros(shape, np.float32))

    def _run(self, ids: npt.NDArray[np.int64]) -> Logits:
        import onnxruntime as ort

        places = np.maximum(self.mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        arrays = {"input_ids": ids, "attention_mask": self.mask, "position_ids": np.ascontiguousarray(places)}
        feed = {name: ort.OrtValue.ortvalue_from_numpy(arrays[name]) for name in arrays if name in self.inputs}
        results = self.session.run_with_ort_values(self.outputs, feed | self.past)
        self.past = {name.replace("present", "past_key_values"): value for name, value in
                     zip(self.outputs[1:], results[1:], strict=True)}  # fmt: skip
        return np.asarray(results[0].numpy(), np.float32)


class Generator:
    """A genai folder in onnxruntime-genai, which keeps the cache in place.

    It lets tokens be chosen from outside for a single prompt only: a batch goes through a `Graph`, loaded when the
    first one comes.
    """

    def __init__(self, folder: Path, max_tokens: int, threads: int = 0) -> None:
        import onnxruntime_genai as og

        self.folder, self.threads = folder, threads
        context = int(read_object(folder / GENAI_CONFIG)["model"]["context_length"])
        self.max_tokens = min(max_tokens, context)
        session = {"intra_op_num_threads": threads} if threads else {}
        try:
            config = og.Config(str(folder))
            config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
            self.model = og.Model(config)
        except RuntimeError as error:
            raise CheckpointError(f"onnxruntime-genai cannot load {folder}: {error}") from error
        self.generator: Any = None
        self.graph: Graph | None = None
        self.batch = 0

    def start(self, prompts: Prompts) -> Logits:
        """Forget everything, read the prompts; logits (batch, vocab). Raises ConfigError unless of one length."""
        import onnxruntime_genai as og

        self.batch = len(prompts)
        if self.batch > 1:
            self.graph = self.graph or Graph(self.folder, self.threads)
            return self.graph.start(prompts)
        try:
            params = og.GeneratorParams(self.model)
            params.set_search_options(max_length=self.max_tokens, batch_size=1, do_sample=False)
            self.generator = og.Generator(self.model, params)
        except RuntimeError as error:
            raise CheckpointError(f"onnxruntime-genai cannot run {self.folder}: {error}") from error
        return self._append(prompts[0])

    def step(self, tokens: Sequence[int]) -> Logits:
        """Add one token to every prompt; logits (batch, vocab) of the next."""
        if self.graph is not None and self.batch > 1:
            return self.graph.step(tokens)
        return self._append(tokens)

    def _append(self, tokens: Sequence[int]) -> Logits:
        try:
            self.generator.append_tokens(np.asarray(tokens, np.int32))
        except RuntimeError as error:
            raise ServeError(f"onnxruntime-genai: {error}") from error
        return np.asarray(self.generator.get_logits()[:, -1], np.float32)


def greedy(runner: Runner, prompts: Prompts, count: int) -> tuple[list[list[int]], list[Logits]]:
    """`count` greedy tokens after each prompt, and the logits (batch, vocab) each was taken from."""
    logits = [runner.start(prompts)]
    while len(logits) < count:
        logits.append(runner.step(logits[-1].argmax(-1).tolist()))
    tokens = np.stack([step.argmax(-1) for step in logits], axis=1)
    return tokens.tolist(), logits
