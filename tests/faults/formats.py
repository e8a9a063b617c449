"""Spoiling files by what they are: safetensors, folders, ONNX graphs, JSON, YAML; manifests signed anew."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from random import Random
from typing import Any

from .mutate import misspell, spell, spoil_bytes, spoil_json, spoil_text

DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E8M0", "F4", "I64", "I32", "I8", "U8", "BOOL", "C64", "X", "")
_VALUES = (float("nan"), float("inf"), -float("inf"), 1e30, 3e38, 1e-45, 0.0, -0.0)


def spoil_file(path: Path, rng: Random) -> str:
    """Spoil a file in place as what its name says that it is; returns how."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        changed, how = spoil_safetensors(data, rng)
    elif path.suffix == ".onnx":
        changed, how = spoil_onnx(data, rng)
    elif path.suffix == ".gguf":
        changed, how = spoil_gguf(data, rng)
    elif path.suffix == ".parquet":
        changed, how = spoil_bytes(data, rng), "bytes"
    elif path.suffix == ".jsonl" or "journal" in path.name:
        changed, how = spoil_lines(data, rng)
    elif path.suffix in (".json", ".crepe-deploy"):
        changed, how = spoil_json_bytes(data, rng)
    elif path.suffix == ".yaml":
        changed, how = spoil_yaml(data, rng)
    else:
        changed, how = spoil_text(data, rng), "text"
    path.write_bytes(changed)
    return how


def spoil_json_bytes(data: bytes, rng: Random) -> tuple[bytes, str]:
    """JSON by its structure, sometimes by its spelling."""
    if rng.random() < 0.12:
        return misspell(data, rng), "spelling"
    try:
        document = json.loads(data)
    except ValueError:
        return spoil_bytes(data, rng), "bytes"
    return spell(spoil_json(document, rng, constants=rng.random() < 0.2)), "structure"


def spoil_lines(data: bytes, rng: Random) -> tuple[bytes, str]:
    """One line of JSON lines spoilt, or the lines themselves."""
    lines = data.splitlines()
    if rng.random() < 0.2 or not lines:
        return spoil_text(data, rng), "lines"
    which = rng.choice((0, len(lines) - 1, rng.randrange(len(lines))))
    changed, how = spoil_json_bytes(lines[which], rng)
    lines[which] = changed.replace(b"\n", b" ")
    return b"\n".join(lines) + b"\n", how


def spoil_yaml(data: bytes, rng: Random) -> tuple[bytes, str]:
    """YAML by its structure (JSON is YAML), or by its spelling."""
    import yaml

    if rng.random() < 0.6:
        return spell(spoil_json(yaml.safe_load(data), rng, constants=True)), "structure"
    text = data.decode()
    levels = rng.choice((3, 9, 30))
    bomb = "".join(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, levels))
    merge = "".join(f"b{level}: &b{level}\n  <<: [{', '.join([f'*b{level - 1}'] * 9)}]\n" for level in range(1, levels))
    added = rng.choice((
        f"a0: &a0 x\n{bomb}", f"b0: &b0 {{x: 1}}\n{merge}", "x: !!python/object/apply:os.system [id]\n", "x: &x [*x]\n",
        "? [1, 2]\n: 3\n", "1: 2\n", "x: 0x1_0\nx: 2\n", "x: 2001-01-01\n", "x: !!binary aa\n", "x: 1:30\n",
        "x: 1e400\n", "x: " + "9" * 5000 + "\n", "---\n---\n", "%YAML 9.9\n", "\t- x\n", "x: |\n", "<<: 3\n",
        "x: .inf\n", "x: !!float a\n",
    ))  # fmt: skip
    return (text + added if rng.random() < 0.7 else added + text).encode(), "spelling"


