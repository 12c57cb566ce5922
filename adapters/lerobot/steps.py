"""What LeRobot's processor files may name: its loader would import and call any class that stands in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsrl_vla.errors import bad


def own_steps(tree: Mapping[str, Any], named: str) -> list[tuple[str, dict[str, Any]]]:
    """The steps of a processor file: the key that overrides go by, and the configuration.

    Raises:
        DsrlError: one that is not LeRobot's own; says so of `named`.
    """
    found = []
    for step in tree["steps"]:
        key = step.get("registry_name") or step.get("class", "")
        if not step.get("registry_name") and not key.startswith("lerobot."):
            raise bad(named, "processor steps that are LeRobot's own", f"'{key}'", "It is not loaded.")
        found.append((key.rpartition(".")[2], step.get("config", {})))
    return found
