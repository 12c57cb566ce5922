"""Half-trained experts for the Gymnasium tasks, by Stable-Baselines3, and what they do: the data a base is cloned on.

PPO for Hopper and Walker2d, SAC for HalfCheetah, each stopped once its stochastic policy earns about a third of what
experts do, as D4RL's "medium" policies were.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

Policy = Callable[[np.ndarray], np.ndarray]
"""States (B, S) to sampled actions (B, A)."""


@dataclass(frozen=True)
class Expert:
    """How the expert of a task is trained, and when that stops."""

    env: str
    algorithm: type[BaseAlgorithm]
    stop_at: float
    """Mean return of the newest episodes of the stochastic policy."""
    at_most: int
    """Environment steps, should it not get there."""


EXPERTS = {
    "hopper": Expert("Hopper-v5", PPO, 1300.0, 1_000_000),
    "walker2d": Expert("Walker2d-v5", PPO, 1500.0, 2_000_000),
    "halfcheetah": Expert("HalfCheetah-v5", SAC, 4000.0, 150_000),
}


class _Enough(BaseCallback):
    """Stops at a return; says now and then how far it is."""

    def __init__(self, stop_at: float, newest: int):
        super().__init__()
        self.stop_at, self.newest, self.said = stop_at, newest, 0

    def _on_step(self) -> bool:
        episodes = list(self.model.ep_info_buffer or [])[-self.newest :]
        mean = float(np.mean([e["r"] for e in episodes])) if len(episodes) == self.newest else -np.inf
        if self.num_timesteps - self.said >= 20_000:
            self.said = self.num_timesteps
            print(f"{self.num_timesteps} steps, return {mean:.0f}", flush=True)
        return mean < self.stop_at


def train(name: str, seed: int = 0) -> tuple[Policy, int]:
    """The expert's stochastic policy, and the environment steps it took."""
    expert = EXPERTS[name]
    torch.set_num_threads(1)
    if expert.algorithm is SAC:
        model: BaseAlgorithm = SAC("MlpPolicy", expert.env, learning_starts=5000, seed=seed, device="cpu")
        model.learn(expert.at_most, _Enough(expert.stop_at, 5))
        return lambda states: model.predict(states)[0], model.num_timesteps
    envs = VecNormalize(DummyVecEnv([lambda: _monitored(expert.env)] * 8), gamma=0.99)
    model = PPO("MlpPolicy", envs, n_steps=256, batch_size=128, seed=seed, device="cpu")
    model.learn(expert.at_most, _Enough(expert.stop_at, 100))
    return lambda states: model.predict(envs.normalize_obs(states))[0], model.num_timesteps


def _monitored(env: str) -> gym.Env:
    from stable_baselines3.common.monitor import Monitor

    return Monitor(gym.make(env))


def roll_out(name: str, policy: Policy, steps: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Episodes of at least `steps` steps in all: states (T, S) and actions (T, A), float32, and the return."""
    env, episodes, total = gym.make(EXPERTS[name].env), [], 0
    while total < steps:
        observation, _ = env.reset(seed=seed + len(episodes))
        states, actions, earned, over = [], [], 0.0, False
        while not over:
            action = policy(observation[None].astype(np.float32))[0]
            states.append(observation.astype(np.float32))
            actions.append(np.clip(action, env.action_space.low, env.action_space.high).astype(np.float32))
            observation, reward, terminated, truncated, _ = env.step(actions[-1])
            earned, over = earned + float(reward), terminated or truncated
        episodes.append((np.stack(states), np.stack(actions), earned))
        total += len(states)
    return episodes
