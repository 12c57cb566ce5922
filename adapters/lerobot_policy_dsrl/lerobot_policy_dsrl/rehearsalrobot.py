"""A task of dsrl-vla's as a robot of LeRobot's (``--robot.type=dsrl_rehearsal``), to rehearse with."""

from __future__ import annotations

from dataclasses import dataclass

from dsrl_vla.robots.rehearsal import TaskRobot
from lerobot.robots import Robot, RobotConfig


@RobotConfig.register_subclass("dsrl_rehearsal")
@dataclass(kw_only=True)
class RehearsalRobotConfig(RobotConfig):
    """Which task."""

    uri: str
    """As `dsrl_vla.make_task` takes it."""
    max_episode_steps: int = 500


class RehearsalRobot(TaskRobot, Robot):
    """A simulated robot with LeRobot's base class."""

    config_class = RehearsalRobotConfig
    name = "dsrl_rehearsal"
    is_connected = False
    is_calibrated = True

    def __init__(self, config: RehearsalRobotConfig):
        Robot.__init__(self, config)
        TaskRobot.__init__(self, config.uri, config.max_episode_steps)
        self.config = config

    def calibrate(self) -> None:
        """Nothing to calibrate."""

    def configure(self) -> None:
        """Nothing to configure."""
