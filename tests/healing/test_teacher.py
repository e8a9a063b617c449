"""What is kept of the dense model: the same logits to the bit, from blocks that run once for each window."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from crepe_deploy.errors import DiskFullError
from crepe_deploy.healing import teacher as rooms
from crepe_deploy.healing.teacher import Teacher, kept_windows
from crepe_deploy.model.architecture import whole_model
from tests.healing.conftest import Heal
from tests.healing.test_heal import files
from tests.model.zoo import make

FAMILIES = ("llama", "gemma2", "gpt2", "opt", "gpt_neox", "mixtral", "cohere", "granite")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_the_same_to_the_bit(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    model = whole_model(make(tmp_path / "m", family), dtype=dtype)
    tokens = torch.randint(64, (4, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
    dense = Teacher(model, tmp_path, 8)
    calls = []
    model.base_model.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(dense.logits(tokens, [3, 0, 7, 5]), expected)
    assert torch.equal(dense.logits(tokens[[2, 0, 3, 1]], [7, 3, 5, 0]).view(4, 24, -1)[1], expected.view(4, 24, -1)[0])
    once = family != "opt"  # whose head reads another module than the base, so that all of it runs each time
    assert len(calls) == (1 if once else 2)
    assert torch.equal(dense.logits(tokens, [3, 0, 7, 6]), expected) and len(calls) == (
        2 if once else 3
    )  # one of them is new
    dense.close()


def test_training_ends_with_the_same_bytes_and_reads_every_window_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, heal: Heal
) -> None:
    asked: list[int] = []
    noted: list[int] = []

    def logits(self: Teacher, tokens: Any, numbers: Any) -> Any:
        asked.extend(numbers)
        return inner(self, tokens, numbers)

    def keep(self: Teacher, output: Any, numbers: Any) -> None:
        noted.extend(numbers)
        keeping(self, output, numbers)

    inner, keeping = Teacher.logits, Teacher._keep
    monkeypatch.setattr(Teacher, "logits", logits)
    monkeypatch.setattr(Teacher, "_keep", keep)
    heal(out=tmp_path / "kept", steps=100)
    epochs = len(asked) / len(set(asked))
    assert epochs > 2 and len(noted) < 1.5 * len(set(noted)) and set(noted) == set(asked)
    monkeypatch.setattr(rooms, "MOST_BYTES", 0)
    noted.clear()
    heal(out=tmp_path / "anew", steps=100)
    assert not noted and files(tmp_path / "kept") == files(tmp_path / "anew")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["anew", "kept"]


def test_what_is_too_much_is_kept_of_the_held_out_windows_alone() -> None:
    most = rooms.MOST_BYTES
    assert [kept_windows(100, 8, most // part) for part in (100, 99, 8, 7)] == [100, 8, 8, 0]


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    class Full:
        def seek(self, place: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    model = whole_model(make(tmp_path / "m", "llama"), dtype=torch.float32)
    dense = Teacher(model, tmp_path, 8)
    dense._file = Full()  # type: ignore[assignment]
    with pytest.raises(DiskFullError, match="the disk is full"):
        dense.logits(torch.zeros(1, 8, dtype=torch.long), [0])
