"""Good inputs of every kind, tiny, made once by the commands that make them, and then spoilt."""

from __future__ import annotations

import json
import os
import shutil
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crepe_deploy import cli
from crepe_deploy.errors import EXIT_RESUMABLE
from tests.pico import VOCAB, make_pico, pico_llama_config, pico_tokenizer, sample_text
from tests.pico_moe import make_moe

from .strikes import Counter, arm

TINY: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}  # fmt: skip
CALIBRATION = ("--calib-samples", "2", "--calib-length", "16")
FAMILIES = ("gpt2", "gemma2", "qwen2", "qwen3", "opt", "phi3", "gpt_neox", "mistral", "mixtral", "bloom", "bert", "t5")
_SIZES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "n_inner": 64},
    "opt": {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "word_embed_proj_dim": 32},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "t5": {"d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2, "d_kv": 16},
    "bert": {**TINY, "num_hidden_layers": 2, "is_decoder": True},
}  # fmt: skip


class Corpus:
    """Samples by name, each made when it is first asked for; `path(name)` is a file or a folder that stays as it is."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """Where a sample lies."""
        whole = self.root / name.split("/")[0]
        if not whole.exists():
            _in_a_child(lambda: self._make(whole.name, whole))
            assert whole.exists(), f"the sample {name} could not be made"
            for path in (whole, *whole.rglob("*")):
                path.chmod(0o755 if path.is_dir() else 0o644)
        return self.root / name

    def copy(self, name: str, folder: Path) -> Path:
        """A copy of a sample in a folder, to be spoilt."""
        sample, place = self.path(name), folder / Path(name).name
        if sample.is_dir():
            shutil.copytree(sample, place)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(sample, place)
        return place

    def command(self, name: str) -> list[str]:
        """The arguments that made a stopped run, or that make a sample in the present folder."""
        source, *arguments = (STOPPED | _COMMANDS)[name]
        stands = {"TEXT": str(self.path("text.txt"))}
        return [arguments[0], str(self.path(source)), *(stands.get(part, part) for part in arguments[1:])]

    def _stop(self, name: str, place: Path) -> None:
        """A folder with what a run left that was stopped when its journal had something to say."""
        signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for what runs in the background
        for event in (*range(40, 100, 4), *range(100, 2000, 20)):
            place.mkdir()
            os.chdir(place)
            arm(self.root, event, "SIGINT", Counter())()
            code = cli.run(self.command(name))
            if code == 0:
                break
            if code == EXIT_RESUMABLE and any(path.read_bytes().count(b"\n") > 5 for path in place.rglob("*journal*")):
                return
            shutil.rmtree(place)
        raise AssertionError(f"{name} could not be stopped")

    def _make(self, name: str, place: Path) -> None:
        if name in _FILES:
            place.parent.mkdir(parents=True, exist_ok=True)
            _FILES[name](place)
        elif name in _MODELS:
            _MODELS[name](place)
        elif name in FAMILIES:
            _family(place, name)
        elif name in STOPPED:
            self._stop(name, place)
        else:
            made = self.root / f"making-{name}"
            code = cli.run([*self.command(name), "--out", str(made)])
            assert code == 0, f"{name}: exit {code}"
            (made / "dense" if (made / "dense" / "config.json").exists() and name in _INNER else made).rename(place)


_INNER = {"per-layer"}
_TYR = ("model", "tyr", "--calib", "TEXT", *CALIBRATION, "--sparsity", "0.25", "--generations", "2", "--offspring", "4",
        "--iterations", "2", "--ffn-multiple", "8", "--search-samples", "1")  # fmt: skip
_SEARCH = ("model", "search", "--calib", "TEXT", "--text", "TEXT", *CALIBRATION, "--text-samples", "1",
           "--text-length", "16",
           "--evaluations", "6", "--fit", "3", "--finalists", "1", "--workers", "1", "--kernels", "3,5")  # fmt: skip
_COMMANDS: dict[str, tuple[str, ...]] = {
    "pruned": ("model", "prune", "--method", "magnitude"),
    "formats": ("model", "prune-and-export", "--method", "magnitude", "--format", "dense,packed"),
    "packed": ("pruned", "export", "--format", "packed"),
    "int8": ("pruned", "export", "--format", "int8"),
    "onnx": ("pruned", "export", "--format", "onnx"),
    "genai": ("pruned", "export", "--format", "onnx", "--onnx-flavor", "genai"),
    "per-layer": _TYR,
    "deci": ("per-layer", "export", "--format", "deci"),
    "preset.json": _SEARCH,
}
STOPPED: dict[str, tuple[str, ...]] = {
    "stopped-search": (*_SEARCH, "--out", "preset.json"),
    "stopped-tyr": (*_TYR, "--out", "out"),
}


def _model(place: Path, **more: Any) -> None:
    make_pico(place, pico_llama_config(**TINY, **more))
    (place / "LICENSE").write_text("Free.\n")
    (place / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\n---\n# A model\n")


def _sharded(place: Path) -> None:
    from transformers import AutoModelForCausalLM

    _model(place)
    model = AutoModelForCausalLM.from_pretrained(str(place))
    (place / "model.safetensors").unlink()
    model.save_pretrained(str(place), max_shard_size="60KB")


def _family(place: Path, name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    config = AutoConfig.for_model(
        name, vocab_size=VOCAB, bos_token_id=0, eos_token_id=1, pad_token_id=1, **(_SIZES.get(name) or _tiny(name))
    )
    torch.manual_seed(0)
    kind = AutoModel if name == "t5" else AutoModelForCausalLM
    kind.from_config(config, dtype=torch.float32).save_pretrained(str(place))
    pico_tokenizer().save_pretrained(str(place))


def _tiny(name: str) -> dict[str, Any]:
    sizes = {**TINY, "num_hidden_layers": 2, "head_dim": 16}
    if name == "phi3":
        sizes = {**sizes, "num_key_value_heads": 2}
        del sizes["head_dim"]
    return {**sizes, "num_local_experts": 2} if name == "mixtral" else sizes


def _gguf(place: Path) -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(str(place), "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    tokens = sorted(pico_tokenizer().get_vocab(), key=pico_tokenizer().get_vocab().get)  # type: ignore[arg-type]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<s>", "</s>") else 1 for token in tokens])
    merges = json.loads(pico_tokenizer().backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    generator = np.random.default_rng(0)
    sizes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32), "ffn_gate": (64, 32),
             "ffn_up": (64, 32), "ffn_down": (32, 64), "attn_norm": (32,), "ffn_norm": (32,)}  # fmt: skip
    shapes = {f"blk.0.{name}.weight": shape for name, shape in sizes.items()}
    shapes |= {"token_embd.weight": (VOCAB, 32), "output_norm.weight": (32,), "output.weight": (VOCAB, 32)}
    for name, shape in shapes.items():
        writer.add_tensor(name, generator.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _run(place: Path) -> None:
    from tests.bench.report_runs import small

    place.write_text(small().model_dump_json())


def _charts(place: Path) -> None:
    from tests.bench.report_runs import charted

    place.write_text(charted().model_dump_json())


def _pytest_benchmark(place: Path) -> None:
    stats = {"min": 0.9, "max": 1.2, "mean": 1.0, "stddev": 0.1, "rounds": 5, "median": 1.0, "iterations": 1,
             "data": [0.9, 1.0, 1.0, 1.1, 1.2]}  # fmt: skip
    one = {"group": None, "name": "test_one", "fullname": "tests/a.py::test_one", "params": None, "param": None,
           "extra_info": {"crepe": 1}, "options": {"timer": "perf_counter"}, "stats": stats}  # fmt: skip
    machine = {"node": "x", "processor": "x86_64", "machine": "x86_64", "system": "Linux", "release": "6",
               "cpu": {"brand_raw": "Xeon", "count": 2, "arch": "X86_64"}}  # fmt: skip
    document = {"machine_info": machine, "commit_info": {"id": "abc", "branch": "main", "dirty": False},
                "benchmarks": [one, {**one, "name": "test_two", "fullname": "tests/a.py::test_two"}],
                "datetime": "2026-01-01T10:00:00", "version": "5.1.0"}  # fmt: skip
    place.write_text(json.dumps(document))


def _parquet(place: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = sample_text(300).split("\n\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": rows, "n": list(range(len(rows)))}), place)


def _lines(place: Path) -> None:
    rows = sample_text(300).split("\n\n")
    place.write_text("".join(json.dumps({"text": row, "n": 1}) + "\n" for row in rows))


_SUITE = """name: tiny
engine: transformers
baseline: dense
candidates:
  - {name: dense, folder: ../model, dtype: float32}
  - {name: packed, folder: ../nowhere}
