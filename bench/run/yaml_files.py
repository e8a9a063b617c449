"""Reading YAML that people write: a key given twice is an error, and every error names the file."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from ...errors import ConfigError


def read_yaml(path: Path) -> Any:
    """The content of a YAML file, of which JSON is a part. Raises ConfigError naming the file and what is wrong."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)  # noqa: S506
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


class _UniqueKeys(yaml.SafeLoader):  # type: ignore[misc]
    """The safe loader, refusing repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping whose keys are all different."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = {str(key) for key in keys if keys.count(key) > 1}
        if repeated:
            raise yaml.constructor.ConstructorError(
                None, None, f"repeated key {', '.join(sorted(repeated))}", node.start_mark
            )
        return dict(super().construct_mapping(node, deep))
