"""PackedLinear: a checkpoint's names in and out, the memory of the file, one graph under torch.compile."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from crepe_deploy.errors import CheckpointError, ConfigError, KernelError, PatternError
from crepe_deploy.packed.format import pack
from crepe_deploy.packed.linear import PackedLinear, check_loaded
from tests.packed.test_format import bits, random_mask


def stored(rows: int = 48, columns: int = 128, n: int = 2, m: int = 4) -> tuple[Tensor, Tensor]:
    return pack(torch.randn(rows, columns).bfloat16(), random_mask(rows, columns, n, m))


def layer(bias: bool = True) -> PackedLinear:
    return PackedLinear.from_packed(*stored(), 2, 4, torch.randn(48).bfloat16() if bias else None)


@pytest.mark.parametrize("bias", [True, False])
def test_forward_equals_dense(bias: bool) -> None:
    packed = layer(bias)
    dense = packed.to_dense().float()
    for shape in ((128,), (3, 128), (2, 5, 128)):
        x = torch.randn(shape).bfloat16()
        expected = nn.functional.linear(x.float(), dense, None if packed.bias is None else packed.bias.float())
        torch.testing.assert_close(packed(x).float(), expected, rtol=1e-2, atol=1e-2)


def test_a_checkpoint_goes_in_and_comes_out() -> None:
    values, mask_bytes = stored()
    state = {"weight_values": values, "weight_mask": mask_bytes, "bias": torch.randn(48).bfloat16()}
    packed = PackedLinear(128, 48, True, 2, 4, torch.bfloat16)
    assert set(packed.state_dict()) == set(state)
    packed.load_state_dict(state)
    check_loaded(packed, "w")
    before = packed(torch.ones(1, 128).bfloat16())
    assert packed.prepared
    assert {name for name, _ in packed.named_parameters()} == {"bias"}
    for name, tensor in packed.state_dict().items():
        assert torch.equal(tensor, state[name])
    other = {**state, "weight_values": values * 2}
    packed.load_state_dict(other)
    assert not packed.describe()["prepared"]
    assert torch.equal(packed.to_packed()[0], values * 2)
    after = packed(torch.ones(1, 128).bfloat16())
    assert not torch.equal(before, after)


def test_prepare_drops_the_stored_tensors() -> None:
    packed = layer(bias=False)
    held = [t for t in (*packed.parameters(), *packed.buffers()) if t is not None]
    size = sum(t.numel() * t.element_size() for t in held)
    assert size == packed.describe()["resident_bytes"]
    assert size <= 0.5625 * 48 * 128 * 2 + 512
    assert packed.weight_values is None


def test_meta_device_then_loading() -> None:
    packed = PackedLinear(128, 48, False, 2, 4, torch.bfloat16, "meta")
    assert packed.weight_values is not None
    assert packed.weight_values.is_meta
    with pytest.raises(KernelError, match="meta"):
        packed.prepare()
    values, mask_bytes = stored()
    packed.load_state_dict({"weight_values": values, "weight_mask": mask_bytes}, assign=True)
    assert torch.equal(packed.to_dense(), PackedLinear.from_packed(values, mask_bytes, 2, 4).to_dense())


def test_copies_and_pickles() -> None:
    packed = layer()
    x = torch.randn(2, 128).bfloat16()
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    for other in (copy.deepcopy(packed), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), packed(x))


def test_round_trip_is_bit_identical() -> None:
    values, mask_bytes = stored(50, 96, 31, 96)
    packed = PackedLinear.from_packed(values, mask_bytes, 31, 96)
    back = packed.to_packed()
    assert torch.equal(bits(back[0]), bits(values))
    assert torch.equal(back[1], mask_bytes)


def test_refusals() -> None:
    values, mask_bytes = stored()
    with pytest.raises(PatternError):
        PackedLinear(100, 48, False, 2, 4)
    with pytest.raises(ConfigError, match="keep_dense"):
        PackedLinear(128, 48, False, 2, 4, keep_dense="always")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"q\.weight"):
        PackedLinear.from_packed(values, mask_bytes, 1, 4, name="q.weight")
    wrong = PackedLinear(128, 48, False, 2, 4, torch.bfloat16)
    wrong.load_state_dict({"weight_values": values, "weight_mask": torch.zeros_like(mask_bytes)})
    with pytest.raises(CheckpointError, match=r"q\.weight"):
        check_loaded(wrong, "q.weight")
    with pytest.raises(CheckpointError, match=r"q\.weight"):
        wrong.prepare("q.weight")
    packed = layer()
    for x in (torch.randn(2, 64).bfloat16(), torch.randn(2, 128)):
        with pytest.raises(KernelError):
            packed(x)


def test_torch_compile_keeps_one_graph_with_a_dynamic_batch() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = PackedLinear.from_packed(*stored(128, 128), 2, 4)
            self.second = layer()

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.second(torch.relu(self.first(x)))) + 1

    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    block = Block()
    compiled = torch.compile(block, backend=counting, fullgraph=True, dynamic=True)
    for tokens in (2, 3, 17, 100):
        x = torch.randn(tokens, 128).bfloat16()
        assert torch.equal(compiled(x), block(x))
    assert len(graphs) == 1
    names = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("nm_linear" in name for name in names) == 2


def test_moving_to_another_device_goes_through_the_stored_tensors() -> None:
    packed = layer()
    values, _ = packed.to_packed()
    packed.to("cpu")
    assert packed.prepared
    moved = copy.deepcopy(packed).to("meta")
    assert not moved.prepared
    assert moved.weight_values is not None
    assert moved.weight_values.shape == values.shape
