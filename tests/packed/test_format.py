"""The crepe-nm format: round trips are bit-identical, and what is wrong is refused by name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crepe_deploy.errors import CheckpointError, PatternError
from crepe_deploy.packed import format as fmt

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PATTERNS = ((1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (3, 6), (5, 10), (5, 12), (8, 16), (16, 32), (31, 32), (32, 32))


def random_mask(rows: int, columns: int, n: int, m: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, columns // m, m, generator=generator)
    mask = torch.zeros(scores.shape, dtype=torch.bool).scatter_(2, scores.argsort(-1)[..., :n], True)
    return mask.view(rows, columns)


def random_weight(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    weight.view(-1)[::7] = 0.0
    weight.view(-1)[::5] = -0.0
    return weight


def columns_for(m: int) -> int:
    return 32 * m


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_round_trip_is_bit_identical(n: int, m: int, dtype: torch.dtype) -> None:
    columns = columns_for(m)
    weight, mask = random_weight(5, columns, dtype), random_mask(5, columns, n, m)
    values, mask_bytes = fmt.pack(weight, mask)
    assert values.shape == (5, columns * n // m)
    assert values.dtype == dtype
    assert mask_bytes.shape == (5, columns // 8)
    fmt.validate(values, mask_bytes, n, m, columns, 5, "w")
    expected = torch.where(mask, weight, torch.zeros((), dtype=dtype))
    assert torch.equal(bits(fmt.unpack(values, mask_bytes)), bits(expected))
    assert torch.equal(fmt.unpack_mask(mask_bytes), mask)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 4), st.integers(1, 8), st.integers(0, 2**31), st.data())
def test_unstructured_round_trip(rows: int, chunks: int, seed: int, data: st.DataObject) -> None:
    columns = 32 * chunks
    kept = data.draw(st.integers(1, columns))
    mask, weight = random_mask(rows, columns, kept, columns, seed), random_weight(rows, columns, torch.bfloat16, seed)
    values, mask_bytes = fmt.pack(weight, mask)
    if rows:
        fmt.validate(values, mask_bytes, kept, columns, columns, rows, "w")
    assert torch.equal(bits(fmt.unpack(values, mask_bytes)), bits(torch.where(mask, weight, weight.new_zeros(()))))


def test_layout_of_bits_and_values() -> None:
    weight = torch.arange(64, dtype=torch.float32).view(2, 32)
    mask = torch.zeros(2, 32, dtype=torch.bool)
    mask[0, [0, 9]] = True
    mask[1, [7, 31]] = True
    values, mask_bytes = fmt.pack(weight, mask)
    assert values.tolist() == [[0, 9], [39, 63]]
    assert mask_bytes.tolist() == [[1, 2, 0, 0], [128, 0, 0, 128]]


def test_mask_from_weight_tops_up_groups_with_too_few() -> None:
    weight = torch.zeros(1, 32)
    weight[0, [3, 4, 5]] = 1.0
    weight[0, 11] = -0.0
    mask = fmt.mask_from_weight(weight, 2, 4)
    assert mask.view(-1, 4)[:3].nonzero()[:, 1].tolist() == [0, 3, 0, 1, 0, 3]
    assert set(mask.view(-1, 4).sum(-1).tolist()) == {2}
    assert torch.equal(bits(fmt.unpack(*fmt.pack(weight, mask))), bits(weight))


@pytest.mark.parametrize(("n", "m"), [*PATTERNS, (50, 384)])
def test_mask_from_weight_finds_the_mask(n: int, m: int) -> None:
    columns = 384 if m == 384 else columns_for(m)
    mask = random_mask(4, columns, n, m)
    weight = torch.where(mask, torch.rand(4, columns) + 1, 0.0)
    assert torch.equal(fmt.mask_from_weight(weight, n, m), mask)


def test_mask_from_weight_refuses_a_full_group() -> None:
    weight = torch.zeros(3, 32)
    weight[1, 4:8] = 1.0
    with pytest.raises(PatternError, match=r"model\.w: row 1, columns 4 to 7 have 4 non-zeros"):
        fmt.mask_from_weight(weight, 2, 4, "model.w")


@pytest.mark.parametrize(
    ("n", "m", "columns"), [(2, 4, 48), (2, 4, 0), (0, 4, 32), (5, 4, 32), (2, 64, 128), (2, 5, 32)]
)
def test_geometry_that_cannot_be_packed(n: int, m: int, columns: int) -> None:
    with pytest.raises(PatternError, match="w"):
        fmt.check_geometry(n, m, columns, "w")


def test_pack_refuses() -> None:
    weight, mask = torch.rand(2, 32), torch.ones(2, 32, dtype=torch.bool)
    mask[0, 0] = False
    with pytest.raises(PatternError, match="31 to 32"):
        fmt.pack(weight, mask)
    with pytest.raises(CheckpointError, match="mask"):
        fmt.pack(weight, mask.int())
    with pytest.raises(CheckpointError, match="matrix"):
        fmt.pack(weight.double(), mask)
    with pytest.raises(PatternError, match="multiple of 32"):
        fmt.pack(weight[:, :8].contiguous(), mask[:, :8].contiguous())


@pytest.mark.parametrize("m", [4, 6, 8, 16, 32, 192])
def test_validate_names_what_is_wrong(m: int) -> None:
    n, columns = m // 2, 192
    values, mask_bytes = fmt.pack(torch.rand(3, columns), random_mask(3, columns, n, m))
    good = (n, m, columns, 3, "layer.weight")
    fmt.validate(values, mask_bytes, *good)
    broken = mask_bytes.clone()
    broken[2, 1] ^= 8
    with pytest.raises(CheckpointError, match=r"layer\.weight_mask: row 2, columns \d+ to \d+ do not keep"):
        fmt.validate(values, broken, *good)
    with pytest.raises(CheckpointError, match=r"layer\.weight_values: shape"):
        fmt.validate(values[:, :-1], mask_bytes, *good)
    with pytest.raises(CheckpointError, match=r"layer\.weight_mask: shape"):
        fmt.validate(values, mask_bytes[:2], *good)
    with pytest.raises(CheckpointError, match=r"layer\.weight_values: dtype"):
        fmt.validate(values.double(), mask_bytes, *good)
    with pytest.raises(CheckpointError, match=r"layer\.weight_mask: dtype"):
        fmt.validate(values, mask_bytes.int(), *good)


def test_unpack_refuses_a_wrong_population() -> None:
    values, mask_bytes = fmt.pack(torch.rand(3, 64), random_mask(3, 64, 2, 4))
    broken = mask_bytes.clone()
    broken[0, 0] = 255
    with pytest.raises(CheckpointError, match="values"):
        fmt.unpack(values, broken)
    for bad_values, bad_mask in (
        (values.double(), mask_bytes),
        (values, mask_bytes.float()),
        (values, mask_bytes[:, :3]),
        (values[:2], mask_bytes),
        (values, mask_bytes[0]),
    ):
        with pytest.raises(CheckpointError):
            fmt.unpack(bad_values, bad_mask)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (16, 32), (40, 128)])
@pytest.mark.parametrize(("start", "stop"), [(0, 128), (0, 64), (64, 128), (32, 96)])
def test_slice_columns(n: int, m: int, start: int, stop: int) -> None:
    weight, mask = random_weight(6, 128, torch.float16), random_mask(6, 128, n, m)
    values, mask_bytes = fmt.slice_columns(*fmt.pack(weight, mask), start, stop)
    assert values.dim() == (1 if m == 128 and stop - start < 128 else 2)
    expected = torch.where(mask, weight, weight.new_zeros(()))[:, start:stop]
    assert torch.equal(bits(fmt.unpack(values, mask_bytes)), bits(expected.contiguous()))


@pytest.mark.parametrize(("start", "stop"), [(0, 16), (-32, 32), (64, 64), (0, 160)])
def test_slice_columns_refuses(start: int, stop: int) -> None:
    values, mask_bytes = fmt.pack(torch.rand(3, 128), random_mask(3, 128, 2, 4))
    with pytest.raises(CheckpointError, match="columns"):
        fmt.slice_columns(values, mask_bytes, start, stop)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_fuzzed_pairs_are_refused_or_read(data: st.DataObject) -> None:
    shape = st.lists(st.integers(0, 9), max_size=3).map(tuple)
    dtype = st.sampled_from([*DTYPES, torch.float64, torch.uint8, torch.int32])
    values = torch.ones(data.draw(shape)).to(data.draw(dtype))
    mask_bytes = torch.full(data.draw(shape), 85).to(data.draw(dtype))
    n, m, columns, rows = (data.draw(st.integers(-1, 70)) for _ in range(4))
    try:
        fmt.unpack(values, mask_bytes)
        fmt.validate(values, mask_bytes, n, m, columns, rows, "w")
    except (CheckpointError, PatternError) as error:
        assert str(error)
