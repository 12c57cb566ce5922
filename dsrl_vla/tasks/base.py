"""What a task is: an environment that speaks LeRobot's observation dictionary, and its chunked form.

A task steps cheaply (`advance`) and is looked at seldom (`observe`): a policy that executes chunks of k
actions needs one image per chunk, and rendering is most of the cost of a simulated step.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import gymnasium as gym
import numpy as np

from ..errors import bad
from ..observation import IMAGE_PREFIX, STATE

Measured = Literal["success", "return"]


@dataclass(frozen=True)
class TaskInfo:
    """The public face of a task: what a base must accept and produce to be run on it."""

    uri: str
    prompt: str
    max_episode_steps: int
    state_dim: int
    action_dim: int
    cameras: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    reward_range: tuple[float, float] = (-1.0, 0.0)
    """Least and greatest reward of a step: what bounds a value estimate. -1 a step and 0 on the one that succeeds is
    what the defaults are for (`sac.reward_offset`); 0 and 1 would make idling worth more than success."""
    measure: Measured = "success"
    """What counts: the share of episodes that succeed or, where nothing is a success, their return."""
    scenes: int | None = None
    """How many episodes there are that begin differently, whatever the seed; None: as many as seeds."""
    live: bool = False
    """Whether an operator stands beside it; see `dsrl_vla.tasks.live`."""


class TaskEnv(gym.Env, abc.ABC):
    """A single-task environment.

    Observations: ``observation.images.<camera>`` uint8 (H, W, 3), ``observation.state`` float32 (S,).
    The prompt is constant and lives in `info.prompt`. Actions: float32 (A,) in environment units.
    An episode is a function of its seed alone: ``begin(seed)`` twice gives the same episode.
    """

    info: TaskInfo
    repeatable: bool = True
    """Whether an episode can be executed again: true of simulators, not of robots."""
    cut_short: bool = False
    """Whether the step just executed cut the episode off, other than by the time limit: it is truncated."""

    @abc.abstractmethod
    def begin(self, seed: int) -> None:
        """Start the episode that `seed` names."""

    @abc.abstractmethod
    def advance(self, action: np.ndarray) -> tuple[float, bool, bool]:
        """Execute one action (A,); return (reward, success, terminated). No observation is made."""

    @abc.abstractmethod
    def observe(self) -> dict[str, np.ndarray]:
        """Observe the present state (renders the cameras)."""

    @abc.abstractmethod
    def frame(self, size: int = 256) -> np.ndarray:
        """A picture for people, uint8 (size, size, 3)."""

    def chunked(self, chunk: int) -> ChunkEnv:
        """This task with chunks of `chunk` actions for its actions."""
        return ChunkEnv(self, chunk)

    def build_spaces(self) -> None:
        """Set the observation and action spaces that `info` implies; call it once `info` is there."""
        spaces: dict[str, gym.Space] = {
            IMAGE_PREFIX + name: gym.spaces.Box(0, 255, shape, np.uint8) for name, shape in self.info.cameras.items()
        }
        spaces[STATE] = gym.spaces.Box(-np.inf, np.inf, (self.info.state_dim,), np.float32)
        self.observation_space = gym.spaces.Dict(spaces)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (self.info.action_dim,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self._steps = 0
        self.begin(int(self.np_random.integers(2**31)) if seed is None else seed)
        return self.observe(), {"success": False}

    def step(self, action: np.ndarray):
        reward, success, terminated = self.advance(np.asarray(action, dtype=np.float32))
        self._steps += 1
        truncated = not terminated and (self.cut_short or self._steps >= self.info.max_episode_steps)
        return self.observe(), reward, terminated, truncated, {"success": success}


Expert = Callable[[float], np.ndarray]
"""A scripted expert: acts (A,) on the present state, seeing the object so many metres to the side along x."""


class Demonstrable(TaskEnv):
    """A task that comes with an expert, so that a base can be cloned on it."""

    @abc.abstractmethod
    def expert(self) -> Expert:
        """A fresh expert for the episode that has just begun."""

    @abc.abstractmethod
    def whereabouts(self) -> np.ndarray:
        """float32 (6,): xyz of the first object and of the goal, in metres; what an image should tell."""


class ChunkEnv(gym.Env):
    """A task whose one action is a whole chunk, float32 (k, A), executed open loop.

    ``info`` of a step: ``steps`` (how many of the k were executed), ``rewards`` float64 (k,), zero beyond
    them, and ``success``. The chunk stops early when the episode ends inside it. The step's scalar reward is
    the plain sum; discounting belongs to the learner, which knows gamma. Reset without a seed, when it has been
    reset before, it rests where it is until it is given one: a step executes and renders nothing.
    """

    def __init__(self, env: TaskEnv, chunk: int):
        if chunk < 1:
            raise bad("chunk", "a positive number of steps", chunk)
        self.env, self.chunk, self.info = env, chunk, env.info
        self.repeatable = env.repeatable
        self._seen: dict[str, np.ndarray] = {}
        self.under_way: tuple[int, Sequence[np.ndarray]] = (0, ())
        """Seed and executed chunks of the episode that `restore` is to bring back."""
        self.observation_space = env.observation_space
        low, high = env.action_space.low, env.action_space.high  # type: ignore[attr-defined]
        self.action_space = gym.spaces.Box(np.tile(low, (chunk, 1)), np.tile(high, (chunk, 1)), dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self._resting = seed is None and bool(self._seen)
        if self._resting:
            return self._seen, {}
        self._steps, first = 0, not self._seen
        self._seen, info = self.env.reset(seed=seed, options=options)
        if first:
            self._check_seen()
        return self._seen, info

    def step(self, action: np.ndarray):
        rewards = np.zeros(self.chunk)
        if self._resting:
            return self._seen, 0.0, False, False, {"success": False, "steps": 0, "rewards": rewards}
        steps, success, terminated = 0, False, False
        over = False
        for row in action:
            told = self.env.advance(row)
            if not isinstance(told, tuple) or len(told) != 3:
                got = f"{len(told)} values" if isinstance(told, tuple) else type(told).__name__
                raise bad(f"task {self.info.uri}: advance()", "reward, success, terminated", got)
            rewards[steps], success, terminated = told
            self._check_reward(float(rewards[steps]))
            steps += 1
            self._steps += 1
            over = self.env.cut_short or self._steps >= self.info.max_episode_steps
            if terminated or over:
                break
        self._seen = self.env.observe()
        info = {"success": bool(success), "steps": steps, "rewards": rewards}
        return self._seen, float(rewards.sum()), terminated, over and not terminated, info

    def _check_seen(self) -> None:
        """Refuse an observation that is not as the task's own `info` has it."""
        named, spaces = f"task {self.info.uri}: observe()", self.observation_space
        if not isinstance(self._seen, Mapping):
            raise bad(named, "a dictionary", type(self._seen).__name__)
        for name, space in spaces.items():  # type: ignore[attr-defined]
            if name not in self._seen:
                raise bad(named, f"'{name}' in it", ", ".join(map(str, self._seen)) or "nothing")
            value = np.asarray(self._seen[name])
            if value.shape != space.shape or (name != STATE and value.dtype != np.uint8):
                raise bad(f"{named}: {name}", f"{space.dtype} of shape {space.shape}", f"{value.dtype} {value.shape}")

    def _check_reward(self, reward: float) -> None:
        """Refuse one beyond what the task says: values are bounded by that, and would be wrong without a word."""
        low, high = self.info.reward_range  # one that is not a number ends an episode; see `faults`
        if not low - 1e-6 <= reward <= high + 1e-6 and math.isfinite(reward):
            fix = "Give 0.0 to the step that succeeds and -1.0 to others, or say its TaskInfo.reward_range."
            raise bad(f"task {self.info.uri}: reward", f"within [{low:g}, {high:g}]", reward, fix)

    def restore(self) -> dict[str, np.ndarray]:
        """Execute the episode in `under_way` again; return what is then observed."""
        seed, chunks = self.under_way
        observation, _ = self.reset(seed=seed)
        for chunk in chunks:
            observation, *_ = self.step(chunk)
        return observation

    def close(self) -> None:
        self.env.close()
