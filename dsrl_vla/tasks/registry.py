"""Task families by entry point."""

from __future__ import annotations

from typing import Any

from ..entry_points import load, names
from ..errors import bad
from .base import TaskEnv

GROUP = "dsrl_vla.tasks"


def task_families() -> dict[str, str]:
    """Registered families: name -> where the factory lives."""
    return names(GROUP)


def make_task(uri: str, **options: Any) -> TaskEnv:
    """Make a task from its URI, ``<family>:<name>``.

    Raises:
        UnknownNameError: unknown family or task. MissingExtraError: its package is not installed.
    """
    family, colon, name = uri.partition(":")
    if not colon or not name:
        raise bad("task", "'<family>:<name>' such as 'metaworld:drawer-open-v3'", f"'{uri}'")
    return load(GROUP, "task family", family)(name, uri=uri, **options)
