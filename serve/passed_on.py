"""Which of a server's own options `crepe-deploy serve` passes on: a list of those that only tune it.

What decides who can reach the server, which model it loads, or what code runs in it is ours alone, and anything that is
not on the list is refused by name. Names count in full: argparse and vLLM also take abbreviations, underscores, dotted
JSON and files of options, each of which would be a second way to say what was refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ..errors import ConfigError


@dataclass(frozen=True)
class Options:
    """Names of options without a value, with one, and with one or more."""

    flags: frozenset[str]
    values: frozenset[str]
    lists: frozenset[str] = frozenset()


def _names(text: str) -> frozenset[str]:
    return frozenset(f"--{name}" for name in text.split())


_SWITCHES: Final = _names(
    "async-scheduling disable-cascade-attn disable-custom-all-reduce disable-fastapi-docs "
    "disable-hybrid-kv-cache-manager disable-sliding-window disable-uvicorn-access-log enable-auto-tool-choice "
    "enable-chunked-prefill enable-expert-parallel enable-force-include-usage enable-log-requests enable-lora "
    "enable-prefix-caching enable-prompt-tokens-details enable-request-id-headers enable-server-load-tracking "
    "enforce-eager language-model-only return-tokens-as-token-ids scheduler-reserve-full-isl skip-mm-profiling "
    "use-tqdm-on-load"
)
VLLM: Final = Options(
    _SWITCHES | {name.replace("--", "--no-", 1) for name in _SWITCHES} | {"--disable-log-stats"},
    _names(
        "attention-backend block-size chat-template chat-template-content-format cpu-offload-gb "
        "default-chat-template-kwargs disable-access-log-for-endpoints dtype generation-config gpu-memory-utilization "
        "kv-cache-dtype kv-cache-memory-bytes limit-mm-per-prompt linear-backend log-level logprobs-mode "
        "long-prefill-token-threshold lora-dtype max-cpu-loras max-cudagraph-capture-size max-log-len max-logprobs "
        "max-lora-rank max-loras max-model-len max-num-batched-tokens max-num-queued-reqs max-num-queued-tokens "
        "max-num-seqs mm-processor-cache-gb moe-backend num-gpu-blocks-override optimization-level "
        "override-generation-config performance-mode pipeline-parallel-size quantization reasoning-parser "
        "response-role safetensors-load-strategy scheduling-policy seed shutdown-timeout sse-keep-alive-interval "
        "stream-interval tensor-parallel-size tokenizer tool-call-parser uvicorn-log-level"
    )
    | {"-q", "-pp", "-tp"},
    _names("cudagraph-capture-sizes lora-modules served-model-name"),
)
ONNX_CONTEXT: Final = 4096  # tokens, where --max-model-len says nothing
ONNX: Final = Options(frozenset(), _names("max-model-len threads served-model-name"))
_OURS: Final = _names("host port api-key model")  # said by crepe-deploy's own options
_LEVEL: Final = re.compile(r"-O[0-3]")
_NUMBER: Final = re.compile(r"-\d+(\.\d+)?")


def check_passed_on(extra: Sequence[str], options: Options) -> None:
    """Raise ConfigError naming the first of `extra` that may not be passed on to the server."""
    takes = 0  # values that the last option still takes; below 0: any number
    for part in extra:
        if takes and (not part.startswith("-") or _NUMBER.fullmatch(part)):
            takes -= 1
            continue
        name, equals, _ = part.partition("=")
        if not part.startswith("-"):
            raise ConfigError(f"'{part}' belongs to no option of the server; the folder to serve is given once")
        if name in options.values or name in options.lists:
            takes = 0 if equals else -1 if name in options.lists else 1
        elif (name in options.flags and not equals) or (options is VLLM and _LEVEL.fullmatch(part)):
            takes = 0
        else:
            raise ConfigError(_refusal(name, options))


def _refusal(name: str, options: Options) -> str:
    meant = name.replace("_", "-").partition(".")[0]
    if len(meant) > 2 and (ours := next((own for own in sorted(_OURS) if own.startswith(meant)), None)):
        own = "the folder" if ours == "--model" else f"crepe-deploy's own {ours}"
        return f"{name} is not passed on to the server: give {own} before any --"
    if options is ONNX:
        return f"{name} is no option of the ONNX server, which takes {', '.join(sorted(ONNX.values))}"
    return (
        f"{name} is not passed on to vLLM: only options that tune it are, their names in full; what opens it, names "
        "another model or loads code is for a vLLM that you start yourself (docs/serving.md)"
    )
