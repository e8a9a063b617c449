"""Every kernel of every instruction set this machine has, against fp64 on the unpacked weight.

The bound: with a = sum |x||w| + |bias| and u the output's unit roundoff, |y - exact| <= u (|exact| + a g) + a g where
g = (K + 2) 2^-24 is what fp32 accumulation of K products may lose, in any order.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crepe_deploy.errors import CheckpointError, KernelError
from crepe_deploy.packed import dispatch, native, ops
from crepe_deploy.packed.format import pack, slice_columns, unpack
from crepe_deploy.packed.prepare import PAD, Prepared, expand, prepare, restore
from tests.packed.test_format import DTYPES, bits, random_mask, random_weight

ISAS = [isa for isa in native.ISAS if isa in (*native.load().supported, native.TORCH_ISA)]
CHOICES = ("auto", "stream", "tile", "expand")
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


def use(isa: str) -> None:
    native.load().use(isa)


def plan_of(choice: str) -> Tensor:
    return torch.full((dispatch.BUCKETS,), dispatch.CHOICES[choice], dtype=torch.int8)


def assert_close(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    exact = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    lost = (x.shape[-1] + 2) * 2.0**-24 * size
    bound = UNIT[y.dtype] * (exact.abs() + lost) + lost + 2.0**-24
    assert y.dtype == x.dtype
    assert torch.all((y.double() - exact).abs() <= bound), f"off by {((y.double() - exact).abs() / bound).max():.2f}"


def case(rows: int, columns: int, kept: int, group: int, dtype: torch.dtype) -> tuple[Prepared, Tensor]:
    weight, mask = random_weight(rows, columns, dtype, rows), random_mask(rows, columns, kept, group, columns)
    return prepare(*pack(weight, mask)), torch.where(mask, weight, weight.new_zeros(()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != native.TORCH_ISA])
@pytest.mark.parametrize(
    ("rows", "columns", "kept", "group"),
    [(37, 96, 2, 4), (16, 32, 5, 32), (66, 1024, 300, 1024), (130, 288, 5, 12), (1, 64, 1, 2)],
)
def test_kernels_match_fp64(rows: int, columns: int, kept: int, group: int, isa: str, dtype: torch.dtype) -> None:
    use(isa)
    weight, dense = case(rows, columns, kept, group, dtype)
    assert torch.equal(bits(ops.nm_expand(weight)), bits(dense))
    bias = torch.randn(rows).to(dtype)
    for choice in CHOICES:
        for tokens in (1, 2, 3, 4, 5, 16, 17, 33, 49, 65):
            x = torch.randn(tokens, columns).to(dtype)
            assert_close(ops.nm_linear(x, weight, plan_of(choice), bias), x, dense, bias)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_shape_matches_fp64(data: st.DataObject) -> None:
    use(data.draw(st.sampled_from([isa for isa in ISAS if isa != native.TORCH_ISA])))
    torch.set_num_threads(data.draw(st.integers(1, 4)))
    group = data.draw(st.sampled_from([2, 3, 4, 8, 12, 16, 32]))
    columns = 32 * (group if group in (3, 12) else 1) * data.draw(st.integers(1, 4))
    group = columns if data.draw(st.booleans()) else group
    weight, dense = case(
        data.draw(st.integers(1, 70)),
        columns,
        data.draw(st.integers(1, group)),
        group,
        data.draw(st.sampled_from(DTYPES)),
    )
    bias = torch.randn(weight.out_features).to(dense.dtype) if data.draw(st.booleans()) else None
    x = torch.randn(data.draw(st.integers(1, 80)), columns).to(dense.dtype)
    assert_close(ops.nm_linear(x, weight, plan_of(data.draw(st.sampled_from(CHOICES))), bias), x, dense, bias)


@pytest.mark.parametrize("choice", ["stream", "tile"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(choice: str, dtype: torch.dtype) -> None:
    weight, _ = case(300, 256, 16, 32, dtype)
    for tokens in (1, 7, 40, 130):
        x = torch.randn(tokens, 256).to(dtype)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.nm_linear(x, weight, plan_of(choice)))
        assert all(torch.equal(results[0], other) for other in results[1:])


def test_long_prefill_spans_blocks_of_tokens_and_rows() -> None:
    weight, dense = case(540, 1056, 16, 32, torch.bfloat16)
    x = torch.randn(1100, 1056).to(torch.bfloat16)
    for choice in ("auto", "tile", "expand"):
        assert_close(ops.nm_linear(x, weight, plan_of(choice)), x, dense, None)


@pytest.mark.parametrize(("rows", "columns", "tokens"), [(40, 8480, 64), (40, 8480, 50), (1100, 17408, 30)])
def test_wide_inputs_are_split_into_blocks_of_columns(rows: int, columns: int, tokens: int) -> None:
    piece, mask = random_weight(10, columns, torch.bfloat16), random_mask(10, columns, 2, 4)
    values, mask_bytes = pack(piece, mask)
    weight = prepare(values.repeat(rows // 10, 1), mask_bytes.repeat(rows // 10, 1))
    x = torch.randn(tokens, columns).bfloat16()
    y = ops.nm_linear(x, weight, plan_of("tile"))
    assert_close(y[:, -10:], x, torch.where(mask, piece, piece.new_zeros(())), None)
    assert torch.equal(y, y[:, :10].repeat(1, rows // 10))


def test_input_shapes() -> None:
    weight, dense = case(20, 64, 2, 4, torch.float32)
    for shape in ((64,), (0, 64), (2, 0, 64), (2, 3, 64)):
        x = torch.randn(shape)
        y = ops.nm_linear(x, weight, plan_of("auto"))
        assert y.shape == (*shape[:-1], 20)
        assert_close(y, x, dense, None)
    strided = torch.randn(64, 6).T
    assert_close(ops.nm_linear(strided, weight, plan_of("stream")), strided, dense, None)


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != native.TORCH_ISA])
def test_extreme_values(isa: str) -> None:
    """Zeros of both signs, infinities and NaN behave as in a dense product with the zeros written out."""
    use(isa)
    for dtype in DTYPES:
        weight, dense = case(9, 64, 1, 2, dtype)
        x = torch.ones(3, 64, dtype=dtype)
        x[0, 3], x[1, 5], x[2] = torch.inf, torch.nan, 0.0
        for choice in ("stream", "tile"):
            y = ops.nm_linear(x, weight, plan_of(choice)).double()
            expected = x.double() @ dense.double().T
            assert torch.equal(y.isnan(), expected.isnan())
            assert torch.equal(y.isinf(), expected.isinf())
            assert torch.all(y[2] == 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "kept", "group"), [(37, 2, 4), (4, 16, 32), (21, 100, 192), (0, 1, 2)])
def test_layout_is_reversible_and_the_same_without_a_compiler(
    rows: int, kept: int, group: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, mask = random_weight(rows, 192, dtype), random_mask(rows, 192, kept, group)
    if not rows:
        weight, mask = weight.new_empty(0, 192), torch.empty(0, 192, dtype=torch.bool)
    stored = pack(weight, mask)
    first = prepare(*stored)
    monkeypatch.setattr("crepe_deploy.packed.prepare.backend", lambda: native.Backend("torch", "test", None))
    second = prepare(*stored)
    for one, other in zip(first[:3], second[:3], strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    plain = restore(second)
    monkeypatch.undo()
    for one, other in zip(restore(first), plain, strict=True):
        assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    if rows:
        assert torch.equal(bits(plain[0]), bits(stored[0]))
        assert torch.equal(plain[1], stored[1])
    assert torch.equal(bits(expand(first)), bits(unpack(*stored)))


def test_kernel_layout_takes_the_bytes_of_the_file() -> None:
    values, mask_bytes = pack(torch.randn(512, 1024).bfloat16(), random_mask(512, 1024, 2, 4))
    weight = prepare(values, mask_bytes)
    size = sum(t.numel() * t.element_size() for t in weight[:3])
    assert size <= 0.5625 * 512 * 1024 * 2 + 2 * PAD + 8 * (512 // 4 + 1)


def test_column_shards_of_unstructured_rows() -> None:
    stored = pack(torch.randn(30, 256).bfloat16(), random_mask(30, 256, 100, 256))
    dense = unpack(*stored)
    x = torch.randn(5, 256).bfloat16()
    for start, stop in ((0, 128), (128, 256), (96, 160)):
        shard = slice_columns(*stored, start, stop)
        weight = prepare(*shard)
        assert torch.equal(restore(weight)[0].reshape(-1), shard[0].reshape(-1))
        part = x[:, start:stop].contiguous()
        for choice in CHOICES:
            assert_close(ops.nm_linear(part, weight, plan_of(choice)), part, dense[:, start:stop], None)


Breaker = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
BREAKERS: dict[str, Breaker] = {
    "more bits": lambda v, m: (v, torch.full_like(m, 255)),
    "fewer bits": lambda v, m: (v, torch.zeros_like(m)),
    "one bit moved to another row": lambda v, m: (v, torch.cat([m[:1] | 255, m[1:] & 0])),
    "values too short": lambda v, m: (v[:, :-1], m),
    "rows missing": lambda v, m: (v[:-1], m),
    "dtype": lambda v, m: (v.double(), m),
    "mask dtype": lambda v, m: (v, m.int()),
    "mask width": lambda v, m: (v, m[:, :3]),
    "mask rank": lambda v, m: (v, m[0]),
    "no columns": lambda v, m: (v, m[:, :0]),
}


@pytest.mark.parametrize("breaker", BREAKERS)
def test_prepare_refuses(breaker: str) -> None:
    stored = pack(torch.randn(6, 64), random_mask(6, 64, 2, 4))
    with pytest.raises(CheckpointError, match=r"some\.weight"):
        prepare(*BREAKERS[breaker](*stored), name="some.weight")


def test_prepare_refuses_other_devices() -> None:
    with pytest.raises(KernelError, match="meta"):
        prepare(torch.empty(2, 16, device="meta"), torch.empty(2, 4, dtype=torch.uint8, device="meta"))


def test_the_operator_refuses_what_does_not_fit() -> None:
    weight, _ = case(10, 64, 2, 4, torch.bfloat16)
    x, plan = torch.randn(3, 64).bfloat16(), plan_of("auto")
    bad: list[tuple[Tensor, Prepared, Tensor, Tensor | None]] = [
        (x[:, :32], weight, plan, None),
        (x.float(), weight, plan, None),
        (x, weight._replace(values=weight.values[:10]), plan, None),
        (x, weight._replace(values=weight.values.double()), plan, None),
        (x, weight._replace(values=weight.values[::2]), plan, None),
        (x, weight._replace(mask=weight.mask[:-1]), plan, None),
        (x, weight._replace(mask=weight.mask.long()), plan, None),
        (x, weight._replace(offsets=weight.offsets[:-1]), plan, None),
        (x, weight._replace(offsets=weight.offsets.int()), plan, None),
        (x, weight._replace(out_features=-1), plan, None),
        (x, weight, plan[:3], None),
        (x, weight, plan.int(), None),
        (x, weight, plan, torch.zeros(9).bfloat16()),
        (x, weight, plan, torch.zeros(10)),
    ]
    for arguments in bad:
        with pytest.raises(KernelError):
            ops.nm_linear(*arguments)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_weights_never_crash(data: st.DataObject) -> None:
    """Masks and offsets of any content are read within bounds: an answer or a KernelError, never a fault."""
    use(data.draw(st.sampled_from([isa for isa in ISAS if isa != native.TORCH_ISA])))
    weight, _ = case(
        data.draw(st.integers(1, 40)), 32 * data.draw(st.integers(1, 6)), 1, 2, data.draw(st.sampled_from(DTYPES))
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    if data.draw(st.booleans()):
        weight.mask.random_(-(2**31), 2**31 - 1, generator=generator)
    if data.draw(st.booleans()):
        weight.offsets.random_(-(2**40), 2**40, generator=generator)
    if data.draw(st.booleans()):
        weight = weight._replace(values=weight.values[: data.draw(st.integers(PAD, weight.values.numel()))])
    x = torch.randn(data.draw(st.integers(1, 70)), weight.in_features).to(weight.values.dtype)
    calls: list[Callable[[], object]] = [
        lambda: ops.nm_linear(x, weight, plan_of(data.draw(st.sampled_from(CHOICES)))),
        lambda: ops.nm_expand(weight),
        lambda: restore(weight),
        lambda: expand(weight),
    ]
    for call in calls:
        try:
            call()
        except KernelError as error:
            assert str(error)


def test_the_operator_is_well_formed() -> None:
    weight, _ = case(10, 64, 2, 4, torch.bfloat16)
    x = torch.randn(3, 64).bfloat16()
    arguments = (x, *weight[:3], plan_of("stream"), torch.zeros(10).bfloat16(), None, 10)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.crepe_deploy.nm_linear.default, arguments, test_utils=tests)
    torch.library.opcheck(torch.ops.crepe_deploy.nm_expand.default, (*weight,), test_utils=tests)
