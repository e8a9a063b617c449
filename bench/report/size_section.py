"""Size: memory, the room it leaves for the KV cache, and the layers block by block."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from ..run.result import Layer
from .bars import Stack, block_bars, by_block, memory_stack
from .charts import Words
from .compare import Entry
from .content import Cell, Figure, Section, Table, cell, fraction, quantity, without_empty_columns
from .numbers import MISSING, count
from .scene import Scene


def memory(scene: Scene) -> Section:
    """Weights, KV cache at the stated context and the rest of the peak; and how many more tokens the cache can hold."""
    stacks = [_stack(entry, scene.context) for entry in scene.comparison.entries]
    context = f"KV cache for {count(scene.context)} tokens"
    kind = "allocated on the GPU" if scene.run.environment.host.gpu else "resident"
    words = Words(
        scene.name("memory"), "Memory: lower is better", "memory ({unit})", "",
        f"{context}, peak {kind}; {scene.machine}", scene.name("memory-table"),
    )  # fmt: skip
    figure = memory_stack(stacks, words)
    table = Table(
        scene.name("memory-table"),
        "Memory of each candidate (lower is better), and the KV-cache tokens that its smaller weights make room for",
        (
            "Candidate", "Weight files", "Linear layers in memory", "After loading", "Peak", "KV cache per token",
            f"KV cache for {count(scene.context)} tokens", "Rest of the peak", "Room gained, tokens (higher is better)",
            "Load time (lower is better)",
        ),
        tuple(_memory_row(stack, scene) for stack in stacks),
        f"{context}, peak {kind}; {scene.machine}",
    )  # fmt: skip
    text = (
        "KV cache: what a server keeps of every token it has read. Rest of the peak: the measured peak less weight "
        "files and cache; a dash where an engine's own reservation makes that meaningless.",
    )
    figures = () if figure is None else (figure,)
    return Section(scene.name("memory-section"), "Memory", text, figures, (without_empty_columns(table),))


def _stack(entry: Entry, context: int) -> Stack:
    usage = entry.candidate.memory
    cache = None if usage.kv_token_bytes is None else usage.kv_token_bytes * context
    rest = None if usage.peak_bytes is None else usage.peak_bytes - usage.weights_bytes - (cache or 0)
    return Stack(entry, usage.weights_bytes, cache, rest if rest is None or rest >= 0 else None)


def _memory_row(stack: Stack, scene: Scene) -> tuple[Cell, ...]:
    entry = stack.entry
    usage = entry.candidate.memory
    gained = Cell(MISSING)
    if usage.kv_token_bytes and not entry.baseline:
        saved = scene.comparison.baseline.candidate.memory.weights_bytes - usage.weights_bytes
        gained = Cell(count(saved // usage.kv_token_bytes), saved // usage.kv_token_bytes)
    sizes = (usage.weights_bytes, usage.linears_bytes, usage.loaded_bytes, usage.peak_bytes, usage.kv_token_bytes)
    return (
        cell(entry.name),
        *(quantity(size, "B") for size in (*sizes, stack.cache, stack.rest)),
        gained,
        quantity(statistics.median(entry.candidate.load_s) if entry.candidate.load_s else None, "s"),
    )


def layers(scene: Scene) -> Section:
    """Zeros, error and width of the layers: bars by decoder block and a table of every layer."""
    title = "Layers"
    entries = [entry for entry in scene.comparison.entries if entry.candidate.layers]
    if not entries:
        return Section(scene.name("layers"), title, missing="The run file holds no per-layer figures.")
    pruned = [entry for entry in entries if not entry.baseline]
    table = scene.name("layers-table")
    figures = [
        _bars(scene, pruned, lambda layer: layer.sparsity, ("sparsity", "Zeros by decoder block", "zeros (%)"), 100),
        _bars(scene, pruned, lambda layer: layer.error, ("error", "Layer error: lower is better", "relative error"), 1),
        _widths(scene, pruned),
    ]
    text = ["Layer error: how far a layer's output on calibration text is from the unpruned layer's, relative to it."]
    if all(layer.error is None for entry in entries for layer in entry.candidate.layers):
        text = ["The run file holds no layer errors."]
    if scene.comparison.baseline.candidate.layers and figures[2] is None:
        text.append("Every layer is as wide as the baseline's.")
    full = [f"“{entry.name}”" for entry in entries if all(layer.sparsity == 0 for layer in entry.candidate.layers)]
    if full:
        text.append(f"Without counted zeros: {', '.join(full)}.")
    tables = (_layer_table(scene, entries, table),)
    drawn = tuple(figure for figure in figures if figure is not None)
    return Section(scene.name("layers"), title, tuple(text), drawn, tables)


def _bars(
    scene: Scene, entries: list[Entry], of: Callable[[Layer], float | None], texts: tuple[str, str, str], scale: float
) -> Figure | None:
    values = [(entry, by_block(entry.candidate.layers, of)) for entry in entries]
    values = [(entry, blocks) for entry, blocks in values if any(value > 0 for value in blocks.values())]
    if not values:
        return None
    word, title, y = texts
    words = Words(
        scene.name(f"layers-{word}"), title, "decoder block", y,
        "mean over each block's linear layers, weighted by their weights", scene.name("layers-table"),
    )  # fmt: skip
    return block_bars(values, words, scale)


def _widths(scene: Scene, entries: list[Entry]) -> Figure | None:
    shapes = {layer.name: layer.shape for layer in scene.comparison.baseline.candidate.layers}
    if not any(
        shapes.get(layer.name, layer.shape) != layer.shape for entry in entries for layer in entry.candidate.layers
    ):
        return None

    def width(layer: Layer) -> float | None:
        whole = shapes.get(layer.name)
        return None if whole is None else layer.shape[0] * layer.shape[1] / (whole[0] * whole[1])

    return _bars(scene, entries, width, ("width", "Width by decoder block", "weights kept (%)"), 100)


def _layer_table(scene: Scene, entries: list[Entry], name: str) -> Table:
    records = {entry.index: {layer.name: layer for layer in entry.candidate.layers} for entry in entries}
    names = list(dict.fromkeys(layer.name for entry in entries for layer in entry.candidate.layers))
    columns = ["Layer"]
    for entry in entries:
        columns += [f"{entry.name}: shape", f"{entry.name}: zeros", f"{entry.name}: error (lower is better)"]
    rows = []
    for layer_name in names:
        row = [cell(layer_name)]
        for entry in entries:
            layer = records[entry.index].get(layer_name)
            if layer is None:
                row += [Cell(MISSING)] * 3
                continue
            out, wide = layer.shape
            row += [Cell(f"{out} × {wide}", out * wide), fraction(layer.sparsity), quantity(layer.error, "")]
        rows.append(tuple(row))
    caption = "Every linear layer: shape (out × in), zeros counted, relative output error"
    return without_empty_columns(Table(name, caption, tuple(columns), tuple(rows), "", always_folded=True))
