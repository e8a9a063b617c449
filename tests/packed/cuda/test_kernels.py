"""The Triton kernels under the interpreter, against fp64; and compiled for real targets, as far as that goes here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crepe_deploy.errors import KernelError
from crepe_deploy.packed.cuda import launch
from crepe_deploy.packed.cuda.launch import Config
from crepe_deploy.packed.cuda.layout import Kind, dense_control
from tests.packed.cuda.weights import assert_product, held, ragged, stored

PATTERNS = {"2:4": (2, 4), "4:8": (4, 8), "8:16": (8, 16), "16:32": (16, 32), "5:8": (5, 8), "1:4": (1, 4)}


@pytest.mark.parametrize(
    "pattern, dtype",
    [(pattern, torch.bfloat16) for pattern in PATTERNS] + [("2:4", torch.float16), ("16:32", torch.float16)],
)
def test_products_equal_fp64(pattern: str, dtype: torch.dtype) -> None:
    weight, dense = held(stored(15, 160, *PATTERNS[pattern], dtype))
    assert weight.kind == (Kind.NIBBLE if pattern == "2:4" else Kind.MASK)
    assert torch.equal(launch.expand(weight).double(), dense)
    counters = launch.counters_for(15, "cpu")
    bias = torch.randn(15).to(dtype)
    for tokens, block in ((1, 1), (3, 4), (5, 16)):
        x = torch.randn(tokens, 160).to(dtype)
        got = launch.linear(x, weight, counters, bias, Config(16, block, 1, 4, 1))
        assert_product(got, x, dense, bias)


@pytest.mark.parametrize("tokens, block", [(1, 1), (2, 2), (9, 16)])
def test_programs_that_share_a_row_block_agree_with_one(tokens: int, block: int) -> None:
    weight, dense = held(stored(11, 1056, 2, 4))
    counters = launch.counters_for(11, "cpu")
    x = torch.randn(tokens, 1056).bfloat16()
    for _ in range(2):  # counters are left as they were found
        got = launch.linear(x, weight, counters, None, Config(16, block, 2, 4, 1))
        assert_product(got, x, dense, None)
        assert not counters.any()


@pytest.mark.parametrize("columns", [32, 96, 128])
def test_odd_sizes(columns: int) -> None:
    for pair in (stored(17, columns, 2, 4), stored(17, columns, 16, 32)):
        weight, dense = held(pair)
        x = torch.randn(1, columns).bfloat16()
        got = launch.linear(x, weight, launch.counters_for(17, "cpu"), None, Config(16, 1, 1, 4, 1))
        assert_product(got, x, dense, None)


def test_unstructured_rows_and_ragged_shards() -> None:
    for pair in (stored(18, 96, 41, 96), ragged(18, 64)):
        weight, dense = held(pair)
        assert weight.kind == Kind.ROWS
        assert torch.equal(launch.expand(weight).double(), dense)
        for tokens, block in ((1, 1), (6, 16)):
            x = torch.randn(tokens, dense.shape[1]).bfloat16()
            got = launch.linear(x, weight, launch.counters_for(18, "cpu"), None, Config(16, block, 1, 4, 1))
            assert_product(got, x, dense, None)


def test_more_tokens_than_a_block_holds() -> None:
    weight, dense = held(stored(16, 64, 2, 4))
    x = torch.randn(40, 64).bfloat16()
    got = launch.linear(x, weight, launch.counters_for(16, "cpu"), None, Config(16, 16, 1, 4, 1))
    assert_product(got, x, dense, None)


def test_the_dense_control_shares_the_skeleton() -> None:
    dense = torch.randn(16, 96).bfloat16()
    for tokens, block in ((1, 1), (3, 16)):
        x = torch.randn(tokens, 96).bfloat16()
        config = Config(16, block, 1, 4, 1)
        got = launch.linear(x, dense_control(dense), launch.counters_for(16, "cpu"), None, config)
        assert_product(got, x, dense.double(), None)


def test_what_does_not_fit_is_refused() -> None:
    weight, _ = held(stored(16, 64, 2, 4))
    counters = launch.counters_for(16, "cpu")
    good, config = torch.randn(2, 64).bfloat16(), Config(16, 2, 1, 4, 1)
    for x, bias, used in (
        (good[:, :32], None, config),
        (good.float(), None, config),
        (good, torch.zeros(3).bfloat16(), config),
        (good, None, Config(16, 1, 1, 4, 1)),
        (torch.randn(20, 64).bfloat16(), None, Config(16, 16, 2, 4, 1)),
        (good, None, Config(8, 2, 1, 4, 1)),
    ):
        with pytest.raises(KernelError):
            launch.linear(x, weight, counters, bias, used)


def test_configurations_have_names() -> None:
    config = Config(64, 16, 4, 8, 2)
    assert Config.parse(str(config)) == config
    for text in ("", "n1", "n1 m1 s1 w1 q1", "nx m1 s1 w1 p1"):
        with pytest.raises(ValueError):
            Config.parse(text)
    weight, _ = held(stored(16, 64, 2, 4))
    for tokens in (1, 3, 16, 64, 65, 2048):
        for found in launch.configs(weight, tokens, 132):
            assert found.tokens >= tokens or (found.split == 1 and tokens > 64)


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_real_devices(capability: int, tmp_path: Path) -> None:
    """Down to machine code, without spilling in the decode kernels; nothing here can run it."""
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, str(script), str(capability)],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("compiled") == 7
