"""Small random packed weights and what they should compute."""

from __future__ import annotations

import torch
from torch import Tensor

from crepe_deploy.packed.cuda.layout import DeviceWeight, to_device
from crepe_deploy.packed.format import pack, slice_columns, unpack
from tests.packed.test_format import random_mask

EPS = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}  # the interpreter cuts to bf16 where devices round


def stored(rows: int, columns: int, n: int, m: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """A stored pair, with zeros and negative zeros among the kept values."""
    weight = torch.randn(rows, columns).to(dtype)
    weight[::7] = 0.0
    weight[3::7] = -0.0
    return pack(weight, random_mask(rows, columns, n, m))


def ragged(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Columns cut out of an unstructured weight: rows keep different counts."""
    values, mask = stored(rows, 2 * columns, columns, 2 * columns)
    return slice_columns(values, mask, 0, columns)


def held(pair: tuple[Tensor, Tensor]) -> tuple[DeviceWeight, Tensor]:
    """The kernels' layout and the dense weight in fp64."""
    return to_device(*pair, "cpu"), unpack(*pair).double()


def assert_product(got: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None) -> None:
    """`got` is `x W^T + bias` as fp32 sums give it, rounded once."""
    expected = x.double() @ dense.T + (0 if bias is None else bias.double())
    room = EPS[got.dtype] * expected.abs() + 1e-4 * x.double().abs().amax() * dense.abs().sum(1).amax()
    assert bool(((got.double() - expected).abs() <= room).all()), (got.double() - expected).abs().max()
