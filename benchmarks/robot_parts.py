"""What stands in for a laboratory in ``robot_loop.py``: a robot that keeps a flight log, a person, an operator.

Imported by the training process through the robot's file (``imports:`` and factories), as parts of a user's own
laboratory would be.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from dsrl_vla.robots.operators import Said, ScriptedOperator
from dsrl_vla.robots.rehearsal import TaskRobot
from dsrl_vla.tasks.live import Ending

LAB: dict[str, Any] = {}
"""The robot of this process; person and operator look at it."""


class LoggedRobot(TaskRobot):
    """Writes every scene and every command to a file at once: an account that owes nothing to the package."""

    def __init__(self, uri: str, log: str):
        super().__init__(uri)
        self.file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        LAB["robot"] = self

    def _write(self, row: dict[str, Any]) -> None:
        os.write(self.file, (json.dumps(row) + "\n").encode())

    def place(self, seed: int) -> None:
        super().place(seed)
        self._write({"seed": seed})

    def send_action(self, action: dict[str, float]) -> dict[str, float]:
        sent = super().send_action(action)
        self._write({"action": list(sent.values())})
        return sent


try:
    from dataclasses import dataclass

    from lerobot.robots import Robot, RobotConfig

    @RobotConfig.register_subclass("logged")
    @dataclass(kw_only=True)
    class LoggedFollowerConfig(RobotConfig):
        uri: str
        log: str

    class LoggedFollower(LoggedRobot, Robot):
        """The same as a robot of LeRobot's."""

        config_class = LoggedFollowerConfig
        name = "logged"
        is_connected = False
        is_calibrated = True

        def __init__(self, config: LoggedFollowerConfig):
            Robot.__init__(self, config)
            LoggedRobot.__init__(self, config.uri, config.log)

        def calibrate(self) -> None: ...

        def configure(self) -> None: ...

except ImportError:  # without LeRobot the robot comes from a factory
    pass


class Guide:
    """A person at a teleoperator who knows the way round the pillar."""

    is_connected = False

    @property
    def action_features(self) -> dict[str, Any]:
        return LAB["robot"].action_features

    def connect(self) -> None:
        self.is_connected = True

    def disconnect(self) -> None:
        self.is_connected = False

    def get_action(self) -> dict[str, float]:
        task = LAB["robot"].task
        passed = task.position[1] > 1.0
        target = task.goal if passed else np.array([-0.5, 1.1])
        towards = target - task.position
        action = np.clip(towards / max(np.linalg.norm(towards), 0.1), -1, 1)
        return dict(zip(self.action_features, action.tolist(), strict=True))


class Operator(ScriptedOperator):
    """Says success when the robot has succeeded, otherwise what the script of the environment says.

    The script counts episodes that are in the journal. Stops the run by Ctrl-C when enough are there.
    """

    def __init__(self) -> None:
        lab = json.loads(os.environ["ROBOT_LOOP"])
        super().__init__(lab["script"])
        self.journal, self.episodes = Path(lab["journal"]), lab["episodes"]

    def ready(self, message: str) -> None:
        super().ready(message)
        self.episode = len(list(self.journal.glob("episode_*.safetensors")))
        if self.episode >= self.episodes:
            raise KeyboardInterrupt

    def hear(self) -> Said:
        said = super().hear()
        done = said.ending is None and LAB["robot"].succeeded
        return Said(Ending.SUCCESS, said.human) if done else said
