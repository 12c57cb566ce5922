"""Whole episodes of a base under a source of noise: what validation, evaluation, preflight and search are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .errors import bad
from .faults import Faults, seen_rows
from .noise import generators
from .observation import STATE, Observations
from .policy import FrozenPolicy
from .rollout import ChunkResult, VectorTask
from .sources import NoiseSource
from .tasks.base import Measured

_NOISE_STREAM = 7919  # separates an episode's noise from its environment's draws


@dataclass(frozen=True)
class Episode:
    """How one episode went."""

    seed: int
    success: bool
    steps: int
    reward: float
    task: str = ""
    """The task's URI."""
    measure: Measured = "success"
    """What counts there; see `dsrl_vla.measures`."""


def episode_generators(seeds: Sequence[int], trial: int = 0) -> list[torch.Generator]:
    """The noise generators of episodes; `trial` gives other noise on the same episode."""
    return generators([seed * _NOISE_STREAM + trial for seed in seeds])


def run_episodes(
    base: FrozenPolicy,
    task: VectorTask,
    source: NoiseSource,
    seeds: Sequence[int],
    *,
    trial: int = 0,
    on_episode: Callable[[Episode], None] = lambda _: None,
    faults: Faults | None = None,
) -> list[Episode]:
    """Run one episode per seed and task; return them task by task, each in the order of `seeds`.

    The same seeds give the same environments and, from the same source, the same noise: runs are paired.
    Where an operator says that an episode does not count, it is played again; one in which a person took over is
    no success of the policy's. A simulator's state that is not finite ends its episode, which is no success either.

    Raises:
        TooManyFaultsError: `faults`, or twenty by default, ended so. DsrlError: a robot's state is not finite, or one
            of a task that is measured by its return.
    """
    table, executed = _Table(task, seeds, trial, on_episode, faults or Faults()), base.spec.executed_steps
    observations = table.start()
    while table.left:
        if task.driven:
            result = task.step(None)
        else:
            encoding = base.encode(observations)
            result = task.step(source.actions(base, observations, encoding, table.streams)[:, 0, :executed].numpy())
        observations = table.after(result)
    return [table.done[uri, seed] for uri in task.config.uris for seed in seeds]


class _Table:
    """Which episode every environment plays, how far it is, and how those that are over went."""

    def __init__(
        self, task: VectorTask, seeds: Sequence[int], trial: int, on_episode: Callable[[Episode], None], faults: Faults
    ):
        self.task, self.trial, self.on_episode, self.faults = task, trial, on_episode, faults
        self.queues = {uri: list(seeds) for uri in task.config.uris}
        self.left = len(seeds) * len(self.queues)
        """Episodes that are not over."""
        self.done: dict[tuple[str, int], Episode] = {}
        count = task.config.num_envs
        self.now = [self._take(i) for i in range(count)]
        """Every environment's seed; None: it has nothing to play."""
        self.first = [seeds[0] if seed is None else seed for seed in self.now]
        self.streams = episode_generators(self.first, trial)
        self.steps, self.rewards, self.helped = np.zeros(count, int), np.zeros(count), np.zeros(count, bool)

    def start(self) -> Observations:
        """Begin everywhere; return what is observed."""
        observations = self.task.reset(self.first)
        return self._go_on(observations, self._lost(~seen_rows(observations)))

    def after(self, result: ChunkResult) -> Observations:
        """Count a chunk in every environment, and begin anew where an episode is over; return what is observed."""
        self.steps += result.steps
        self.rewards += np.nan_to_num(result.rewards, nan=0.0, posinf=0.0, neginf=0.0).sum(1)
        self.helped |= result.human
        lost = self._lost(~np.isfinite(result.rewards).all(1) | ~(result.done | seen_rows(result.observations)))
        for i in map(int, np.flatnonzero(result.done & ~lost & ~result.void)):
            self._close(i, bool(result.success[i] and not self.helped[i]))
        return self._go_on(result.observations, result.done | lost)

    def _go_on(self, observations: Observations, over: np.ndarray) -> Observations:
        """Reset what is over, until all that play see something finite."""
        while self.left and over.any():
            fresh = [self._begin(i) if ended else None for i, ended in enumerate(over)]
            observations = self.task.reset(fresh, resting=self._idle)
            over = self._lost(over & ~seen_rows(observations))
        if any(self._idle) and not seen_rows(observations).all():  # what rests may rest in a state that bases refuse
            state = np.where(np.array(self._idle)[:, None], np.float32(0), observations[STATE])
            observations = {**observations, STATE: state}
        return observations

    def _lost(self, ill: np.ndarray) -> np.ndarray:
        """Book what is not finite and not a robot's as lost; return where that was."""
        lost = ill & ~np.array(self._idle) & (not self.task.info.live)
        for i in map(int, np.flatnonzero(lost)):
            if self.task.infos[i].measure != "success":
                words = "finite rewards and observations, for its return is measured"
                raise bad(f"task '{self.task.uris[i]}', episode of seed {self.now[i]}", words, "NaN or infinity")
            self.faults.add("episode", f"episode of seed {self.now[i]}: a reward or observation that is not finite")
            self._close(i, success=False)
        return lost

    @property
    def _idle(self) -> list[bool]:
        """Which environments have nothing to play."""
        return [seed is None for seed in self.now]

    def _take(self, i: int) -> int | None:
        queue = self.queues[self.task.uris[i]]
        return queue.pop(0) if queue else None

    def _close(self, i: int, success: bool) -> None:
        """Book the episode that environment i has ended, if it played one, and let it take the next."""
        seed, uri = self.now[i], self.task.uris[i]
        self.now[i] = self._take(i)
        if seed is not None:
            steps, reward = int(self.steps[i]), float(self.rewards[i])
            self.done[uri, seed] = Episode(seed, success, steps, reward, uri, self.task.infos[i].measure)
            self.left -= 1
            self.on_episode(self.done[uri, seed])

    def _begin(self, i: int) -> int | None:
        """The seed that environment i is to be reset with, from the start; None: it rests."""
        self.steps[i], self.rewards[i], self.helped[i] = 0, 0.0, False
        if (seed := self.now[i]) is not None:
            self.streams[i] = episode_generators([seed], self.trial)[0]
        return seed
