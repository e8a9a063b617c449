"""The one way in for files that others wrote: regular files only, bounded in size, depth and the length of numbers.

Every JSON and YAML document and every text is read through here, so that a hostile or damaged one is refused by a
message that names it, in the error class that its reader passes as `error`. Weights have `checkpoint.py`.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Hashable, Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, Final

import yaml

from crepe_deploy.errors import CheckpointError, CrepeError

DOCUMENT_BYTES: Final = 256 << 20
YAML_BYTES: Final = 1 << 20
YAML_NODES: Final = 100_000
DEPTH: Final = 100
DIGITS: Final = 100
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

Error = type[CrepeError]


def open_file(path: Path, error: Error = CheckpointError) -> BufferedReader:
    """Open a regular file, links followed, for reading; never waits, as opening a FIFO would. Raises `error`."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as cause:
        raise error(f"{path} is missing") from cause
    except (OSError, ValueError) as cause:  # ValueError: a NUL in the name
        raise error(f"{path} cannot be read: {getattr(cause, 'strerror', None) or cause}") from cause
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise error(f"{path} is not a regular file")
    return os.fdopen(handle, "rb")


def refuse_lost_link(path: Path, error: Error = CheckpointError) -> None:
    """Raise `error` where a path is, or lies behind, a link that leads nowhere or in a circle: no name of a hub's."""
    for place in (path, *path.parents):
        if os.path.islink(place) and not os.path.exists(place):  # noqa: PTH110, PTH114 - these raise nothing
            raise error(f"{path} cannot be read: {place} is a link that leads nowhere")


def refuse_folder_of_models(root: Path) -> None:
    """Raise CheckpointError naming them where a folder is no model but holds some, as of `prune-and-export`."""
    inner = [] if (root / "config.json").exists() else sorted(str(found.parent) for found in root.glob("*/config.json"))
    if inner:
        raise CheckpointError(f"{root} is no model, it holds {len(inner)}: name {' or '.join(inner)}")


def is_folder(path: Path) -> bool:
    """Whether there is a folder at a path; at a name that the system does not take there is none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def read_bytes(path: Path, error: Error = CheckpointError, limit: int = DOCUMENT_BYTES) -> bytes:
    """A whole file of at most `limit` bytes. Raises `error`."""
    with open_file(path, error) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            data = file.read(min(size, limit) + 1)  # which allocates as much at once
        except OSError as cause:
            raise error(f"{path} cannot be read: {cause.strerror or cause}") from cause
    if len(data) > limit:
        raise error(f"{path} has {max(size, len(data))} bytes; at most {limit} are read of a file of this kind")
    return data


def read_text(path: Path, error: Error = CheckpointError, limit: int = DOCUMENT_BYTES) -> str:
    """A UTF-8 file, a leading byte order mark left out. Raises `error`."""
    return decode(read_bytes(path, error, limit), path, error)


def decode(data: bytes, place: object, error: Error = CheckpointError) -> str:
    """UTF-8 as text, a leading byte order mark left out; place: what the message names. Raises `error`."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise error(
            f"{place} is not UTF-8: byte {data[cause.start]:#04x} at offset {cause.start}; convert it to UTF-8"
        ) from cause


def read_json(path: Path, error: Error = CheckpointError, *, lenient: bool = False) -> Any:
    """A JSON document; see `parse_json`. Raises `error`."""
    return parse_json(read_bytes(path, error), path, error, lenient=lenient)


def read_object(path: Path, error: Error = CheckpointError, *, lenient: bool = False) -> dict[str, Any]:
    """A JSON document that is an object; see `parse_json`. Raises `error`."""
    content = read_json(path, error, lenient=lenient)
    if not isinstance(content, dict):
        raise error(f"{path} does not hold a JSON object")
    return content


def parse_json(data: bytes | str, place: object, error: Error = CheckpointError, *, lenient: bool = False) -> Any:
    """JSON by RFC 8259 with names given once, at most DEPTH levels and numbers of at most DIGITS digits.

    place: what the message names. lenient: for files of other libraries, which write NaN and Infinity and of equal
    names take the last. Raises `error`.
    """
    text = decode(data, place, error) if isinstance(data, bytes) else data
    if lenient:
        hooks: dict[str, Any] = {}
    else:
        hooks = {"object_pairs_hook": _unique, "parse_constant": _no_constant, "parse_float": _finite}
    try:
        content = json.loads(text, parse_int=_whole, **hooks)
        _check_depth(content)
        if _ESCAPED_SURROGATE.search(text):
            _check_texts(content)
    except ValueError as cause:
        raise error(f"{place} is not JSON that can be read, perhaps cut short: {cause}") from cause
    except RecursionError as cause:
        raise error(f"{place} is nested deeper than {DEPTH} levels") from cause
    return content


