"""A task of this package behind LeRobot's `Robot` interface, to rehearse with before there is a robot.

It has the interface, not the base class, so that it needs no LeRobot; the distribution ``lerobot_policy_dsrl``
registers it with LeRobot as ``dsrl_rehearsal``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import DsrlError
from ..observation import IMAGE_PREFIX, STATE
from ..tasks import make_task


class TaskRobot:
    """A simulated robot. State numbers are called ``s0.pos``, ``s1.pos``, …; actions ``a0.vel``, …"""

    def __init__(self, uri: str, max_episode_steps: int = 500):
        self.task = make_task(uri, max_episode_steps=max_episode_steps)
        self.is_connected = False
        self.succeeded = False
        self.sent = 0

    @property
    def observation_features(self) -> dict[str, Any]:
        """Names to float, and cameras to (H, W, 3)."""
        return {f"s{i}.pos": float for i in range(self.task.info.state_dim)} | dict(self.task.info.cameras)

    @property
    def action_features(self) -> dict[str, Any]:
        """Names to float."""
        return {f"a{i}.vel": float for i in range(self.task.info.action_dim)}

    def connect(self, calibrate: bool = True) -> None:
        """Start, in the scene of seed 0."""
        self.is_connected = True
        self.place(0)

    def place(self, seed: int) -> None:
        """Make the scene ready that `seed` names."""
        self.task.begin(seed)
        self.succeeded = False

    def get_observation(self) -> dict[str, Any]:
        """Read it."""
        self._check()
        seen = self.task.observe()
        pictures = {k.removeprefix(IMAGE_PREFIX): v for k, v in seen.items() if k.startswith(IMAGE_PREFIX)}
        return {f"s{i}.pos": float(value) for i, value in enumerate(seen[STATE])} | pictures

    def send_action(self, action: dict[str, float]) -> dict[str, float]:
        """One step of the simulation."""
        self._check()
        vector = np.array([action[name] for name in self.action_features], dtype=np.float32)
        _, success, _ = self.task.advance(vector)
        self.succeeded |= success
        self.sent += 1
        return action

    def disconnect(self) -> None:
        """Stop."""
        self._check()
        self.is_connected = False

    def _check(self) -> None:
        if not self.is_connected:
            raise DsrlError("the rehearsal robot: expected it to be connected, got a disconnected one.")


def place(robot: TaskRobot, seed: int) -> None:
    """For ``reset:`` in a robot's file: the scene that `seed` names."""
    robot.place(seed)
