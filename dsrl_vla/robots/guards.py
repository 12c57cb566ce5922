"""The last thing before the motors: limits of every action, and of how far it may go in one step.

They stand behind base, head and person alike. They are no certificate of safety: keep the robot's own limits on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from ..errors import bad, unknown


@dataclass(frozen=True)
class GuardsConfig:
    """By name of an action feature, or a pattern such as ``"*.pos"``; the name itself counts before a pattern, of
    patterns the first that fits. Robot's units."""

    limits: dict = field(default_factory=dict)
    """name -> [low, high]. Every action needs one."""
    max_step: dict = field(default_factory=dict)
    """name -> greatest change in one step, from the measured position where the robot measures it, else from the
    last command. Every measured action needs one."""
    rest: dict = field(default_factory=dict)
    """name -> the command that means standing still: for velocities, measured or not, and for whatever the robot does
    not measure. A measured position has none: it stands still where it is."""
    hold_after_s: float = 1.0
    """Seconds without a command after which velocities (``*.vel``) are told to rest: they would otherwise stay in
    force while the base is thinking. Not while the robot is being read: its driver is not for two at a time."""

    def __post_init__(self) -> None:
        if not 0 < self.hold_after_s < math.inf:
            raise bad("guards.hold_after_s", "seconds, above 0 and finite", self.hold_after_s)


_VELOCITY, _POSITION = ".vel", ".pos"  # as LeRobot's robots name them


def _find(table: Mapping[str, Any], name: str) -> Any:
    patterns = (value for pattern, value in table.items() if fnmatchcase(name, pattern))
    return table[name] if name in table else next(patterns, None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


class Guards:
    """Guards over the action vector of one robot.

    Args:
        names: of the action features, in order.
        measured: those among them whose present value the robot observes.

    Raises:
        DsrlError: an action without limits, without a greatest step, or without a way to stand still.
        UnknownNameError: guards of an action that the robot does not have.
    """

    def __init__(self, config: GuardsConfig, names: Sequence[str], measured: Sequence[str]):
        for table in ("limits", "max_step", "rest"):
            for key in getattr(config, table):
                if not any(fnmatchcase(name, key) for name in names):  # else a tighter limit would be none at all
                    raise unknown(f"action in guards.{table}", key, names)
        self.names = list(names)
        self.measured = np.array([name in measured for name in names], dtype=bool)
        self.velocity = np.array([name.endswith(_VELOCITY) for name in names], dtype=bool)
        self.low, self.high, self.most, self.rest = np.zeros((4, len(names)))
        for i, name in enumerate(names):
            pair = _find(config.limits, name)
            numbers = isinstance(pair, list | tuple) and len(pair) == 2 and all(map(_is_number, pair))
            if not numbers or not pair[0] < pair[1]:
                raise bad("guards.limits", f"[low, high] with low < high for the action '{name}'", pair)
            most, rest = _find(config.max_step, name), _find(config.rest, name)
            if self.measured[i] and most is None:
                raise bad("guards.max_step", f"the greatest step of the action '{name}'", "none")
            if most is not None and not (_is_number(most) and most > 0):
                raise bad(f"guards.max_step of '{name}'", "a positive number", most)
            if rest is None and (name.endswith(_VELOCITY) or not self.measured[i]):
                why = "which is a velocity" if name.endswith(_VELOCITY) else "which the robot does not measure"
                raise bad("guards.rest", f"what stands still for '{name}', {why}", "none")
            if rest is not None and self.measured[i] and name.endswith(_POSITION):
                words = f"none for '{name}', a measured position, which stands still where it is"
                raise bad("guards.rest", words, rest, "The robot would go there, without limit, when an episode ends.")
            if rest is not None and not _is_number(rest):
                raise bad(f"guards.rest of '{name}'", "a number", rest)
            self.low[i], self.high[i] = pair
            self.most[i] = np.inf if most is None else most
            self.rest[i] = np.nan if rest is None else rest

    def still(self, present: np.ndarray) -> np.ndarray:
        """The action (A,) that stands still; `present` (A,) is where the robot is, as far as it measures that."""
        return np.where(np.isnan(self.rest), present, self.rest)

    def __call__(self, action: np.ndarray, before: np.ndarray) -> np.ndarray:
        """The action (A,) within limits and no further than a step from `before` (A,).

        Raises:
            DsrlError: an action that is not a finite number.
        """
        if not np.isfinite(action).all():
            name = self.names[int(np.flatnonzero(~np.isfinite(action))[0])]
            raise bad(f"action '{name}'", "a finite number", "NaN or infinity", "The robot was told to stand still.")
        bounded = np.clip(action, self.low, self.high)
        return np.clip(bounded, before - self.most, before + self.most)
