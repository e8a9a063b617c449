"""The server of ONNX folders: the same smoke check and key rule as vLLM's, and refusals by name."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crepe_deploy.exporting.pipeline import export_checkpoint
from crepe_deploy.serve.engines import get_engine
from crepe_deploy.serve.engines.base import Settings
from crepe_deploy.serve.launcher import ServeOptions, require_engine, server_command
from crepe_deploy.serve.onnx_generate import Sampling, choose, generate
from crepe_deploy.serve.smoke import complete, request

from crepe_deploy.errors import CheckpointError, ConfigError, ServeError
from crepe_deploy.store.manifest import load_manifest
from tests.onnx_models import pruned_model

SERVE = "from crepe_deploy.serve.command import serve_command; serve_command()"


@pytest.fixture(scope="module", params=["portable", "genai"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported graph of either flavour."""
    root = tmp_path_factory.mktemp("served")
    export_checkpoint(pruned_model(root), root / "onnx", "onnx", options={"flavor": request.param, "precision": "fp32"})
    return root / "onnx"


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[dict[str, Any]]:
    """`crepe-deploy serve` on it, with a key, as its `--json` output describes it."""
    command = [sys.executable, "-P", "-c", SERVE, str(folder), "--port", "0", "--json", "--api-key", "secret"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        assert process.wait(3600) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def ask(server: dict[str, Any], path: str = "/v1/completions", key: str | None = "secret", **body: Any) -> Any:
    return request(f"{server['url']}{path}", body or None, key)


def test_it_says_what_the_manifest_records(server: dict[str, Any], folder: Path) -> None:
    assert (server["smoke"]["agreed"], server["smoke"]["dtype"]) == (server["smoke"]["total"], "float32")
    greedy = load_manifest(folder).metrics["greedy"]
    prompt, tokens = greedy["prompt_token_ids"], greedy["token_ids"]
    assert complete(server["url"], "secret", prompt, len(tokens)) == tokens
    again = complete(server["url"], "secret", [*prompt, *tokens[:3]], len(tokens) - 3)  # no memory of the last request
    assert again == tokens[3:]


def test_text_seeds_and_counts(server: dict[str, Any]) -> None:
    body = {"prompt": "the city of the world", "max_tokens": 5, "seed": 7, "temperature": 1.5, "ignore_eos": True}
    first, second = ask(server, **body), ask(server, **body)
    assert first["choices"][0]["text"] == second["choices"][0]["text"] != ""
    assert first["usage"]["completion_tokens"] == 5
    assert first["choices"][0]["finish_reason"] == "length"
    assert "token_ids" not in first["choices"][0]


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ({"prompt": "a", "stream": 1}, "400.*'stream' is true or false"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "400.*goes with stream"),
        ({"prompt": "a", "stream": True, "stream_options": {"every": 1}}, "400.*include_usage only"),
        ({"prompt": "a", "stop": "b"}, "400.*'stop' is not supported"),
        ({"prompt": "a", "n": 2}, "400.*'n' is not supported"),
        ({"prompt": "a", "temperature": -1}, "400.*temperature"),
        ({"prompt": "a", "max_tokens": "many"}, "400.*'max_tokens'"),
        ({"prompt": [99999]}, "400.*token ids are from 0 to 319"),
        ({"prompt": ""}, "400.*may not be empty"),
        ({"prompt": [5] * 256}, "400.*the model reads 256"),
        ({"prompt": "a", "model": "another"}, "400.*'another' is not served"),
        ({"max_tokens": 3}, "400.*'prompt' is missing"),
    ],
)
def test_wrong_requests_are_named(server: dict[str, Any], body: dict[str, Any], match: str) -> None:
    with pytest.raises(ServeError, match=match):
        ask(server, **body)


def test_the_key_and_the_paths(server: dict[str, Any]) -> None:
    for key in (None, "wrong"):
        with pytest.raises(ServeError, match="answered 401"):
            ask(server, key=key, prompt="a")
        with pytest.raises(ServeError, match="answered 401"):
            ask(server, "/v1/models", key)
    with pytest.raises(ServeError, match="answered 404"):
        ask(server, "/v1/embeddings", prompt="a")
    with pytest.raises(ServeError, match=r"400.*no chat template"):
        ask(server, "/v1/chat/completions", messages=[{"role": "user", "content": "a"}])


def test_it_is_an_engine_that_can_be_measured(folder: Path) -> None:
    engine = get_engine("onnxruntime")(folder, Settings(max_tokens=32, threads=1))
    times = engine.generate([[5, 6, 7], [8, 9, 10]], 8)
    assert len(times) == 8 and times == sorted(times)
    assert engine.describe()["dtype"] == "float32"
    engine.close()
    with pytest.raises(ConfigError, match="computes in float32"):
        get_engine("onnxruntime")(folder, Settings(dtype="bfloat16"))
    with pytest.raises(CheckpointError, match="holds no ONNX graph"):
        get_engine("onnxruntime")(folder.parent / "pruned", Settings())


def test_the_launcher_chooses_by_the_folder(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    require_engine(tmp_path)
    command = server_command(ServeOptions(tmp_path, api_key="secret", extra=("--threads", "1")), 8000, None)
    assert "crepe_deploy.serve.onnx_server" in command and command[-2:] == ["--threads", "1"]
    assert "secret" not in command


class Counting:
    """A runner whose best token is always the next number."""

    def start(self, prompts: Sequence[Sequence[int]]) -> np.ndarray[Any, Any]:
        return self.step([prompt[-1] for prompt in prompts])

    def step(self, tokens: Sequence[int]) -> np.ndarray[Any, Any]:
        return np.eye(10, dtype=np.float32)[[(token + 1) % 10 for token in tokens]]


def test_generation_ends_where_it_should() -> None:
    greedy = Sampling(max_tokens=9, temperature=0)
    assert list(generate(Counting(), [1], greedy, frozenset({4}), 100)) == [(2, None), (3, None), (4, "stop")]
    assert list(generate(Counting(), [1], greedy, frozenset({4}), 2)) == [(2, None), (3, "length")]
    ignoring = Sampling(max_tokens=4, temperature=0, ignore_eos=True)
    found = list(generate(Counting(), [1], ignoring, frozenset({2}), 100))
    assert found == [(2, None), (3, None), (4, None), (5, "length")]


def test_sampling_follows_the_probabilities() -> None:
    logits = np.log(np.array([0.6, 0.3, 0.1], np.float32))
    random = np.random.default_rng(0)
    picks = [choose(logits, Sampling(), random) for _ in range(2000)]
    assert np.abs(np.bincount(picks) / 2000 - [0.6, 0.3, 0.1]).max() < 0.04
    narrow = [choose(logits, Sampling(top_p=0.5), random) for _ in range(50)]
    assert set(narrow) == {0}
    assert {choose(logits, Sampling(top_p=0.7), random) for _ in range(200)} == {0, 1}
    assert choose(logits, Sampling(temperature=0), random) == 0
