"""Scripted operators of robosuite tasks: stages gone through once, without looking back.

They are no people and make no claim to resemble Robomimic's demonstrators. An operator who sees an object beside its
place closes the gripper on air and carries on: the failure stays in the demonstration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

_OPEN, _CLOSE = -1.0, 1.0
_UP, _X = np.array([0.0, 0.0, 1.0]), np.array([1.0, 0.0, 0.0])
_TURNED = 0.05
"""Radians from the stage's orientation at which the hand is turned."""


@dataclass(frozen=True)
class Stage:
    """Where to take the hand (metres, world frame), and when it is there."""

    target: np.ndarray
    gripper: float
    within: float = 0.01
    """Metres from the target at which the stage is over."""
    steps: int = 0
    """Steps it takes at the least."""
    turn: np.ndarray = field(default_factory=lambda: np.zeros(3))
    """Rotation still to make: a vector in the world frame, radians."""
    gain: float = 15.0
    """Action per metre of distance from the target."""
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
        there = np.linalg.norm(away) < now.within and np.linalg.norm(now.turn) < _TURNED
        over = self.spent >= now.limit or (self.spent >= now.steps and there)
        if over and (after := next(self.stages, None)):
            self.stage, self.spent = after, 0
            now = self.stage()
            away = now.target - hand(self.sim)
        self.spent += 1
        return np.concatenate([now.gain * away, 4.0 * now.turn, [now.gripper]]).clip(-1, 1)


def hand(sim: Any) -> np.ndarray:
    """xyz of the point between the fingers."""
    return sim.sim.data.site_xpos[sim.robots[0].eef_site_id["right"]].copy()


def _grip(sim: Any) -> float:
    """The heading along which the fingers close; a quarter turn at the start of an episode."""
    x, y = sim.sim.data.site_xmat[sim.robots[0].eef_site_id["right"]].reshape(3, 3)[:2, 0]
    return float(np.arctan2(y, x))


def _upright(sim: Any) -> np.ndarray:
    """Rotation vector that lets the hand point straight down; turning tilts it."""
    return np.cross(sim.sim.data.site_xmat[sim.robots[0].eef_site_id["right"]].reshape(3, 3)[:, 2], -_UP)


def _within(angle: float, symmetry: float) -> float:
    """The same angle, where turns by `symmetry` change nothing, nearest to zero."""
    return (angle + symmetry / 2) % symmetry - symmetry / 2


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
        seen = lambda: self.places()[0] + operator.shift * _X
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
        seen = lambda: self.places()[0] + operator.shift * _X
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


class ThreadNut:
    """Close on the square nut's handle, carry the nut over the peg and turn it to fit, lower it, let go."""

    def __init__(self, sim: Any):
        self.sim = sim
        self.nut = next(nut for nut in sim.nuts if "square" in nut.name.lower())

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the object and of its goal."""
        peg = _place(self.sim, self.sim.peg1_body_id)
        return _place(self.sim, self.sim.obj_body_id[self.nut.name]), peg

    def handle(self) -> np.ndarray:
        """xyz of the middle of the nut's handle."""
        site = self.sim.sim.model.site_name2id(self.nut.important_sites["handle"])
        return self.sim.sim.data.site_xpos[site].copy()

    def yaw(self) -> float:
        """The nut's angle about the vertical, in radians; along this heading is its handle."""
        away = self.handle() - self.places()[0]
        return float(np.arctan2(away[1], away[0]))

    def unfit(self) -> np.ndarray:
        """Rotation vector that levels the nut, which sags from its handle, and squares it with the peg."""
        away = self.places()[0] - self.handle()
        return np.cross(away, _UP) / (away @ away) * -away[2] + self.unsquare() * _UP

    def unsquare(self) -> float:
        """The least of the four turns, in radians, that the wrist can make and that spare the arm its full length."""
        yaw, turned = self.yaw(), _within(_grip(self.sim) - np.pi / 2, 2 * np.pi)
        turns = [_within(-yaw, np.pi / 2) + quarter * np.pi / 2 for quarter in range(-2, 3)]
        cost = lambda turn: abs(turn) + 10 * (np.cos(yaw + turn) > 0.7) + 10 * (abs(turned + turn) > 1.8)
        return min(turns, key=cost)

    def stages(self, operator: Operator) -> Stages:
        """What an operator does, in order; who has closed the gripper on air carries what is not there."""
        seen = lambda: self.handle() + operator.shift * _X
        across = lambda: _within(self.yaw() + np.pi / 2 - _grip(self.sim), np.pi) * _UP + _upright(self.sim)
        yield lambda: Stage(seen() + 0.08 * _UP, _OPEN, within=0.02, turn=across())
        yield lambda: Stage(seen() - 0.006 * _UP, _OPEN, within=0.009, turn=across())
        held, (nut, peg) = hand(self.sim), self.places()
        away = nut + operator.shift * _X - held
        yield lambda: Stage(held, _CLOSE, within=1.0, steps=12)
        yield lambda: Stage(held + 0.2 * _UP, _CLOSE, within=0.03)

        def over(height: float) -> Stage:
            """Takes the nut over the peg, so high above the peg's middle, or what would be the nut."""
            now, nut = hand(self.sim), self.places()[0]
            in_hand = np.linalg.norm(nut - now) < 0.1
            target = now + peg - (nut if in_hand else now + away)
            target[2] = peg[2] + height
            turn = self.unfit() if in_hand else np.zeros(3)
            return Stage(target, _CLOSE, within=0.006, turn=turn, gain=40.0)

        yield lambda: over(0.17)
        yield lambda: replace(over(0.14), within=0.004, steps=6, limit=20)
        yield lambda: replace(over(0.08), limit=20)
        yield lambda: replace(over(0.08), gripper=_OPEN, within=1.0, steps=5)
        yield lambda: replace(over(0.25), gripper=_OPEN)


EXPERTS: dict[str, Any] = {"Lift": LiftCube, "PickPlaceCan": PlaceCan, "NutAssemblySquare": ThreadNut}
