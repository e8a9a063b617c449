"""The project's own address, as the installed package's metadata has it: `[project.urls]` of pyproject.toml."""

from __future__ import annotations

import importlib.metadata
import json
from typing import Final

DISTRIBUTION: Final = "crepe-deploy"


def project_url(label: str) -> str:
    """The address under "Repository", "Documentation", "Issues" or "Changelog". Raises KeyError for another label."""
    entries: list[str] = importlib.metadata.metadata(DISTRIBUTION).get_all("Project-URL") or []
    addresses = {name: address for name, _, address in (entry.partition(", ") for entry in entries)}
    return addresses[label]


def install_address() -> str:
    """What pip installs this very crepe-deploy from, while no package index has it.

    Where pip fetched it from a repository: that, at its commit. Else the project's, at the tag of this version.
    """
    recorded = json.loads(importlib.metadata.distribution(DISTRIBUTION).read_text("direct_url.json") or "{}")
    if "vcs_info" in recorded:
        return f"{recorded['vcs_info']['vcs']}+{recorded['url']}@{recorded['vcs_info']['commit_id']}"
    return f"git+{project_url('Repository')}@v{importlib.metadata.version(DISTRIBUTION)}"
