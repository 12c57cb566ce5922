"""Plug-ins by entry point, so that another distribution can add an adapter or a task family."""

from __future__ import annotations

import importlib
import os
import sys
from importlib import metadata
from typing import Any

from .errors import DsrlError, unknown


def names(group: str) -> dict[str, str]:
    """The registered names of a group: name -> import path.

    Raises:
        DsrlError: two distributions claim one name.
    """
    found: dict[str, str] = {}
    for point in metadata.entry_points(group=group):
        if found.setdefault(point.name, point.value) != point.value:
            raise DsrlError(
                f"entry point '{point.name}' of group '{group}': expected one owner, got '{found[point.name]}' "
                f"and '{point.value}'. Uninstall one of the two distributions."
            )
    return found


def load(group: str, kind: str, name: str) -> Any:
    """Import what is registered as `name`.

    Raises:
        UnknownNameError: nothing is; names the nearest one. DsrlError: what is cannot be imported.
    """
    known = names(group)
    if name not in known:
        raise unknown(kind, name, known)
    try:
        return next(iter(metadata.entry_points(group=group, name=name))).load()
    except DsrlError:
        raise
    except (ImportError, AttributeError) as error:
        raise DsrlError(
            f"entry point '{name}' of group '{group}': expected '{known[name]}' to be importable, got: {error}."
        ) from error


def imported(name: str, field: str) -> Any:
    """What ``package.module:name`` names; `field` is who asks for it.

    Raises:
        DsrlError: it cannot be imported.
    """
    module, colon, attribute = name.partition(":")
    try:
        if not colon:
            raise ImportError("it has no colon")
        if os.getcwd() not in sys.path:  # a command does not look where it is called; python -m does
            sys.path.append(os.getcwd())
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise DsrlError(f"{field}: expected an importable package.module:name, got '{name}' ({error}).") from error
