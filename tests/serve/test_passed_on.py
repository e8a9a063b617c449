"""What is passed on to a server: what tunes it, by its full name; nothing that opens it or loads code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from crepe_deploy.serve.launcher import ServeOptions, check, server_command
from crepe_deploy.serve.passed_on import ONNX, VLLM, Options, check_passed_on

from crepe_deploy.errors import ConfigError
from tests.serve.vllm_process import needs_vllm, python

# Everything of vLLM 0.32 that decides who reaches the server, what it tells others, which model it loads or what code.
DANGEROUS = re.findall(
    r"\S+",
    """
    additional-config all2all-backend allow-credentials allowed-headers allowed-local-media-path
    allowed-media-domains allowed-methods allowed-origins api-key api-server-count code-revision
    collect-detailed-traces compilation-config config config-format data-parallel-address
    data-parallel-rpc-port distributed-executor-backend download-dir ec-manager-config ec-transfer-config
    enable-mm-embeds enable-prompt-embeds enable-scale-out enable-sleep-mode enable-ssl-refresh
    enable-tokenizer-info-endpoint grpc grpc-port h11-max-header-count headless hf-config-path hf-overrides
    hf-token host io-processor-plugin kv-events-config kv-transfer-config load-format log-config-file
    logging-config logits-processors master-addr master-port middleware model model-class-overrides model-impl
    model-loader-extra-config nnodes otlp-traces-endpoint port profiler-config pt-load-map-location
    reasoning-parser-plugin revision root-path scheduler-cls spec-model speculative-config ssl-ca-certs
    ssl-cert-reqs ssl-certfile ssl-ciphers ssl-keyfile structured-outputs-config tokens-only
    tool-parser-plugin tool-server trust-remote-code trust-request-chat-template trust-request-mm-kwargs uds
    weight-transfer-config worker-cls worker-extension-cls
    """,
)


def refused(*extra: str, options: Options = VLLM) -> str:
    with pytest.raises(ConfigError) as caught:
        check_passed_on(extra, options)
    return str(caught.value)


@pytest.mark.parametrize("options", [VLLM, ONNX])
@pytest.mark.parametrize("name", DANGEROUS)
def test_what_opens_a_server_or_loads_code_is_refused_however_it_is_written(name: str, options: Options) -> None:
    for spelt in (name, name.replace("-", "_"), f"no-{name}", *(name[:end] for end in range(1, len(name)))):
        if (
            f"--{spelt}" not in options.values | options.flags | options.lists
        ):  # "quantization" of "quantization-config"
            for extra in ([f"--{spelt}", "x"], [f"--{spelt}=x"], [f"--{spelt}.a.b", "x"], [f"--{spelt}+", "x"]):
                refused(*extra, options=options)
                refused("--max-model-len", "64", *extra, options=options)


def test_our_own_option_is_named() -> None:
    for spelt in ("--host", "--hos", "--ho", "--host=0.0.0.0"):
        assert "give crepe-deploy's own --host" in refused(spelt, "0.0.0.0")
    assert "give crepe-deploy's own --api-key" in refused("--api_k", "x")
    assert "give the folder" in refused("--model=other")
    assert "docs/serving.md" in refused("--trust-remote-code")
    assert "which takes --max-model-len, --served-model-name, --threads" in refused("--enforce-eager", options=ONNX)


def test_words_that_belong_to_no_option_are_refused() -> None:
    for extra in (["other/model"], ["--enforce-eager", "other/model"], ["--seed", "1", "other/model"], ["--", "x"]):
        refused(*extra)
    refused("--max-model-len=64", "other/model")
    refused("-tp2"), refused("-O4"), refused("-h"), refused("--enforce-eager=x"), refused("-n", "2")


def test_what_tunes_a_server_is_passed_on() -> None:
    check_passed_on(["--max-model-len", "-1", "--dtype=float32", "--enforce-eager", "-tp", "2", "-O3"], VLLM)
    check_passed_on(["--served-model-name", "a", "b", "--no-enable-prefix-caching", "--seed", "-3"], VLLM)
    check_passed_on(["--threads", "2", "--max-model-len=64", "--served-model-name", "a"], ONNX)


def test_every_way_to_a_server_checks(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    options = ServeOptions(tmp_path, port=0, extra=("--hos", "0.0.0.0"))
    with pytest.raises(ConfigError, match="own --host"):
        check(options)
    with pytest.raises(ConfigError, match="own --host"):
        server_command(options, 8000, None)  # as `bench` starts it
    (tmp_path / "model.onnx").touch()
    with pytest.raises(ConfigError, match="own --host"):
        check(options)
    with pytest.raises(ConfigError, match="own --host"):
        server_command(options, 8000, None)


@needs_vllm
def test_vllms_own_parser_knows_the_lists() -> None:
    code = (
        "import json; from vllm.entrypoints.launchers.cli_args import make_arg_parser; "
        "from vllm.utils.argparse_utils import FlexibleArgumentParser as P; "
        "print('\\n' + json.dumps([[a.option_strings, str(a.nargs)] for a in make_arg_parser(P())._actions]))"
    )
    done = python("-c", code, VLLM_PLUGINS="")
    assert done.returncode == 0, done.stderr[-2000:]
    takes = {name: nargs for names, nargs in json.loads(done.stdout.splitlines()[-1]) for name in names}
    assert {f"--{name}" for name in DANGEROUS} <= takes.keys()
    assert {takes[name] for name in VLLM.flags} == {"0"}
    assert {takes[name] for name in VLLM.values} == {"None"}
    assert {takes[name] for name in VLLM.lists} == {"+"}
