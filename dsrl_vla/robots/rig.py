"""One connected robot, with a person's teleoperator beside it: dictionaries of named joints to vectors and back."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import bad
from ..interrupts import undisturbed
from ..observation import IMAGE_PREFIX, STATE
from .guards import Guards, GuardsConfig
from .standstill import Standstill

log = logging.getLogger(__name__)


def _numbers(features: Mapping[str, Any]) -> list[str]:
    """Names of the plain numbers among features, in the robot's order."""
    return [name for name, kind in features.items() if kind is float or kind == "float"]


class Rig:
    """A robot (LeRobot's `Robot`, or whatever has its methods), connected; guards before everything it is sent.

    Args:
        cameras: robot's name -> name in the observation; by default all, under their own names.
        dry_run: send nothing.

    Raises:
        DsrlError: the teleoperator's actions are not the robot's; an unknown camera; guards that leave a gap.
    """

    def __init__(
        self,
        robot: Any,
        guards: GuardsConfig,
        teleop: Any = None,
        cameras: Mapping[str, str] | None = None,
        dry_run: bool = False,
    ):
        self.robot, self.teleop, self.dry_run = robot, teleop, dry_run
        self.state = _numbers(robot.observation_features)
        self.actions = _numbers(robot.action_features)
        pictures = {k: tuple(v) for k, v in robot.observation_features.items() if not isinstance(v, type | str)}
        colour = {name: shape for name, shape in pictures.items() if len(shape) == 3 and shape[2] == 3}
        self.cameras = dict(cameras) if cameras else {name: name for name in colour}
        for name in self.cameras:
            if name not in colour:
                raise bad("cameras", f"one of the robot's: {', '.join(colour) or 'it has none'}", f"'{name}'")
        self.shapes = {mine: colour[theirs] for theirs, mine in self.cameras.items()}
        self.guards = Guards(guards, self.actions, self.state)
        if teleop is not None and set(_numbers(teleop.action_features)) != set(self.actions):
            theirs = ", ".join(_numbers(teleop.action_features))
            fix = "A device for its buttons alone goes under events:."
            raise bad("teleop", f"the robot's actions ({', '.join(self.actions)})", theirs or "none", fix)
        self.clipped = self.sent = 0
        self.moved()
        self.seen: dict[str, Any] = {}
        self._one_at_a_time = threading.RLock()  # drivers are not made for two threads
        self._standstill: Standstill | None = None
        self._connect()
        if self.guards.velocity.any() and not dry_run:
            self._standstill = Standstill(guards.hold_after_s, self._let_go, self._one_at_a_time)

    def moved(self) -> None:
        """Somebody else moves the robot, a reset or a person: where it was last told to go is not where it is."""
        self._last = self.guards.still(np.full(len(self.actions), np.nan))

    def _connect(self) -> None:
        """Connect what is not connected yet; where that fails, nothing is left connected."""
        for kind, part in (("robot", self.robot), ("teleop", self.teleop)):
            if part is None or part.is_connected:
                continue
            try:
                part.connect()
            except Exception as error:
                for other in filter(None, (self.robot, self.teleop)):
                    with contextlib.suppress(Exception):
                        other.disconnect()
                raise bad(kind, "one that can be connected", f"{type(error).__name__}: {error}") from error

    def observe(self) -> dict[str, np.ndarray]:
        """Read the robot: ``observation.state`` float32 (S,) and its cameras, uint8 (H, W, 3)."""
        with self._one_at_a_time:
            self.seen = self.robot.get_observation()
        found = {IMAGE_PREFIX + mine: np.asarray(self.seen[theirs]) for theirs, mine in self.cameras.items()}
        return found | {STATE: np.array([self.seen[name] for name in self.state], dtype=np.float32)}

    def present(self) -> np.ndarray:
        """Where the robot is, by action feature (A,): as last observed, or else as last told; NaN: nobody knows."""
        found = np.array([self.seen.get(name, np.nan) for name in self.actions], dtype=np.float64)
        return np.where(self.guards.measured & np.isfinite(found), found, self._last)

    def send(self, action: np.ndarray) -> np.ndarray:
        """Send an action (A,) behind the guards; return what was really executed, float32 (A,).

        Raises:
            DsrlError: a number that is not finite, of the action or of where the robot is (as read, or else as last
                told); it has been stopped.
        """
        before = self.present()
        try:
            self._check_known(before)
            safe = self.guards(np.asarray(action, dtype=np.float64), before)
        except Exception:
            self.hold()
            raise
        self.sent += 1
        self.clipped += not np.allclose(safe, action, atol=1e-6)
        return self._send(safe)

    def hold(self) -> None:
        """Stand still: go where it is, and no further."""
        if not self.seen:
            self.observe()
        target = self.guards.still(self.present())
        self._check_known(target)
        self._send(target)
        if self._standstill is not None:
            self._standstill.resting()

    def _let_go(self) -> None:
        """Velocities are to rest; whatever else there is stays as last told."""
        target = np.where(self.guards.velocity, self.guards.rest, self._last)
        self._check_known(target)
        self._send(target)

    def _hold_here(self) -> None:
        """Stand still where the robot is now: since it was last seen, a reset or a person may have moved it.

        Where it cannot be seen, velocities are to rest all the same; places are those last told, unless it has been
        moved since.
        """
        try:
            self.observe()
        except Exception:
            if self.guards.velocity.any():
                self._let_go()
            raise
        self.hold()

    def _check_known(self, place: np.ndarray) -> None:
        """Refuse to command from a place that nobody has ever measured."""
        for name, value in zip(self.actions, place, strict=True):
            if not np.isfinite(value):
                raise bad(f"the robot's reading of '{name}'", "a finite number", value, "Nothing was sent.")

    def _send(self, action: np.ndarray) -> np.ndarray:
        command = {name: float(value) for name, value in zip(self.actions, action, strict=True)}
        with self._one_at_a_time:
            done = command if self.dry_run else (self.robot.send_action(command) or command)
            self._last = np.array([done.get(name, command[name]) for name in self.actions])
            if self._standstill is not None:
                self._standstill.moving()
            return self._last.astype(np.float32)

    def persons_action(self) -> np.ndarray:
        """What the person at the teleoperator wants, (A,)."""
        wanted = self.teleop.get_action()
        return np.array([wanted[name] for name in self.actions], dtype=np.float64)

    def close(self) -> None:
        """Stand still and disconnect; what fails in it is logged, for the robot may be why we stop. Nobody who presses
        Ctrl-C once more keeps it from being tried."""
        watch = [self._standstill.close] if self._standstill is not None else []
        teleop = [self.teleop.disconnect] if self.teleop else []
        with undisturbed("the robot is being stopped"):
            for what in (*watch, self._hold_here, self.robot.disconnect, *teleop):
                try:
                    what()
                except (Exception, KeyboardInterrupt) as error:
                    log.warning("while disconnecting the robot: %s", error or type(error).__name__)
