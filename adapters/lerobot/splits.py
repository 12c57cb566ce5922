"""Which split belongs to which policy type. Nothing here imports LeRobot."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .split import Split


@dataclass(frozen=True)
class Known:
    """Where the split of a policy type is, and which extra of LeRobot the policy needs."""

    module: str
    name: str
    extra: str


KNOWN = {
    "pi0": Known("flow", "Pi0", "pi"),
    "pi05": Known("flow", "Pi05", "pi"),
    "smolvla": Known("flow", "SmolVLA", "smolvla"),
    "diffusion": Known("conditioned", "Diffusion", "diffusion"),
    "multi_task_dit": Known("conditioned", "MultiTaskDiT", "multi_task_dit"),
    "vla_jepa": Known("experts", "VLAJEPA", "vla_jepa"),
    "groot": Known("experts", "Groot", "groot"),
    "evo1": Known("experts", "Evo1", "evo1"),
    "molmoact2": Known("experts", "MolmoAct2", "molmoact2"),
    "xvla": Known("standing_in", "XVLA", "xvla"),
    "eo1": Known("standing_in", "EO1", "eo1"),
    "wall_x": Known("standing_in", "WallX", "wallx"),
}


def find_split(kind: str) -> type[Split]:
    """The split class of a known policy type."""
    known = KNOWN[kind]
    return getattr(importlib.import_module(f"{__package__}.{known.module}"), known.name)
