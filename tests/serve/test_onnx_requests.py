"""Bad, large, many and abandoned requests to the ONNX server, and streams: each gets what docs/serving.md says."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import hypothesis.strategies as st
import pytest
from crepe_deploy.exporting.pipeline import export_checkpoint
from crepe_deploy.serve.onnx_model import Words
from crepe_deploy.serve.onnx_server import MAX_BODY_BYTES, MAX_REQUESTS
from hypothesis import HealthCheck, given, settings

from tests.onnx_models import pruned_model
from tests.pico import pico_tokenizer
from tests.serve.example import run_example
from tests.serve.processes import HANG_S

SERVE = "from crepe_deploy.serve.command import serve_command; serve_command()"
TEMPLATE = """
{%- if messages[0].role == 'boom' %}{{ raise_exception('no such role') }}{% endif -%}
{%- if messages[0].role == 'zero' %}{{ 1 // 0 }}{% endif -%}
{%- for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}"""
LONG = {"prompt": [5, 6, 7], "temperature": 0, "max_tokens": 240, "ignore_eos": True}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of a tiny graph whose tokenizer has a chat template and knows a token that the model does not."""
    root = tmp_path_factory.mktemp("requests")
    pruned = pruned_model(root)
    export_checkpoint(pruned, root / "onnx", "onnx", options={"flavor": "portable", "precision": "fp32"})
    tokenizer = type(pico_tokenizer()).from_pretrained(pruned)
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_tokens(["<beyond>"])
    tokenizer.save_pretrained(root / "onnx")
    command = [sys.executable, "-P", "-c", SERVE, str(root / "onnx"), "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def connect(url: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(url).netloc, timeout=HANG_S)


def post(url: str, body: Any, path: str = "/v1/completions") -> tuple[int, dict[str, Any]]:
    """The code and the JSON of an answer; body: bytes, or what becomes JSON."""
    connection = connect(url)
    connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body))
    answer = connection.getresponse()
    content = json.loads(answer.read())
    connection.close()
    return answer.status, content


def events(url: str, body: dict[str, Any], path: str = "/v1/completions") -> list[dict[str, Any]]:
    """The events of a stream, [DONE] left out."""
    connection = connect(url)
    connection.request("POST", path, json.dumps(body | {"stream": True}))
    answer = connection.getresponse()
    assert answer.status == 200 and answer.getheader("Content-Type", "").startswith("text/event-stream")
    lines = [line for line in answer.read().decode().split("\n\n") if line]
    connection.close()
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


CHAT = "/v1/chat/completions"
BAD: list[tuple[str, bytes, str]] = [
    ("/v1/completions", b"", "not JSON"),
    ("/v1/completions", b"[1]", "no JSON object"),
    ("/v1/completions", b"[" * 100_000, "nested deeper"),
    ("/v1/completions", b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested deeper"),
    ("/v1/completions", b'{"prompt": "\\ud800"}', "surrogates"),
    ("/v1/completions", b'{"prompt": "\xff"}', "not UTF-8"),
    ("/v1/completions", b'{"prompt": "a", "temperature": NaN}', "no number"),
    ("/v1/completions", b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", "digits"),
    ("/v1/completions", b'{"prompt": "a", "prompt": "b"}', "given twice"),
    ("/v1/completions", b'{"prompt": "a <beyond>"}', "token ids are from 0 to 319"),
    ("/v1/completions", b'{"prompt": [320]}', "token ids are from 0 to 319"),
    ("/v1/completions", b'{"prompt": [-1]}', "token ids are from 0 to 319"),
    ("/v1/completions", b'{"prompt": [true]}', "one list of token ids"),
    ("/v1/completions", b'{"prompt": "' + b"a" * 200_000 + b'"}', "200000 characters"),
    ("/v1/completions", b'{"prompt": [' + b"1," * 1_000_000 + b"1]}", "1000001 tokens"),
    (CHAT, b'{"messages": [{"role": "boom", "content": "a"}]}', "chat template.*no such role"),
    (CHAT, b'{"messages": [{"role": "zero", "content": "a"}]}', "chat template.*zero"),
    (CHAT, b'{"messages": [{"role": "user", "content": ["a"]}]}', "are strings here"),
    (CHAT, b'{"messages": [{"role": "user", "content": "' + b"a " * 100_000 + b'"}]}', "200000 characters"),
    (CHAT, b'{"messages": []}', "a list of objects"),
]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "match"), BAD, ids=[f"{match} {index}" for index, (*_, match) in enumerate(BAD)]
)
def test_bad_requests_are_told_what_is_wrong(url: str, path: str, body: bytes, match: str, streamed: bool) -> None:
    if streamed:
        body = body.replace(b"{", b'{"stream": true, ', 1)
    code, answer = post(url, body, path)
    error = answer["error"]
    assert (code, error["code"], error["type"], error["param"]) == (400, 400, "BadRequestError", None)
    assert re.search(match, error["message"]), error["message"][:300]


def test_other_paths_methods_and_sizes(url: str) -> None:
    assert post(url, {}, "/v1/embeddings")[1]["error"]["code"] == 404
    assert post(url, {}, "/v1/models")[1]["error"]["code"] == 405
    code, answer = post(url, b'{"prompt": "' + b"a" * (2 * MAX_BODY_BYTES) + b'"}')
    assert code == answer["error"]["code"] == 413


@pytest.mark.parametrize("path", ["/v1/completions", CHAT])
def test_a_stream_is_the_whole_answer_in_pieces(url: str, path: str) -> None:
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 60, "ignore_eos": True, "return_token_ids": True}
    asked |= {"messages": [{"role": "user", "content": "the city"}]} if path == CHAT else {"prompt": "the city"}
    _, answer = post(url, asked, path)
    (choice,) = answer["choices"]
    text = choice["message"]["content"] if path == CHAT else choice["text"]
    assert text
    *found, last, counted = events(url, asked | {"stream_options": {"include_usage": True}}, path)
    assert len({event["id"] for event in (*found, last, counted)}) == 1
    parts = [event["choices"][0] for event in found]
    said = [part["delta"].get("content", "") if path == CHAT else part["text"] for part in parts]
    assert "".join(said) == text and len(said) > 20
    assert [token for part in parts for token in part.get("token_ids", [])] == choice["token_ids"]
    assert {part["finish_reason"] for part in parts} == {None}
    assert last["choices"][0]["finish_reason"] == choice["finish_reason"] == "length"
    assert counted["choices"] == [] and counted["usage"] == answer["usage"]
    if path == CHAT:
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        assert found[0]["object"] == "chat.completion.chunk"


