"""Policies steered by dsrl-vla, for LeRobot's own tools. Importing it registers everything with LeRobot."""

from .configuration_dsrl import DsrlConfig
from .env_dsrl import DsrlEnv
from .modeling_dsrl import DsrlPolicy
from .processor_dsrl import make_dsrl_pre_post_processors
from .rehearsalrobot import RehearsalRobot, RehearsalRobotConfig

__all__ = [
    "DsrlConfig",
    "DsrlEnv",
    "DsrlPolicy",
    "RehearsalRobot",
    "RehearsalRobotConfig",
    "make_dsrl_pre_post_processors",
]
