"""What lm-eval is about to ask a model, checked before any of it is computed: it asserts and says no more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from crepe_deploy.errors import CalibrationError, CheckpointError


def check_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Raise CheckpointError unless the tokenizer of this folder has what lm-eval starts a text with."""
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"{folder}: its tokenizer has neither BOS nor EOS, and lm-eval starts texts with one of them: name one as "
            "bos_token or eos_token in tokenizer_config.json"
        )


def checked(judge: Any) -> Callable[..., Any]:
    """`judge.loglikelihood`, of an lm-eval model, that looks at every request before it computes the first."""
    ask = judge.loglikelihood

    def look_and_ask(requests: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        for request in requests:
            _check(judge, request)
        return ask(requests, *args, **kwargs)

    return look_and_ask


def _check(judge: Any, request: Any) -> None:
    """Raise CalibrationError for a prompt or a choice without a token, and for a choice longer than the context."""
    prompt, choice = request.args
    place = f"task {request.task_name}, document {request.doc_id}"
    if prompt == "":
        asked = judge.tok_encode(choice, add_special_tokens=False)
        asked = asked[1:] if asked[:1] == [judge.prefix_token_id] else asked
    else:
        read, asked = judge._encode_pair(prompt, choice)
        if not read:
            raise CalibrationError(f"{place}: its prompt {prompt!r} is blank, which leaves nothing to continue")
    if not asked:
        raise CalibrationError(f"{place}: its choice {choice!r} adds no token to its prompt")
    if len(asked) > judge.max_length:
        raise CalibrationError(
            f"{place}: a choice of {len(asked)} tokens is longer than the model's context of {judge.max_length}"
        )