def spoil_safetensors(data: bytes, rng: Random) -> tuple[bytes, str]:
    """The header's JSON, its length, its tensors (names, shapes, dtypes, places) or their values."""
    size = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    try:
        header = json.loads(data[8 : 8 + size])
    except ValueError:
        return spoil_bytes(data, rng), "bytes"
    body = bytearray(data[8 + size :])
    names = [name for name in header if name != "__metadata__"]
    what = rng.randrange(10)
    if what == 0 or not names:
        return spoil_bytes(data, rng, reach=8 + size), "header bytes"
    if what == 1:
        changed, _ = spoil_json_bytes(data[8 : 8 + size], rng)
        return _joined(changed, bytes(body)), "header"
    if what == 2:
        length = rng.choice((0, 1, size - 1, size + 1, len(data), 2**31, 2**62, 2**64 - 1, 100_000_001))
        return struct.pack("<Q", length) + data[8:], "header length"
    if what == 3:
        return data[: rng.randrange(len(data))], "cut"
    if what == 4:
        return _joined(spell(spoil_json(header, rng)), bytes(body)), "header"
    name = rng.choice(names)
    entry = header[name]
    if what == 5:
        start, end = entry["data_offsets"]
        width = {"F32": "<f", "F64": "<d"}.get(entry["dtype"])
        if width and end - start >= 8:
            piece = struct.pack(width, rng.choice(_VALUES) if width == "<d" else min(rng.choice(_VALUES), 3e38))
            many = rng.choice((1, (end - start) // len(piece)))
            body[start : start + many * len(piece)] = piece * many
        else:
            body[start:end] = bytes([rng.choice((0, 0x7F, 0xFF, 0x80))]) * (end - start)
        return _joined(spell(header), bytes(body)), "values"
    if what == 6:
        header = {key: value for key, value in header.items() if key != name}
        body = _packed_body(header, body)
    elif what == 7:
        header[rng.choice((*names, "x", "", name + "x", name.replace("weight", "bias")))] = header.pop(name)
    elif what == 8:
        entry["shape"] = rng.choice(
            (entry["shape"][::-1], [*entry["shape"], 1], [_total(entry)], [], [0], [2, *entry["shape"]])
        )
    else:
        entry["dtype"] = rng.choice(DTYPES)
    return _joined(spell(header), bytes(body)), "tensor"


def _packed_body(header: dict[str, Any], body: bytearray) -> bytearray:
    """The values of the tensors that are left, without holes, so that the file stays a valid one."""
    moved = bytearray()
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            entry["data_offsets"] = [len(moved), len(moved) + end - start]
            moved += body[start:end]
    return moved


def _total(entry: dict[str, Any]) -> int:
    total = 1
    for size in entry["shape"]:
        total *= size
    return total


def _joined(header: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + body


def spoil_gguf(data: bytes, rng: Random) -> tuple[bytes, str]:
    """Bytes of the head, the place of a known name, or a cut."""
    keys = (b"llama.", b"tokenizer.ggml", b"blk.", b"token_embd", b"general.", b"split.", b"output_norm")
    found = [where for key in keys if (where := data.find(key)) >= 0]
    if not found or rng.random() < 0.4:
        return spoil_bytes(data, rng, reach=rng.choice((64, 8192, len(data)))), "bytes"
    changed, where = bytearray(data), rng.choice(found)
    where += rng.randrange(-8, 80)
    size = rng.choice((1, 4, 8))
    number = rng.choice((0, 1, 2, 9, 200, 2**31, 2**32 - 1, 2**64 - 1)) % (1 << 8 * size)
    changed[where : where + size] = number.to_bytes(size, "little")
    return bytes(changed), "metadata"


def spoil_onnx(data: bytes, rng: Random) -> tuple[bytes, str]:
    """Nodes, inputs, shapes and constants of a graph; or bytes of its head."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_model_from_string(data)
    except (DecodeError, ValueError):
        return spoil_bytes(data, rng), "bytes"
    graph = model.graph
    what = rng.randrange(8)
    if what == 0 or not graph.node:
        return spoil_bytes(data, rng, reach=4096), "bytes"
    node = rng.choice(graph.node)
    if what == 1:
        graph.node.remove(node)
    elif what == 2:
        node.op_type = rng.choice(("MatMul", "Add", "Loop", "If", "Nothing", "", "Reshape"))
    elif what == 3 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(
            ("", "x", *(other.output[0] for other in graph.node[:4]))
        )
    elif what == 4 and graph.initializer:
        tensor = rng.choice(graph.initializer)
        tensor.dims[:] = rng.choice(([], [0], [-1], [1 << 40], list(tensor.dims) * 2))
    elif what == 5 and graph.initializer:
        tensor = rng.choice(graph.initializer)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        place = rng.choice(("/etc/passwd", "../../in/config.json", "x", "", "/dev/zero", "config.json"))
        for key, value in (("location", place), ("offset", "0"), ("length", str(rng.choice((0, 8, 1 << 40))))):
            tensor.external_data.add(key=key, value=value)
    elif what == 6:
        part = rng.choice((graph.input, graph.output))
        if part:
            del part[rng.randrange(len(part))]
    else:
        model.ir_version = rng.choice((0, 1, 99, 2**31))
        del model.opset_import[:]
    return model.SerializeToString(), "graph"


def spoil_folder(root: Path, rng: Random) -> str:
    """A file dropped, emptied, made a folder, a link, a FIFO or a device; a stranger's file added."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    path = rng.choice(files)  # never what a first spoiling made a link: it may lead to a file of this machine
    what = rng.randrange(12)
    if what in (0, 1, 2, 3, 4, 5, 6):
        path.unlink()
    if what == 0:
        return f"{path.name} missing"
    if what == 1:
        path.write_bytes(b"")
    elif what == 2:
        path.mkdir()
    elif what == 3:
        path.symlink_to(rng.choice(("/etc/passwd", "/nowhere", path.name, "..", "/dev/zero", "/proc/self/mem")))
    elif what == 4:
        os.mkfifo(path)
    elif what == 5:
        os.mknod(path, 0o666 | 0o020000, os.makedev(1, 5))  # /dev/zero
    elif what == 6:
        path.symlink_to(rng.choice(files))
    elif what == 7:
        path.chmod(0)
    elif what == 8:
        other = path.with_name(rng.choice(("x" * 255, "a\nb", "model.safetensors", "x.py", "pytorch_model.bin")))
        if other in files or not os.path.lexists(other):
            other.write_bytes(path.read_bytes())
    elif what == 9:
        with path.open("ab") as file:
            file.truncate(rng.choice((path.stat().st_size // 2, path.stat().st_size + 1, 300 << 20)))
    elif what == 10:
        (root / rng.choice(("empty", "lineage", "onnx", ".git", "a" * 250))).mkdir(exist_ok=True)
    else:
        other = rng.choice(files)
        data = other.read_bytes()
        other.write_bytes(path.read_bytes())
        path.write_bytes(data)
    return f"{path.name}: {what}"


def sign(root: Path) -> None:
    """Write the hashes of the folder's files into its manifest, as who wants to be believed does."""
    place = root / "manifest.json"
    try:
        manifest = json.loads(place.read_bytes())
        for name in list(manifest["files"]):
            path = root / name
            if path.is_file() and not path.is_symlink() and path.stat().st_size < (64 << 20):
                manifest["files"][name] = hashlib.sha256(path.read_bytes()).hexdigest()
        place.write_bytes(spell(manifest))
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError):
        return  # nothing to sign: that is an input too
