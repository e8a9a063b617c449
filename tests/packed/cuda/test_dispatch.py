"""The GPU dispatcher against a fake timer: the fastest is chosen, remembered, and never taken where it cannot run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from crepe_deploy.errors import KernelError
from crepe_deploy.packed.cuda import dispatch, launch, semi_structured
from crepe_deploy.packed.cuda.dispatch import Held
from crepe_deploy.packed.cuda.linear import CudaLinear
from crepe_deploy.packed.linear import PackedLinear
from crepe_deploy.packed.tuning.measurements import Timer, Times
from tests.packed.cuda.weights import assert_product, held, stored


def timer(times: Mapping[str, float]) -> Timer:
    """Answers by the longest prefix of each name, without running anything."""

    def answer(runs: Mapping[str, Callable[[], object]]) -> Times:
        return {name: times[max((p for p in times if name.startswith(p)), key=len)] for name in runs}

    return answer


@pytest.fixture
def layer(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Held:
    """A small 2:4 weight; every candidate counts as runnable, so that nothing is interpreted while measuring."""
    monkeypatch.setattr(dispatch, "_runnable", dict)
    weight, _ = held(stored(16, 64, 2, 4))
    return Held(weight, launch.counters_for(16, "cpu"))


def test_the_fastest_is_chosen_remembered_and_forgotten(layer: Held, cache: Path) -> None:
    assert dispatch.choice_for(layer, 1).startswith("stream n16 m1 ")
    dispatch.tune(layer, (1,), timer({"stream": 2.0, "stream n64": 1.0, "expand": 9.0, "dense": 3.0}))
    chosen = dispatch.choice_for(layer, 1)
    assert chosen.startswith("stream n64 m1")
    dispatch.TUNER.reread()  # as a new process
    assert dispatch.choice_for(layer, 1) == chosen
    dispatch.tune(layer, (1,), timer({}))  # nothing is asked again
    (entry,) = dispatch.describe()
    assert (entry["shape"], entry["batch"], entry["gain_over_dense"]) == ([16, 64], 1, 3.0)
    dispatch.TUNER.forget()
    assert dispatch.describe() == []


def test_prefill_takes_sparse_cores_where_they_win_and_splits_the_best_algorithm(
    layer: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(semi_structured, "algorithms", lambda *_: [0, 1, 2])
    full = Held(layer.weight, layer.counters, torch.zeros(1))
    times = {"stream": 5.0, "tensor24": 3.0, "tensor24 a1": 2.0, "tensor24 a1 s4": 1.0, "expand": 4.0, "dense": 2.5}
    dispatch.tune(full, (2048,), timer(times))
    assert dispatch.choice_for(full, 2048) == "tensor24 a1 s4"
    assert dispatch.choice_for(layer, 2048) != "tensor24 a1 s4"  # a layer without cuSPARSELt's tensor cannot


def test_dense_only_with_a_copy_that_clearly_pays(layer: Held) -> None:
    times = {"stream": 2.0, "expand": 3.0, "dense": 1.0}
    assert dispatch.tune(layer, (256,), timer(times), keep_dense=True)
    assert not dispatch.tune(layer, (256,), timer(times))
    assert dispatch.choice_for(layer, 256).startswith("stream")
    copied = Held(layer.weight, layer.counters, None, launch.expand(layer.weight))
    assert dispatch.choice_for(copied, 256) == "dense"
    assert dispatch.TUNER.fastest({"stream n16 m1 s1 w4 p1": 1.0, "dense": 0.98}, True).startswith("stream")


def test_near_ties_go_to_what_allocates_least() -> None:
    fastest = dispatch.TUNER.fastest
    stream = "stream n16 m1 s1 w4 p1"
    assert fastest({stream: 1.02, "tensor24 a0 s1": 1.0, "expand": 1.0, "dense": 1.0}) == stream
    assert fastest({stream: 1.3, "expand": 0.5, "dense": 1.2}) == "expand"
    assert fastest({stream: 1.1, "expand": 0.5, "dense": 1.2}) == stream  # expand cannot beat its own product


def test_a_measured_block_too_small_for_this_batch_is_not_taken(layer: Held) -> None:
    index = dispatch.bucket(3)
    small, fits = "stream n16 m2 s1 w4 p1", "stream n16 m4 s1 w4 p1"
    dispatch.TUNER.remember({dispatch.key(layer.weight, index): {small: 0.1, fits: 1.0}})
    assert dispatch.choice_for(layer, 3) == fits


def test_buckets_and_rules_without_measurements(layer: Held) -> None:
    assert [dispatch.bucket(n) for n in (1, 2, 3, 64, 65, 2048, 2049, 10**6)] == [0, 1, 2, 6, 7, 11, 12, 12]
    assert dispatch.choice_for(layer, 64).startswith("stream n64 m64")
    assert dispatch.choice_for(layer, 65) == "expand"
    assert dispatch.choice_for(Held(layer.weight, layer.counters, torch.zeros(1)), 65) == "tensor24 a0 s1"
    assert not dispatch.tune(layer, (1,))  # no CUDA device, no timer: nothing is measured
    assert dispatch.TUNER.measured == {}


@pytest.mark.parametrize("times", ['{"warp": 1}', '{"stream n1": 1}', '{"tensor24 x1 s1": 1}', '{"dense": 1}', "[]"])
def test_a_damaged_or_foreign_cache_counts_as_empty(cache: Path, times: str) -> None:
    path = dispatch.TUNER.path()
    path.parent.mkdir(parents=True)
    path.write_text(f'{{"version": 1, "machine": {json.dumps(dispatch.machine())}, "times_ms": {{"k": {times}}}}}')
    assert dispatch.TUNER.measured == {}
    dispatch.TUNER.reread()
    other = dispatch.machine() | {"cusparselt": "another"}
    good = '{"expand": 1}'
    path.write_text(f'{{"version": 1, "machine": {json.dumps(other)}, "times_ms": {{"k": {good}}}}}')
    assert dispatch.TUNER.measured == {}


def test_the_module_serves_every_shape_of_input_and_gives_its_tensors_back(cache: Path) -> None:
    values, mask = stored(16, 64, 16, 32)
    _, dense = held((values, mask))
    layer = CudaLinear(values, mask, "cpu")
    bias = torch.randn(16).bfloat16()
    for shape in ((64,), (2, 64), (2, 3, 64), (0, 64)):
        x = torch.randn(shape).bfloat16()
        got = layer(x, bias)
        assert got.shape == (*shape[:-1], 16)
        if x.numel():
            assert_product(got.reshape(-1, 16), x.reshape(-1, 64), dense, bias)
    assert torch.equal(layer.to_packed()[0], values)
    assert torch.equal(layer.to_packed()[1], mask)
    assert layer.describe()["without_tensor24"]
    with pytest.raises(KernelError, match="32"):
        layer(torch.zeros(2, 32).bfloat16())


def test_torch_compile_keeps_one_graph() -> None:
    values, mask = stored(16, 64, 2, 4)
    layer = CudaLinear(values, mask, "cpu")
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: layer(x) + 1, backend=counting, fullgraph=True, dynamic=True)
    for tokens in (2, 3):
        x = torch.randn(tokens, 64).bfloat16()
        assert torch.equal(compiled(x), layer(x) + 1)
    assert len(graphs) == 1
    assert sum("nm_linear_cuda" in str(node.target) for node in graphs[0].graph.nodes) == 1


def test_a_packed_layer_runs_by_what_its_device_holds(cache: Path) -> None:
    """What `PackedLinear.prepare` does on a CUDA device, with the interpreter in its place."""
    values, mask = stored(16, 64, 2, 4)
    _, dense = held((values, mask))
    packed = PackedLinear(64, 16, False, 2, 4, torch.bfloat16)
    packed.weight_values = packed.weight_mask = None
    packed.on_device = CudaLinear(values, mask, "cpu")
    x = torch.randn(2, 64).bfloat16()
    assert packed.prepared
    assert_product(packed(x), x, dense, None)
    assert torch.equal(packed.state_dict()["weight_values"], values)
    assert packed.describe()["kind"] == "nibble"
    assert torch.equal(packed.to_dense().double(), dense)
    packed.load_state_dict({"weight_values": values * 2, "weight_mask": mask})
    assert packed.on_device is None
    assert torch.equal(packed.to_packed()[0], values * 2)
