"""The `quantization_config` of a packed checkpoint: its pattern, and which linear layers stay dense.

    {"quant_method": "crepe_nm", "version": 1, "n": 2, "m": 4, "ignore": ["lm_head"]}
    {"quant_method": "crepe_nm", "version": 1, "n": null, "m": "in", "sparsity": 0.5, "ignore": [...]}

The second is unstructured: of `in` columns every row keeps `in - floor(in * sparsity)`. `ignore` names modules.
Where modules differ the version is 2, and `overrides` gives those that do not follow the common pattern their own:

    {"quant_method": "crepe_nm", "version": 2, "n": 16, "m": 32, "overrides": {"P": {"n": 12, "m": 32}}, "ignore": []}

Where kept weights are codes with scales the version is 3, with or without overrides. Sparsity 0 is then no mask:

    {"quant_method": "crepe_nm", "version": 3, "n": 16, "m": 32, "values": {"bits": 4, "group": 128}, "ignore": []}
    {..., "version": 3, "n": null, "m": "in", "sparsity": 0, "values": {"bits": 8, "group": null}, "ignore": []}

Shared by everything that writes or reads the format; imports neither torch nor transformers nor vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from crepe_deploy.errors import CheckpointError, ConfigError
from crepe_deploy.pattern import NM, Pattern, Unstructured, fraction_of

QUANT_METHOD: Final = "crepe_nm"
CONFIG_VERSION: Final = 3  # the newest that is read; the oldest that suffices is written
COLUMN_MULTIPLE: Final = 32
WHOLE_ROW: Final = "in"
CODE_BITS: Final = (4, 8)


@dataclass(frozen=True)
class Values:
    """Kept weights as codes of `bits` with a scale for each `group` of columns, or for each row: None.

    Raises ConfigError for bits that there are not and for groups that cannot be sharded.
    """

    bits: int
    group: int | None

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in CODE_BITS:
            raise ConfigError(f"values of {self.bits!r} bits; there are {CODE_BITS[0]} and {CODE_BITS[1]}")
        group = self.group
        if group is not None and (type(group) is not int or group < 1 or group % COLUMN_MULTIPLE):
            raise ConfigError(f"groups of {group!r} columns; packing needs a multiple of {COLUMN_MULTIPLE}")

    def __str__(self) -> str:
        return f"int{self.bits}" if self.group is None else f"int{self.bits}:group={self.group}"


@dataclass(frozen=True)
class PackedConfig:
    """Pattern and unpacked modules of one packed checkpoint; `overrides`: the modules with a pattern of their own.

    values: how kept weights are coded, None where they are stored as they are.
    """

    pattern: Pattern
    ignore: tuple[str, ...] = ()
    overrides: Mapping[str, Pattern] = field(default_factory=dict)
    values: Values | None = None

    @property
    def version(self) -> int:
        """The oldest version that holds this."""
        return 3 if self.values else 2 if self.overrides else 1

    def of(self, *modules: str) -> PackedConfig:
        """The config of one module, or of several that are served as one; each under any of its names.

        Raises ConfigError where several have different patterns.
        """
        patterns = {name: self.overrides.get(name, self.pattern) for name in modules}
        if len(set(patterns.values())) > 1:
            listed = ", ".join(f"{name} {pattern}" for name, pattern in patterns.items())
            raise ConfigError(f"layers that are served as one have different patterns: {listed}")
        return PackedConfig(next(iter(patterns.values())), values=self.values)

    def geometry(self, in_features: int) -> tuple[int, int]:
        """`(n, m)` for a weight of `in_features` columns; `m` is `in_features` when unstructured."""
        if isinstance(self.pattern, NM):
            return self.pattern.n, self.pattern.m
        return in_features - fraction_of(in_features, self.pattern.sparsity), in_features

    def fits(self, in_features: int) -> bool:
        """Whether a weight of `in_features` columns can be packed in this pattern."""
        return in_features % COLUMN_MULTIPLE == 0 and in_features % self.geometry(in_features)[1] == 0

    def to_dict(self) -> dict[str, Any]:
        """As `config.json` holds it."""
        head = {"quant_method": QUANT_METHOD, "version": self.version, **_shape(self.pattern)}
        if self.values:
            head["values"] = asdict(self.values)
        if self.overrides:
            head["overrides"] = {name: _shape(pattern) for name, pattern in sorted(self.overrides.items())}
        return {**head, "ignore": list(self.ignore)}

    @classmethod
    def from_dict(cls, content: Any) -> PackedConfig:
        """Read what `to_dict` wrote. Raises CheckpointError for another method, a newer version or a wrong entry."""
        if not isinstance(content, Mapping):
            raise CheckpointError(f"quantization_config is {content!r:.60}, no object")
        method, version, ignore = (content.get(key) for key in ("quant_method", "version", "ignore"))
        if method != QUANT_METHOD:
            raise CheckpointError(f"quantization_config: quant_method is '{method}', not '{QUANT_METHOD}'")
        if not isinstance(version, int) or version < 1:
            raise CheckpointError(f"quantization_config: version {version!r} is not a version of '{QUANT_METHOD}'")
        if version > CONFIG_VERSION:
            raise CheckpointError(
                f"quantization_config: '{QUANT_METHOD}' version {version} is newer than the version {CONFIG_VERSION} "
                "that this crepe-deploy reads; update crepe-deploy"
            )
        if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
            raise CheckpointError("quantization_config: 'ignore' is not a list of module names")
        values = _read_values(content, version)
        return cls(_read_pattern(content), tuple(ignore), _read_overrides(content, version), values)

    def refuse_values(self, reader: str) -> None:
        """Raise ConfigError where kept weights are coded, which `reader` cannot serve."""
        if self.values is not None:
            raise ConfigError(
                f"{reader} cannot serve {self.values} values ('{QUANT_METHOD}' version {self.version}): transformers "
                "does on the CPU after import crepe_deploy, as crepe-deploy eval does; for other readers use "
                "crepe-deploy export --format dense"
            )


def _shape(pattern: Pattern) -> dict[str, Any]:
    if isinstance(pattern, NM):
        return {"n": pattern.n, "m": pattern.m}
    return {"n": None, "m": WHOLE_ROW, "sparsity": pattern.sparsity}


def _read_overrides(content: Mapping[str, Any], version: int) -> dict[str, Pattern]:
    overrides = content.get("overrides", {})
    if version == 1 and overrides:
        raise CheckpointError("quantization_config: version 1 has no 'overrides'")
    if not isinstance(overrides, Mapping) or not all(isinstance(entry, Mapping) for entry in overrides.values()):
        raise CheckpointError("quantization_config: 'overrides' does not give modules their patterns")
    return {str(name): _read_pattern(entry) for name, entry in overrides.items()}


def _read_values(content: Mapping[str, Any], version: int) -> Values | None:
    found = content.get("values")
    if version < 3:
        if found is not None:
            raise CheckpointError(f"quantization_config: version {version} has no 'values'")
        return None
    if not isinstance(found, Mapping) or found.keys() != {"bits", "group"}:
        raise CheckpointError(f"quantization_config: values = {found!r:.60} does not give 'bits' and 'group'")
    try:
        return Values(found["bits"], found["group"])
    except ConfigError as error:
        raise CheckpointError(f"quantization_config: {error}") from error


def _read_pattern(content: Mapping[str, Any]) -> Pattern:
    n, m, sparsity = (content.get(key) for key in ("n", "m", "sparsity"))
    if m == WHOLE_ROW and n is None and isinstance(sparsity, int | float):
        return Unstructured(float(sparsity), "row")
    if type(n) is int and type(m) is int and sparsity is None:
        return NM(n, m)
    raise CheckpointError(f"quantization_config: n = {n!r}, m = {m!r}, sparsity = {sparsity!r} is no packed pattern")


def packed_config(
    pattern: Pattern,
    ignore: Iterable[str] = (),
    overrides: Mapping[str, Pattern] | None = None,
    values: Values | None = None,
) -> PackedConfig:
    """The config for tensors pruned to `pattern`. Raises ConfigError when no packed file can hold that pattern."""
    if isinstance(pattern, Unstructured) and pattern.granularity == "matrix":
        raise ConfigError(
            f"pattern {pattern} cannot be packed: rows keep different counts. Prune with --granularity row or an N:M "
            "pattern such as 16:32, or use --format dense"
        )
    if isinstance(pattern, Unstructured) and pattern.sparsity == 0 and values is None:
        raise ConfigError(f"pattern {pattern} keeps everything; there is nothing to pack. Use --format dense")
    return PackedConfig(pattern, tuple(sorted(set(ignore))), overrides or {}, values)
