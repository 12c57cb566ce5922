"""Tasks with a person beside them: somebody may take over, judge, or call an episode off.

A chunk of such a task ends early where the hands change: a decision is wholly the policy's or wholly a person's.
"""

from __future__ import annotations

import abc
import enum
from typing import Any

import numpy as np

from .base import ChunkEnv, TaskEnv


class Ending(enum.StrEnum):
    """How an episode was ended, by word of the operator or by what its reward says."""

    SUCCESS = "success"
    FAILURE = "failure"
    CUT = "cut"
    """Called off, and kept as far as it went: truncated there."""
    DISCARD = "discard"
    """Called off, and not kept; the next one begins."""
    REDO = "redo"
    """Called off, and played again."""


TERMINAL = frozenset({Ending.SUCCESS, Ending.FAILURE})
VOID = frozenset({Ending.DISCARD, Ending.REDO})


class LiveTask(TaskEnv):
    """A task that listens to an operator.

    After `attend` and `advance` the attributes tell what the operator has said and what was done.
    """

    human: bool = False
    """Whether a person is driving."""
    ending: Ending | None = None
    executed: np.ndarray
    """The action (A,) that was really executed: the person's, or the policy's behind the guards."""
    dry_run: bool = False
    """Nothing moves; what is collected so is no experience."""
    fps: float = 0.0
    """Steps per second."""

    @abc.abstractmethod
    def attend(self) -> None:
        """A decision begins: hear what was said while the base was thinking; steps are timed from here."""

    @abc.abstractmethod
    def verdict(self) -> float:
        """The reward of the step after which the operator said `ending`."""

    @abc.abstractmethod
    def stop(self) -> None:
        """The episode is over: stand still."""

    @abc.abstractmethod
    def taken(self) -> dict[str, np.ndarray]:
        """Every step of the episode since `begin`, as columns (T, …) of the offline format, and ``human``."""

    def report(self) -> dict[str, float]:
        """How well the rate was kept, and how often the guards had to act."""
        return {}

    def chunked(self, chunk: int) -> ChunkEnv:
        return LiveChunkEnv(self, chunk)

    def step(self, action: np.ndarray):
        observation, reward, terminated, truncated, info = super().step(action)
        truncated = truncated or (self.ending is not None and not terminated)
        if terminated or truncated:
            self.stop()
        return observation, reward, terminated, truncated, info | {"ending": str(self.ending or "")}


class LiveChunkEnv(ChunkEnv):
    """A live task whose one action is a chunk; a chunk of NaN stands for "whatever the person does", and is no
    policy's: see `VectorTask.step`.

    ``info`` has, beyond `ChunkEnv`'s: ``executed`` float32 (k, A), the last action held beyond ``steps``;
    ``human``; and ``ending``, an `Ending` or empty. ``steps`` is 0 where the operator spoke before the first
    step: ``rewards[0]`` then is what that adds to the reward of the step before.
    """

    env: LiveTask
    _last = 0.0

    def reset(self, **options: Any):
        self._last = 0.0
        return super().reset(**options)

    def step(self, action: np.ndarray):
        env = self.env
        env.attend()
        human, steps = env.human, 0
        rewards = np.zeros(self.chunk)
        executed = np.zeros_like(action)
        if env.ending:
            rewards[0] = env.verdict() - self._last
        absent = bool(np.isnan(action).all())  # nobody chose this chunk
        limit = self.info.max_episode_steps
        for row in action if not (absent and not human) else ():
            if env.ending or env.human != human or self._steps >= limit:
                break
            rewards[steps], _, _ = env.advance(row)
            self._last = float(rewards[steps])
            executed[steps:] = env.executed
            steps += 1
            self._steps += 1
        terminated = env.ending in TERMINAL
        truncated = not terminated and (env.ending is not None or self._steps >= limit)
        if terminated or truncated:
            env.stop()
        info: dict[str, Any] = {"success": env.ending is Ending.SUCCESS, "steps": steps, "rewards": rewards}
        info |= {"executed": executed, "human": human, "ending": str(env.ending or "")}
        return env.observe(), float(rewards.sum()), terminated, truncated, info

    def stop(self) -> None:
        """As `LiveTask.stop`."""
        self.env.stop()

    def taken(self) -> dict[str, np.ndarray]:
        """As `LiveTask.taken`."""
        return self.env.taken()

    def report(self) -> dict[str, float]:
        """As `LiveTask.report`."""
        return self.env.report()

    @property
    def human(self) -> bool:
        """Whether a person is driving, as far as has been heard."""
        return self.env.human

    @property
    def fps(self) -> float:
        """Steps per second."""
        return self.env.fps

    @property
    def dry_run(self) -> bool:
        """Whether nothing moves."""
        return self.env.dry_run
