"""Split GGUF files, `NAME-00001-of-00003.gguf` and so on: every part found and checked, and joined into one file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from crepe_deploy.errors import CheckpointError

from .files import disk_errors, require_disk

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_OWN = "GGUF."  # what the reader calls the header's own fields


def parts_of(path: Path) -> list[Path]:
    """The parts, in order, of the split file that `path` by its name is one of; of any other, itself.

    Raises CheckpointError naming the parts that do not lie beside it.
    """
    name = _PART.fullmatch(path.name)
    if name is None:
        return [path]
    count = int(name["count"])
    if not 1 <= int(name["number"]) <= count:
        raise CheckpointError(f"{path}: its name says that it is part {int(name['number'])} of {count}")
    parts = [path.with_name(f"{name['stem']}-{number:05d}-of-{name['count']}.gguf") for number in range(1, count + 1)]
    absent = [part.name for part in parts if not part.is_file()]
    if absent:
        shown = ", ".join(absent[:3]) + (f" and {len(absent) - 3} more" if len(absent) > 3 else "")
        raise CheckpointError(f"{path} is one of {count} parts of a model, and {shown} is not beside it")
    return parts


def check_parts(parts: list[Path], readers: list[Any]) -> None:
    """Raise CheckpointError unless these open files are each other's parts, all of them, and hold no tensor twice."""
    seen: dict[str, Path] = {}
    for number, (part, reader) in enumerate(zip(parts, readers, strict=True)):
        count = _number(reader, "split.count")
        if count is None and len(parts) == 1:
            continue
        if count != len(parts) and len(parts) == 1:
            raise CheckpointError(
                f"{part} is part {(_number(reader, 'split.no') or 0) + 1} of {count}: give all parts their names back, "
                f"{part.stem}-00001-of-{count:05d}.gguf and so on, in one folder"
            )
        if count != len(parts) or _number(reader, "split.no") != number:
            raise CheckpointError(f"{part} does not say of itself that it is part {number + 1} of {len(parts)}")
        for tensor in reader.tensors:
            if tensor.name in seen:
                raise CheckpointError(f"{part}: tensor '{tensor.name}' is also in {seen[tensor.name].name}")
            seen[tensor.name] = part
    whole = _number(readers[0], "split.tensors.count")
    if len(parts) > 1 and whole is not None and whole != len(seen):
        raise CheckpointError(f"{parts[0]}: its parts hold {len(seen)} tensors and it says that they hold {whole}")


def join(parts: list[Path], target: Path) -> None:
    """Write the parts as one GGUF file, with the first one's fields. Raises DiskFullError, CheckpointError."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    require_disk(target, sum(part.stat().st_size for part in parts))
    readers = [GGUFReader(str(part)) for part in parts]
    fields = readers[0].fields
    writer = GGUFWriter(str(target), str(fields["general.architecture"].contents()))
    for name, field in fields.items():
        if name.startswith((_OWN, "split.")) or name == "general.architecture":
            continue
        array = field.types[0] == GGUFValueType.ARRAY
        writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if array else None)
    for tensor in (tensor for reader in readers for tensor in reader.tensors):
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    with disk_errors(target):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _number(reader: Any, key: str) -> int | None:
    field = reader.fields.get(key)
    return None if field is None else int(field.contents())
