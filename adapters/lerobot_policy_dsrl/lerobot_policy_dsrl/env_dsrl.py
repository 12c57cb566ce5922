"""dsrl-vla's tasks as environments of LeRobot's (``--env.type=dsrl --env.uri=metaworld:drawer-open-v3``).

The seeds of an evaluation name the same episodes as in ``dsrl-vla eval``: ``--seed=300000`` are its held-out ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from dsrl_vla import make_task
from dsrl_vla.observation import IMAGE_PREFIX, STATE
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig


class LeRobotTask(gym.Env):
    """A task with LeRobot's observations: ``agent_pos``, and ``pixels`` by camera."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}
    render_mode = "rgb_array"

    def __init__(self, uri: str, max_episode_steps: int, frame: int):
        self.env = make_task(uri, max_episode_steps=max_episode_steps)
        self.task = self.task_description = self.env.info.prompt
        self._max_episode_steps, self.size = max_episode_steps, frame
        pixels = {name: gym.spaces.Box(0, 255, shape, np.uint8) for name, shape in self.env.info.cameras.items()}
        spaces: dict[str, gym.Space] = {"agent_pos": self.env.observation_space[STATE]}  # type: ignore[index]
        self.observation_space = gym.spaces.Dict(spaces | ({"pixels": gym.spaces.Dict(pixels)} if pixels else {}))
        self.action_space = self.env.action_space

    def _translate(self, seen: dict[str, np.ndarray]) -> dict[str, Any]:
        pixels = {k.removeprefix(IMAGE_PREFIX): v for k, v in seen.items() if k.startswith(IMAGE_PREFIX)}
        return {"agent_pos": seen[STATE]} | ({"pixels": pixels} if pixels else {})

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        seen, _ = self.env.reset(seed=seed)
        return self._translate(seen), {"is_success": False}

    def step(self, action: np.ndarray):
        seen, reward, terminated, truncated, info = self.env.step(action)
        return self._translate(seen), reward, terminated, truncated, {"is_success": bool(info["success"])}

    def render(self) -> np.ndarray:
        return self.env.frame(self.size)

    def close(self) -> None:
        self.env.close()


@EnvConfig.register_subclass("dsrl")
@dataclass
class DsrlEnv(EnvConfig):
    """A task of dsrl-vla's."""

    uri: str = "point:fork"
    episode_length: int = 120
    frame: int = 128
    """Side of a video's pictures."""

    def __post_init__(self) -> None:
        info = (task := make_task(self.uri, max_episode_steps=self.episode_length)).info
        task.close()
        self.task = self.uri
        self.features = {"action": PolicyFeature(FeatureType.ACTION, (info.action_dim,))}
        self.features["agent_pos"] = PolicyFeature(FeatureType.STATE, (info.state_dim,))
        self.features_map = {"action": "action", "agent_pos": STATE}
        for name, shape in info.cameras.items():
            self.features[f"pixels/{name}"] = PolicyFeature(FeatureType.VISUAL, shape)
            self.features_map[f"pixels/{name}"] = IMAGE_PREFIX + name

    @property
    def gym_kwargs(self) -> dict:
        """Unused: `create_envs` makes them."""
        return {}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, VectorEnv]]:
        """``{"dsrl": {0: vector environment}}``."""
        make = [partial(LeRobotTask, self.uri, self.episode_length, self.frame)] * n_envs
        if use_async_envs and n_envs > 1:
            return {"dsrl": {0: AsyncVectorEnv(make, context="spawn", autoreset_mode=AutoresetMode.SAME_STEP)}}
        return {"dsrl": {0: SyncVectorEnv(make, autoreset_mode=AutoresetMode.SAME_STEP)}}