points:
  - {name: b1, batch: 1, prompt_tokens: 8, output_tokens: 2}
  - {name: served, concurrency: 2, requests: 2, prompt_tokens: 8, output_tokens: 2}
rounds: 1
warmup: 0
"""
_BENCH = """name: tiny
engine: transformers
threads: 1
candidates:
  - {name: dense, folder: MODEL, dtype: float32}
points:
  - {name: b1, batch: 1, prompt_tokens: 8, output_tokens: 2}
rounds: 1
warmup: 0
"""
_RECIPE = """name: mine
method: ria
params: {exponent: 0.5}
feed: both
permute: fold
reconstruct: admm
reprune: dsnot
provenance: {model: x, n: 1}
"""
_BUDGETS = """relative:
  - {metric: tpot_s, max_slowdown: 0.05, floor: 0.0001}
  - {metric: ttft_s, max_slowdown: 0.10, floor: 0.001}
memory: {weights: 0.0, peak: 0.05}
quality: {perplexity_ratio: 1.005}
"""
_REQUEST = """{"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "stream": true,
 "stream_options": {"include_usage": true}, "temperature": 0.5, "top_p": 0.9, "seed": 1, "n": 1, "stop": null}
"""
_MODELS: dict[str, Callable[[Path], object]] = {
    "model": _model, "sharded": _sharded, "tied": lambda place: _model(place, tie_word_embeddings=True),
    "deep": lambda place: _model(place, num_hidden_layers=8),
    "experts": lambda place: make_moe(place, num_hidden_layers=2),
}  # fmt: skip
_FILES: dict[str, Callable[[Path], object]] = {
    "text.txt": lambda place: place.write_text(sample_text(400)),
    "text.jsonl": _lines,
    "text.parquet": _parquet,
    "model.gguf": _gguf,
    "run.json": _run,
    "charts.json": _charts,
    "benchmark.json": _pytest_benchmark,
    "suite.yaml": lambda place: place.write_text(_SUITE),
    "bench.yaml": lambda place: place.write_text(_BENCH.replace("MODEL", str(place.parent / "model"))),
    "recipe.yaml": lambda place: place.write_text(_RECIPE),
    "request.json": lambda place: place.write_text(_REQUEST),
    "budgets.yaml": lambda place: place.write_text(_BUDGETS),
}


def _in_a_child(make: Callable[[], None]) -> None:
    """Make a sample in a child, which may start threads and import what it likes."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            make()
            code = 0
        except BaseException:  # noqa: BLE001 - a child says what it died of
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
