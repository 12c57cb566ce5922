"""``gymnasium:<id>``: any registered Gymnasium environment with vectors for observations and actions.

State, float32 (S,): the environment's observation. Action, float32 (A,): its own, cut to its box. Reward: its own.
There is no success in it: such a task is measured by the return of whole episodes. The time limit is the task's, so
that an episode that ran out of time can be told from one that ended; an environment that cuts one short is heard.
"""

from __future__ import annotations

import contextlib
import io
import math
from typing import Any

import gymnasium as gym
import numpy as np

from ..errors import bad, missing_extra, unknown
from ..observation import STATE
from .base import TaskEnv, TaskInfo
from .rendering import choose_backend

_LIMIT = 1000
"""Steps of an episode where neither the recipe nor the registration says."""


def make(name: str, *, max_episode_steps: int | None = None, uri: str = "") -> GymnasiumTask:
    """Make the environment registered as `name`, for instance ``Hopper-v5``, or ``package:Name-v0``.

    Raises:
        UnknownNameError: no such environment. MissingExtraError: its simulator is not installed.
        DsrlError: observations or actions that are not vectors of real numbers.
    """
    if max_episode_steps is not None and max_episode_steps < 1:
        raise bad("task.max_episode_steps", "1 or more", max_episode_steps)
    choose_backend()
    try:
        # Gymnasium prints a warning for every environment older than the newest.
        with contextlib.redirect_stderr(io.StringIO()):
            env = _made(name)
    except gym.error.DependencyNotInstalled as error:
        if "mujoco" not in str(error).lower():
            raise bad(f"task 'gymnasium:{name}'", "its simulator to be installed", f"{error}") from error
        raise missing_extra("mujoco", "mujoco", f"the task 'gymnasium:{name}'") from error
    except (gym.error.Error, ModuleNotFoundError) as error:
        raise unknown("Gymnasium environment", name, gym.registry) from error
    registered = env.spec.id if env.spec else name  # with its version, and without the module that registers it
    limit = max_episode_steps or gym.spec(registered).max_episode_steps or _LIMIT
    return GymnasiumTask(env, limit, uri or f"gymnasium:{name}")


def _made(name: str) -> gym.Env:
    """With pictures where the environment has any."""
    try:
        return gym.make(name, max_episode_steps=-1, render_mode="rgb_array")
    except TypeError:  # a constructor that takes no render_mode; what else is wrong is raised again
        return gym.make(name, max_episode_steps=-1)


class GymnasiumTask(TaskEnv):
    """A Gymnasium environment as a task."""

    def __init__(self, env: gym.Env, max_episode_steps: int, uri: str):
        self.env = env
        state, action = _width(uri, "observation", env.observation_space), _width(uri, "action", env.action_space)
        self.info = TaskInfo(
            uri, "", max_episode_steps, state, action, reward_range=(-math.inf, math.inf), measure="return"
        )
        self.build_spaces()
        self.action_space = env.action_space

    def begin(self, seed: int) -> None:
        self.raw, _ = self.env.reset(seed=seed)
        self.cut_short = False

    def advance(self, action: np.ndarray) -> tuple[float, bool, bool]:
        box: Any = self.action_space
        self.raw, reward, terminated, self.cut_short, _ = self.env.step(
            np.clip(action, box.low, box.high).astype(box.dtype)
        )
        return float(reward), False, bool(terminated)

    def observe(self) -> dict[str, np.ndarray]:
        return {STATE: np.asarray(self.raw, dtype=np.float32)}

    def frame(self, size: int = 256) -> np.ndarray:
        from PIL import Image

        if self.env.render_mode is None or "rgb_array" not in self.env.metadata.get("render_modes", ()):
            return np.zeros((size, size, 3), dtype=np.uint8)
        picture: Any = self.env.render()
        return np.asarray(Image.fromarray(picture).resize((size, size)))

    def close(self) -> None:
        self.env.close()


def _width(uri: str, what: str, space: gym.Space) -> int:
    """Of a space of vectors."""
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
        raise bad(f"task {uri}: {what}", "a Box with one axis", f"{space}", "Wrap it as a TaskEnv of your own.")
    return space.shape[0]