def parse_value(text: str) -> Any:
    """The value that a person wrote behind an equals sign: as JSON where it is JSON, else the text itself."""
    try:
        return parse_json(text, "the value")
    except CheckpointError:
        return text


def read_yaml(path: Path, error: Error = CheckpointError) -> Any:
    """A YAML document; see `parse_yaml`. Raises `error`."""
    return parse_yaml(read_text(path, error, YAML_BYTES), path, error)


def parse_yaml(text: str, place: object, error: Error = CheckpointError) -> Any:
    """YAML that says what JSON can say: names are texts and given once, numbers are finite, no tags.

    Aliases may not make more than YAML_NODES nodes of it. place: what the message names. Raises `error`.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_size(node)
            content = loader.construct_document(node)
        finally:
            loader.dispose()
        _check_depth(content)
        _check_texts(content)
    except (yaml.YAMLError, ValueError) as cause:
        raise error(f"{place} is not YAML that can be read: {' '.join(str(cause).split())}") from cause
    except RecursionError as cause:
        raise error(f"{place} is nested deeper than {DEPTH} levels") from cause
    return content


def read_front_matter(path: Path, error: Error = CheckpointError) -> dict[str, Any]:
    """What stands between the two lines `---` at the top of a model card, every value as text; {} where nothing does.

    Cards are written by many tools, so a front matter that is no YAML counts as none. Raises `error`.
    """
    text = read_bytes(path, error)[:YAML_BYTES].decode("utf-8", errors="replace")
    front = re.match(r"^---\n(.*?)\n---", text, re.DOTALL)
    try:  # this loader knows neither merges nor types, so that nothing in it grows
        content = yaml.load(front.group(1), Loader=yaml.BaseLoader) if front else None  # noqa: S506
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML's safe types less those that JSON has not, names unique."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping; ConstructorError where a name is no text, or is given twice outside a merge."""
        names = [self.construct_object(key, deep=True) for key, _ in node.value if not key.tag.endswith(":merge")]
        for name in names:
            if not isinstance(name, str):
                raise yaml.constructor.ConstructorError(None, None, f"the name {name!r} is no text", node.start_mark)
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"'{twice}' is given twice", node.start_mark)
        return dict(super().construct_mapping(node, deep=deep))

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """A number, short and finite."""
        if len(node.value) > DIGITS:
            raise ValueError(f"a number of {len(node.value)} digits")
        whole = node.tag.endswith(":int")
        number: int | float = self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)
        if not math.isfinite(number):
            raise ValueError(f"the number {node.value}")
        return number


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)
for _tag in ("timestamp", "binary", "set", "omap", "pairs"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", yaml.SafeLoader.construct_undefined)


def _check_size(root: yaml.Node) -> None:
    """Count the nodes with every alias written out, each node once. Raises ValueError."""
    sizes: dict[int, int] = {}
    pending: list[tuple[yaml.Node, bool]] = [(root, False)]
    while pending:
        node, ready = pending.pop()
        if ready:
            sizes[id(node)] = 1 + sum(sizes[id(part)] for part in _parts(node))
            if sizes[id(node)] > YAML_NODES:
                raise ValueError(f"its aliases make more than {YAML_NODES} values of it")
        elif id(node) not in sizes:
            sizes[id(node)] = 0  # an alias of a node within itself counts nothing here, and is refused by the depth
            pending += [(node, True), *((part, False) for part in _parts(node))]


def _parts(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(name for name in names if names.count(name) > 1)}' is given twice")
    return content


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text[:20]} is too large")
    return number


def _whole(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _check_depth(content: Any) -> None:
    """Raise RecursionError where containers nest deeper than DEPTH."""
    level: list[Any] = [content]
    for _ in range(DEPTH):
        level = [part for whole in level for part in _contents(whole) if isinstance(part, dict | list)]
        if not level:
            return
    raise RecursionError


def _check_texts(content: Any) -> None:
    """Raise ValueError where a text is none that UTF-8 can hold."""
    pending = [content]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            value.encode()
        elif isinstance(value, dict):
            pending += [*value, *value.values()]
        elif isinstance(value, list):
            pending += value


def _contents(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
