"""vLLM serves layers of different widths: through the plugin, and without it in the DeciLM layout."""

from __future__ import annotations

import pytest

from tests.serve.conftest import NARROW_TOKENS, Vllm
from tests.serve.models import OTHERS
from tests.serve.vllm_process import PROMPTS, needs_vllm, transformers_tokens

pytestmark = [needs_vllm, pytest.mark.vllm]


def test_vllm_says_what_transformers_says(vllm: Vllm) -> None:
    expected = transformers_tokens(vllm.folders["per-layer"], NARROW_TOKENS)
    assert vllm.plugin["per-layer"] == expected
    assert vllm.stock["deci"] == expected
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)


@pytest.mark.parametrize("family", OTHERS)
def test_vllm_says_what_transformers_says_of_other_families(vllm: Vllm, family: str) -> None:
    assert vllm.plugin[family] == transformers_tokens(vllm.folders[family], NARROW_TOKENS)


def test_vllm_without_the_plugin_refuses_widths_per_layer(vllm: Vllm) -> None:
    assert "crepe_llama" in str(vllm.stock["per-layer"])
