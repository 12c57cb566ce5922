"""What LeRobot has to know of a steered policy; ``config.json`` beside the head's own files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lerobot.configs import PreTrainedConfig
from lerobot.optim import AdamWConfig, LRSchedulerConfig, OptimizerConfig


@PreTrainedConfig.register_subclass("dsrl")
@dataclass
class DsrlConfig(PreTrainedConfig):
    """A frozen base, by reference, under a steering head."""

    base: str = ""
    """URI of the base, as `dsrl_vla.load_base` takes it: ``lerobot:owner/name@revision``."""
    base_dtype: str = "float32"
    base_options: dict[str, Any] = field(default_factory=dict)
    """What else the base's adapter is given: a recipe's ``base.options``."""
    steer: bool = True
    """False: the base itself, under its own noise."""
    stochastic: bool = False
    """Sample from the head instead of taking its mode."""
    seed: int = 0
    """Of the noise, where it is drawn; every episode and environment has its own stream."""
    chunk_size: int = 1
    n_action_steps: int = 1
    """Steps executed per decision: what the head was trained with. Not to be changed."""

    @property
    def observation_delta_indices(self) -> None:
        """One observation at a time."""
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        """A chunk."""
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        """No rewards."""
        return None

    def get_optimizer_preset(self) -> OptimizerConfig:
        """LeRobot asks every policy; a steered one is trained by `dsrl-vla train`."""
        return AdamWConfig()

    def get_scheduler_preset(self) -> LRSchedulerConfig | None:
        """None."""
        return None

    def validate_features(self) -> None:
        """The base checks every observation."""
