"""Proof of an exported graph: it must say what its source says, by the code that will serve it.

The graph continues fixed prompts greedily, with its cache. One walk of the source over all finished texts then gives
the logits at every place: the greedy tokens are the source's own exactly where the source's best token is the next
one, so 64 tokens cost one walk, and the model is never whole in memory beside the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from ...errors import NoTokenizer, ParityError
from ...model.decoder import Decoder
from ...model.proof import walk_all
from ...serve.ort import Generator, Graph, Logits, Prompts, greedy, load_runner
from ...store.stock import check_ids
from ...texts import load_tokenizer

GREEDY_TOKENS: Final = 64
PROMPTS: Final = (
    "The capital of France is",
    "Water boils at one hundred degrees and freezes at zero, so between the two it is a",
    "Once upon a time there was a",
)
# Largest difference of logits, relative to the largest logit where that is above one. An fp16 graph rounds each of its
# intermediate values; an int4 one has other weights, is compared with itself, and is measured rather than passed.
TOLERANCE: Final = {"fp32": 1e-4, "fp16": 3e-2}


@dataclass(frozen=True)
class Run:
    """One way of reading the prompts: what it is called, greedy tokens, and logits by prompt, each with its place.

    logits[row]: (places, vocab), of the token after place `first[row]` and on of prompt + tokens.
    """

    name: str
    prompts: Prompts
    tokens: list[list[int]]
    logits: list[Logits]
    first: list[int]

    @property
    def texts(self) -> list[tuple[int, ...]]:
        """Each prompt with the tokens after it that were read again, the last one left out."""
        return [(*prompt, *tokens[:-1]) for prompt, tokens in zip(self.prompts, self.tokens, strict=True)]


def prove(folder: Path, source: Path, precision: str, flavor: str) -> dict[str, Any]:
    """Compare the graph in `folder` with the dense checkpoint `source`; the figures for the manifest.

    Raises ParityError for logits beyond the tolerance or a greedy token that rounding cannot explain.
    """
    decoder = Decoder(source, "float32")
    prompts = [prompt[: decoder.context_length // 2] for prompt in fixed_prompts(source, decoder.vocab_size)]
    count = min(GREEDY_TOKENS, decoder.context_length - max(map(len, prompts)))
    runs = _graph_runs(Graph(folder), prompts, count)
    if flavor == "genai":
        runs.append(_generator_run(folder, prompts, count))
    references = _references(decoder, runs)
    figures = {run.name: _compare(run, references, precision) for run in runs}
    return {
        "runs": figures,
        "max_abs_logit_difference": max(figure["max_abs_logit_difference"] for figure in figures.values()),
        "greedy_tokens": count,
        "prompts": len(prompts),
        "source_dtype": "float32",
        "what": "logits of the graph against the dense checkpoint's, prefill, decode with the cache"
        + (", left-padded batch" if flavor == "portable" else ", batch of equal lengths"),
    }


def fixed_prompts(source: Path, vocab_size: int) -> list[list[int]]:
    """Three prompts of different lengths; without a tokenizer, of token ids from 2 on."""
    try:
        tokenizer = load_tokenizer(source)
    except NoTokenizer:
        return [[token % vocab_size for token in range(2, end)] for end in (7, 19, 10)]
    prompts = [[int(token) for token in tokenizer(prompt)["input_ids"]] for prompt in PROMPTS]
    check_ids(tokenizer, [token for prompt in prompts for token in prompt], vocab_size)
    return prompts


def _graph_runs(graph: Graph, prompts: Prompts, count: int) -> list[Run]:
    """Each prompt alone, then all as a batch: padded where the graph takes padding, else cut to one length."""
    alone = [_run(graph, f"prompt {index + 1}", [prompt], count) for index, prompt in enumerate(prompts)]
    if graph.pads:
        return [*alone, _run(graph, "left-padded batch", prompts, count)]
    length = min(map(len, prompts))
    return [*alone, _run(graph, "batch", [prompt[:length] for prompt in prompts], count)]


def _run(graph: Graph, name: str, prompts: Prompts, count: int) -> Run:
    """Prefill logits of every place of a prompt, and those of every decoded token."""
    read = graph.prefill(prompts)
    tokens = [read[:, -1].argmax(-1)]
    steps: list[Logits] = []
    while len(tokens) < count:
        steps.append(graph.step(tokens[-1].tolist()))
        tokens.append(steps[-1].argmax(-1))
    rows = range(len(prompts))
    decoded = np.stack(steps, axis=1) if steps else read[:, :0]
    logits = [np.concatenate([read[row, -len(prompts[row]) :], decoded[row]]) for row in rows]
    return Run(name, prompts, np.stack(tokens, axis=1).tolist(), logits, [0 for _ in rows])


def _generator_run(folder: Path, prompts: Prompts, count: int) -> Run:
    """As it will be served: the cache in place, logits of the new tokens only."""
    generator = Generator(folder, max(map(len, prompts)) + count)
    tokens, logits = greedy(generator, prompts[:1], count)
    return Run("onnxruntime-genai", prompts[:1], tokens, [np.stack(logits, axis=1)[0]], [len(prompts[0]) - 1])


def _references(decoder: Decoder, runs: Sequence[Run]) -> dict[tuple[int, ...], Logits]:
    """The source's logits (places, vocab) of every text that a run finished, in one walk through the files."""
    texts = sorted({text for run in runs for text in run.texts})
    logits = walk_all(decoder, [torch.tensor([text]) for text in texts])
    return {text: of_text[0].numpy() for text, of_text in zip(texts, logits, strict=True)}


