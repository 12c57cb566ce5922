"""What LeRobot's processor files may name: its loader would import and call any class that stands in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsrl_vla.errors import bad
from dsrl_vla.plain import read_object


def own_steps(path: Path, named: str = "") -> dict[str, dict[str, Any]]:
    """The steps of a processor file: key, as overrides have it -> its configuration.

    Raises:
        DsrlError: one that is not LeRobot's own; says so of `named`, or of the path.
    """
    found = {}
    for step in read_object(path).get("steps", []):
        key = step.get("registry_name") or step.get("class", "")
        if not step.get("registry_name") and not key.startswith("lerobot."):
            raise bad(named or f"{path}", "processor steps that are LeRobot's own", f"'{key}'", "It is not loaded.")
        found[key.rpartition(".")[2]] = step.get("config", {})
    return found
