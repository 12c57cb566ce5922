"""Scripted operators of robosuite tasks: stages gone through once, without looking back.

They are no people and make no claim to resemble Robomimic's demonstrators. An operator who sees an object beside its
place closes the gripper on air and carries on: the failure stays in the demonstration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

_OPEN, _CLOSE = -1.0, 1.0
_GAIN = 15.0
"""Action per metre of distance from the stage's target."""
_UP = np.array([0.0, 0.0, 1.0])


@dataclass(frozen=True)
class Stage:
    """Where to take the hand (metres, world frame), and when it is there."""

    target: np.ndarray
    gripper: float
    within: float = 0.01
    """Metres from the target at which the stage is over."""
    steps: int = 0
    """Steps it takes at the least."""
    turn: float = 0.0
    """Rotation about the vertical still to make, in radians."""
    limit: int = 60
    """Steps after which it is over whatever the distance."""


Stages = Iterator[Callable[[], Stage]]


class Operator:
    """Acts (7,) on the present state; see `dsrl_vla.tasks.base.Expert`."""

    def __init__(self, sim: Any, plan: Any):
        self.sim, self.plan = sim, plan
        self.shift = 0.0
        self.stages: Stages = plan.stages(self)
        self.stage, self.spent = next(self.stages), 0

    def __call__(self, shift: float) -> np.ndarray:
        self.shift = shift
        now = self.stage()
        away = now.target - hand(self.sim)
        over = self.spent >= now.limit or (self.spent >= now.steps and np.linalg.norm(away) < now.within)
        if over and (after := next(self.stages, None)):
            self.stage, self.spent = after, 0
            now = self.stage()
            away = now.target - hand(self.sim)
        self.spent += 1
        return np.concatenate([_GAIN * away, [0.0, 0.0, 4.0 * now.turn], [now.gripper]]).clip(-1, 1)


def hand(sim: Any) -> np.ndarray:
    """xyz of the point between the fingers."""
    return sim.sim.data.site_xpos[sim.robots[0].eef_site_id["right"]].copy()


def _place(sim: Any, body: int) -> np.ndarray:
    return sim.sim.data.body_xpos[body].copy()


class LiftCube:
    """Close on the cube, raise it."""

    def __init__(self, sim: Any):
        self.sim = sim

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the object and of its goal."""
        cube = _place(self.sim, self.sim.cube_body_id)
        return cube, cube + 0.1 * _UP

    def stages(self, operator: Operator) -> Stages:
        """What an operator does, in order."""
        seen = lambda: self.places()[0] + [operator.shift, 0, 0]
        yield lambda: Stage(seen() + 0.06 * _UP, _OPEN, within=0.02)
        yield lambda: Stage(seen(), _OPEN)
        held = hand(self.sim)
        yield lambda: Stage(held, _CLOSE, within=1.0, steps=6)
        yield lambda: Stage(held + 0.15 * _UP, _CLOSE)


class PlaceCan:
    """Close on the can, carry it over to its bin, let go."""

    def __init__(self, sim: Any):
        self.sim = sim

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the object and of its goal."""
        number = self.sim.object_id
        goal = self.sim.target_bin_placements[number].copy()
        return _place(self.sim, self.sim.obj_body_id[self.sim.objects[number].name]), goal

    def stages(self, operator: Operator) -> Stages:
        """What an operator does, in order."""
        seen = lambda: self.places()[0] + [operator.shift, 0, 0]
        yield lambda: Stage(seen() + 0.10 * _UP, _OPEN, within=0.025)
        yield lambda: Stage(seen() + 0.01 * _UP, _OPEN, within=0.012)
        held, goal = hand(self.sim), self.places()[1]
        yield lambda: Stage(held, _CLOSE, within=1.0, steps=6)
        high = np.array([held[0], held[1], goal[2] + 0.26])
        yield lambda: Stage(high, _CLOSE, within=0.06)
        yield lambda: Stage(goal + 0.26 * _UP, _CLOSE, within=0.08)
        yield lambda: Stage(goal + 0.14 * _UP, _CLOSE, within=0.03)
        yield lambda: Stage(goal + 0.14 * _UP, _OPEN, within=1.0, steps=5)
        yield lambda: Stage(goal + 0.26 * _UP, _OPEN)


EXPERTS: dict[str, Any] = {"Lift": LiftCube, "PickPlaceCan": PlaceCan}