def test_characters_of_several_tokens_come_whole() -> None:
    tokenizer = pico_tokenizer()
    for text in ("the café, 漢字 🙂🙂 and more", "🙂", "a\u0301 b", "\ufffd!"):
        tokens = [int(token) for token in tokenizer(text)["input_ids"]]
        words = Words(tokenizer.decode)
        parts = [words.add(token) for token in tokens]
        assert "".join(parts) + words.rest() == text
        assert all("\ufffd" not in part for part in parts) or "\ufffd" in text
        cut = Words(tokenizer.decode)
        assert "".join(map(cut.add, tokens[:-1])) + cut.rest() == tokenizer.decode(tokens[:-1])


def test_the_example_in_the_docs(url: str) -> None:
    pytest.importorskip("openai")
    text = post(url, {"prompt": "the city of", "temperature": 0, "max_tokens": 16})[1]["choices"][0]["text"]
    assert run_example(url, "the city of", "none").startswith(text)


def test_what_nobody_waits_for_is_not_computed(url: str) -> None:
    started = time.monotonic()
    post(url, LONG)
    one = time.monotonic() - started
    left = []
    for index in range(40):
        connection = connect(url)
        connection.request("POST", "/v1/completions", json.dumps(LONG | {"stream": index % 2 == 0}))
        left.append(connection)
    for connection in left:
        connection.close()
    started = time.monotonic()
    code, answer = post(url, LONG)
    print(f"one alone {one:.2f} s, after 40 abandoned {time.monotonic() - started:.2f} s")
    assert code == 200 and answer["usage"]["completion_tokens"] == 240


def test_too_many_are_sent_away_and_the_rest_answered(url: str) -> None:
    expected = post(url, LONG)[1]["choices"]
    barrier = threading.Barrier(2 * MAX_REQUESTS)

    def ask(_: int) -> tuple[int, dict[str, Any]]:
        barrier.wait()
        return post(url, LONG)

    with ThreadPoolExecutor(2 * MAX_REQUESTS) as pool:
        found = list(pool.map(ask, range(2 * MAX_REQUESTS)))
    codes = [code for code, _ in found]
    assert set(codes) <= {200, 503} and codes.count(200) >= MAX_REQUESTS
    assert all(answer["choices"] == expected for code, answer in found if code == 200)
    assert all(answer["error"]["code"] == 503 for code, answer in found if code == 503)


SMALL = st.none() | st.booleans() | st.integers(-5, 20) | st.floats() | st.text(max_size=5)
VALUES = st.recursive(SMALL, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner))
FIELDS = (
    "prompt messages model max_tokens max_completion_tokens temperature top_p seed ignore_eos stream stream_options "
    "return_token_ids n stop logprobs echo user role content include_usage"
)
BODIES = st.dictionaries(st.sampled_from(FIELDS.split(" ")) | st.text(max_size=5), VALUES, max_size=6)
PROMPTS = st.text(min_size=1, max_size=9) | st.lists(st.integers(0, 330), min_size=1, max_size=5) | VALUES
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.text(max_size=5), "content": st.text(max_size=9)}), max_size=2)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    BODIES, st.text(min_size=1, max_size=9) | st.lists(st.integers(0, 319), min_size=1, max_size=5) | VALUES, MESSAGES
)
def test_any_body_is_answered_or_refused(url: str, body: dict[str, Any], prompt: Any, messages: Any) -> None:
    for path, asked in (("/v1/completions", {"prompt": prompt}), (CHAT, {"messages": messages})):
        connection = connect(url)
        connection.request("POST", path, json.dumps(body | asked))
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        assert answer.status in (200, 400), data
        if answer.status == 400:
            assert json.loads(data)["error"]["message"]
