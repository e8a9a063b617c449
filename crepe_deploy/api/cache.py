"""What `cache` lists and removes: what this tool keeps for itself, and beside it what lies in Hugging Face's cache."""

from __future__ import annotations

from typing import Any

from crepe_deploy.machine import cache_dir
from crepe_deploy.store.cache import Kept, kept, remove


def cache() -> dict[str, Any]:
    """What is in the caches: ours entry by entry, Hugging Face's by repository, with sizes in bytes and places.

    Raises ConfigError where there is no home and no place for a cache.
    """
    entries = kept()
    return {
        "folder": str(cache_dir()),
        "bytes": sum(entry.size for entry in entries),
        "entries": [_entry(entry) for entry in entries],
        "hugging_face": hugging_face(),
    }


def clean_cache() -> dict[str, Any]:
    """Remove our own entries and nothing else; says what is gone, and what was left and why."""
    removed, left = [], []
    for entry in kept():
        why = remove(entry)
        if why is None:
            removed.append(entry)
        else:
            left.append({**_entry(entry), "why": why})
    return {
        "folder": str(cache_dir()),
        "bytes": sum(entry.size for entry in removed),
        "removed": [_entry(entry) for entry in removed],
        "left": left,
    }


def _entry(entry: Kept) -> dict[str, Any]:
    return {"kind": entry.kind, "what": entry.what, "path": str(entry.path), "bytes": entry.size}


def hugging_face() -> dict[str, Any]:
    """Models and data sets in Hugging Face's cache, which hub ids are read from and which others use too."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        found = scan_cache_dir(constants.HF_HUB_CACHE)
        repositories = [
            {
                "kind": one.repo_type,
                "id": one.repo_id,
                "path": str(one.repo_path),
                "bytes": one.size_on_disk,
                "revisions": sorted(revision.commit_hash for revision in one.revisions),
            }
            for one in sorted(found.repos, key=lambda one: (one.repo_type, one.repo_id))
        ]
    except CacheNotFound:
        repositories = []
    return {
        "folder": str(constants.HF_HUB_CACHE),
        "bytes": sum(one["bytes"] for one in repositories),
        "repositories": repositories,
    }