def _compare(run: Run, references: dict[tuple[int, ...], Logits], precision: str) -> dict[str, Any]:
    differences, agreed, ties = [], 0, []
    for prompt, tokens, logits, first, text in zip(
        run.prompts, run.tokens, run.logits, run.first, run.texts, strict=True
    ):
        reference = references[text]
        differences.append(_difference(logits, reference[first:], precision, run.name))
        gaps = _greedy_gaps(tokens, reference[len(prompt) - 1 :])
        agreed += sum(gap == 0 for gap in gaps)
        ties += [gap for gap in gaps if gap > 0]
    worst = max(ties, default=0.0)
    figures = {
        "max_abs_logit_difference": max(differences),
        "greedy_agreed": agreed,
        "greedy_total": sum(map(len, run.tokens)),
        "largest_gap_where_not": worst,
    }
    # Two logits that are each within the difference of the source's may swap places only within twice that.
    if precision in TOLERANCE and worst > 2 * max(differences):
        raise ParityError(f"{run.name}: a greedy token is not the source's, whose best leads by {worst:.3g}: {figures}")
    return figures


def _difference(logits: Logits, reference: Logits, precision: str, name: str) -> float:
    """Largest absolute difference. Raises ParityError above the tolerance, or where it is not finite."""
    difference = float(np.abs(logits - reference).max())
    limit = TOLERANCE.get(precision, np.inf) * max(1.0, float(np.abs(reference).max()))
    if not np.isfinite(difference) or difference > limit:
        raise ParityError(
            f"{name}: the graph's logits differ from the source's by {difference:.3g}; at most {limit:.3g} is allowed"
        )
    return difference


def _greedy_gaps(tokens: Sequence[int], reference: npt.NDArray[np.float32]) -> list[float]:
    """How far the source's best logit leads that of each token; 0 where the token is the best."""
    chosen = reference[np.arange(len(tokens)), list(tokens)]
    return [float(gap) for gap in reference.max(-1) - chosen]


def own_greedy(folder: Path, recorded: dict[str, Any]) -> dict[str, Any]:
    """The recorded greedy prompt as the graph itself continues it, by what will serve it: for rounded weights."""
    prompt, count = recorded["prompt_token_ids"], len(recorded["token_ids"])
    tokens, logits = greedy(load_runner(folder, len(prompt) + count), [prompt], count)
    best = [np.sort(step[0])[-2:] for step in logits]
    return {
        **recorded,
        "token_ids": tokens[0],
        "margins": [round(float(high - low), 4) for low, high in best],
        "dtype": "int4",
        "what": "greedy continuation by the exported graph itself, whose weights are rounded; end-of-text included",
    }
