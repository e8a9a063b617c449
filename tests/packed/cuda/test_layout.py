"""Layouts for a device: reversible, and of the expected size."""

from __future__ import annotations

import pytest
import torch

from crepe_deploy.errors import CheckpointError, KernelError
from crepe_deploy.packed.cuda import semi_structured
from crepe_deploy.packed.cuda.layout import Kind, bit_planes, population, restore, to_device, words_of_planes
from crepe_deploy.packed.format import unpack_mask
from tests.packed.cuda.weights import ragged, stored
from tests.packed.test_format import bits


@pytest.mark.parametrize(
    "n, m, columns", [(2, 4, 96), (2, 4, 1152), (4, 8, 96), (16, 32, 1152), (31, 96, 96), (1, 4, 96), (3, 6, 1152)]
)
def test_restoring_is_bit_identical(n: int, m: int, columns: int) -> None:
    values, mask = stored(19, columns, n, m)
    weight = to_device(values, mask, "cpu")
    back = restore(weight)
    assert torch.equal(bits(back[0]), bits(values))
    assert torch.equal(back[1], mask)
    assert weight.kind == (Kind.NIBBLE if (n, m) == (2, 4) else Kind.MASK if 32 % m == 0 else Kind.ROWS)


def test_a_column_shard_whose_rows_differ_is_restored_flat() -> None:
    values, mask = ragged(9, 64)
    weight = to_device(values, mask, "cpu")
    assert weight.kind == Kind.ROWS
    assert torch.equal(restore(weight)[0], values)


def test_the_device_holds_what_the_file_holds() -> None:
    values, mask = stored(64, 2048, 2, 4)
    assert to_device(values, mask, "cpu").resident_bytes == values.numel() * 2 + mask.numel()
    values, mask = stored(64, 2048, 16, 32)
    assert to_device(values, mask, "cpu").resident_bytes == values.numel() * 2 + mask.numel() + 8


def test_population_counts_every_bit() -> None:
    words = torch.tensor([0, -1, 1, -(2**31), 2**31 - 1, 0x55555555], dtype=torch.int32)
    assert population(words).tolist() == [0, 32, 1, 1, 31, 16]
    words = torch.randint(-(2**31), 2**31 - 1, (1000,)).to(torch.int32)
    assert population(words).tolist() == [(word & 0xFFFFFFFF).bit_count() for word in words.tolist()]


def test_bit_planes_put_a_lane_next_to_its_lane() -> None:
    words = torch.randint(-(2**31), 2**31 - 1, (3, 40)).to(torch.int32)
    planes = bit_planes(words)
    assert planes.shape == (3, 2, 32)
    for group in (0, 5, 31, 32, 77, 255, 256, 319):
        nibble = (words[:, group // 8] >> (4 * (group % 8))) & 15
        s, t, lane = group // 256, group // 32 % 8, group % 32
        assert torch.equal((planes[:, s, lane] >> (4 * t)) & 15, nibble)
    assert torch.equal(words_of_planes(planes, 1280), words)


def test_the_mask_comes_back_from_its_bit_planes() -> None:
    _, mask = pair = stored(64, 128, 2, 4)
    assert torch.equal(semi_structured.mask_bits(to_device(*pair, "cpu")), unpack_mask(mask))


def test_cusparselts_tensor_keeps_zeros_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the library's compression: half the values in front, then metadata of its own."""
    values, mask = stored(32, 64, 2, 4)
    weight = to_device(values, mask, "cpu")
    monkeypatch.setattr(semi_structured, "misfit", lambda _: None)

    def library(dense: torch.Tensor) -> torch.Tensor:
        kept = dense[dense != 0]
        return torch.cat([kept, torch.full((kept.numel() // 8,), 7.0, dtype=dense.dtype)])

    monkeypatch.setattr(torch, "_cslt_compress", library)
    packed = semi_structured.compress(weight)
    shared = semi_structured.sharing(weight, packed)
    assert torch.equal(bits(shared.values), bits(values.reshape(-1)))
    assert shared.values.data_ptr() == packed.data_ptr()
    assert bool((packed[values.numel() :] == 7).all())
    monkeypatch.setattr(torch, "_cslt_compress", lambda dense: library(dense).flip(0))
    with pytest.raises(KernelError, match="layout"):
        semi_structured.compress(weight)


def test_what_tensor_cores_cannot_take_is_said() -> None:
    assert "only 2:4" in str(semi_structured.misfit(to_device(*stored(32, 64, 16, 32), "cpu")))
    assert "multiple of 16" in str(semi_structured.misfit(to_device(*stored(17, 64, 2, 4), "cpu")))
    assert "CUDA" in str(semi_structured.misfit(to_device(*stored(32, 64, 2, 4), "cpu")))


def test_damaged_tensors_are_refused_by_name() -> None:
    values, mask = stored(16, 64, 2, 4)
    broken = mask.clone()
    broken[3, 2] ^= 1
    for bad_values, bad_mask in (
        (values[:, :-1], mask),
        (values, broken),
        (values, mask.to(torch.int32)),
        (values[:8], mask),
        (values, mask[0]),
    ):
        with pytest.raises(CheckpointError, match=r"q\.weight"):
            to_device(bad_values, bad_mask, "cpu", "q.weight")
    with pytest.raises(KernelError, match="float32"):
        to_device(values.float(), mask, "cpu", "q.weight")
