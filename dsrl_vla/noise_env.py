"""A frozen base and a task as one gymnasium environment whose action is the base's noise.

Any reinforcement learning library can then steer any base. One step is one decision: the action is a latent, the
layout expands it to noise, the base turns that into a chunk, and the task executes the chunk.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch

from .errors import bad
from .noise import NoiseLayout
from .observation import PROMPT, STATE, unsqueeze
from .policy import Encoding, FrozenPolicy
from .probing import probe
from .tasks import ChunkEnv, TaskEnv


class NoiseEnv(gym.Env):
    """Steer `base` on `task`.

    Observation: float32 (S + F,), the robot's state followed by the base's pooled feature. Action: float32 (n * d,) in
    [-1, 1], the layout's latent, row by row. Reward: the sum of the chunk's rewards, each with `reward_offset` added
    and discounted by `gamma` within the chunk. ``info``: ``success`` and ``steps``, environment steps executed.
    `base_calls` counts prefix passes: one per observation.

    A library that discounts by its own gamma per step should be given ``gamma ** executed_steps``.

    Args:
        layout: or its name, for one of bound 1.5.
        gamma: discount per environment step within a chunk; 1 sums.
        reward_offset: added to every step's reward; 1 makes -1 per step and 0 at success read 0 and 1.
        check: probe the base first; raises NotSteerableError when it cannot be steered.

    Raises:
        DsrlError: the base does not fit the task.
    """

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(
        self,
        base: FrozenPolicy,
        task: TaskEnv,
        layout: NoiseLayout | str = "repeat",
        *,
        gamma: float = 1.0,
        reward_offset: float = 0.0,
        check: bool = True,
    ):
        if not 0 < gamma <= 1:
            raise bad("gamma", "above 0 and at most 1", gamma)
        base.check_task(task.info)
        if task.info.live:
            raise bad("NoiseEnv", "a simulated task", f"'{task.info.uri}', where an operator has a say")
        if isinstance(layout, str):
            layout = NoiseLayout(base.spec.noise, layout)
        if layout.space != base.spec.noise:
            raise bad("layout", f"one over the base's noise space {base.spec.noise}", f"{layout.space}")
        self.base, self.layout, self.gamma, self.reward_offset = base, layout, gamma, reward_offset
        self.task, self.render_mode = ChunkEnv(task, base.spec.executed_steps), "rgb_array"
        self.base_calls = 0
        width = base.spec.observation.state_dim + base.spec.feature_dim
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (width,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (int(np.prod(layout.latent_shape)),), np.float32)
        if check:
            probe(base, {**task.reset(seed=0)[0], PROMPT: task.info.prompt})

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        number = int(self.np_random.integers(2**31)) if seed is None else seed
        observation, info = self.task.reset(seed=number)
        return self._see(observation), info | {"steps": 0}

    def step(self, action: np.ndarray):
        latent = torch.as_tensor(np.asarray(action, np.float32)).view(1, 1, *self.layout.latent_shape)
        chunk = self.base.denoise(self._encoding, self.layout.expand(latent))[0, 0, : self.base.spec.executed_steps]
        observation, _, terminated, truncated, info = self.task.step(chunk.numpy())
        k = info["steps"]
        reward = float(((info["rewards"][:k] + self.reward_offset) * self.gamma ** np.arange(k)).sum())
        seen = self._see(observation)
        info = {"success": info["success"], "steps": k}
        return seen, reward, terminated, truncated, info

    def render(self) -> np.ndarray:
        """A picture for people, uint8 (256, 256, 3)."""
        return self.task.env.frame()

    def close(self) -> None:
        """Close the task."""
        self.task.close()

    def _see(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        """One prefix pass; it serves the observation and the decision that follows."""
        self._encoding: Encoding = self.base.encode(unsqueeze({**observation, PROMPT: self.task.info.prompt}))
        self.base_calls += 1
        feature = self._encoding.feature
        parts = [observation[STATE]] + ([] if feature is None else [feature[0].cpu().numpy()])
        return np.concatenate(parts).astype(np.float32)
