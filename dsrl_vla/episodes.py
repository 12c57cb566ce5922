"""Whole episodes of a base under a source of noise: what validation, evaluation, preflight and search are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .faults import Faults, seen_rows
from .noise import generators
from .observation import STATE
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
        TooManyFaultsError: `faults`, or twenty by default, ended so. DsrlError: a robot's state is not finite.
    """
    faults, table, executed = faults or Faults(), _Table(task, seeds, trial), base.spec.executed_steps
    observations = task.reset(table.first)
    while len(table.done) < table.total:
        sound = seen_rows(observations)
        if not sound.all() and not task.info.live:  # the base refuses it, and is to go on for the others
            state = np.where(sound[:, None], observations[STATE], np.float32(0))
            observations = {**observations, STATE: state}
        if task.driven:
            result = task.step(None)
        else:
            encoding = base.encode(observations)
            result = task.step(source.actions(base, observations, encoding, table.streams)[:, 0, :executed].numpy())
        observations = result.observations
        table.add(result)
        if (over := result.done | ~sound).any():
            fresh: list[int | None] = [None] * len(over)
            for i in map(int, np.flatnonzero(over)):
                if not sound[i] and table.now[i] is not None:
                    faults.add("episode", f"episode of seed {table.now[i]}: an observation that is not finite")
                if not result.void[i] and (episode := table.close(i, bool(result.success[i] and sound[i]))):
                    on_episode(episode)
                fresh[i] = table.begin(i)
            if len(table.done) < table.total:
                observations = task.reset(fresh, resting=[seed is None for seed in table.now])
    return [table.done[uri, seed] for uri in task.config.uris for seed in seeds]


class _Table:
    """Which episode every environment plays, how far it is, and how those that are over went."""

    def __init__(self, task: VectorTask, seeds: Sequence[int], trial: int):
        self.task, self.trial = task, trial
        self.queues = {uri: list(seeds) for uri in task.config.uris}
        self.total = len(seeds) * len(self.queues)
        self.done: dict[tuple[str, int], Episode] = {}
        count = task.config.num_envs
        self.now = [self._take(i) for i in range(count)]
        """Every environment's seed; None: it has nothing to play."""
        self.first = [seeds[0] if seed is None else seed for seed in self.now]
        """Of the first reset, which is everybody's."""
        self.streams = episode_generators(self.first, trial)
        self.steps, self.rewards, self.helped = np.zeros(count, int), np.zeros(count), np.zeros(count, bool)

    def _take(self, i: int) -> int | None:
        queue = self.queues[self.task.uris[i]]
        return queue.pop(0) if queue else None

    def add(self, result: ChunkResult) -> None:
        """Count a chunk in every environment."""
        self.steps += result.steps
        self.rewards += result.rewards.sum(1)
        self.helped |= result.human

    def close(self, i: int, success: bool) -> Episode | None:
        """Book the episode that environment i has ended, if it played one, and let it take the next."""
        seed, uri = self.now[i], self.task.uris[i]
        self.now[i] = self._take(i)
        if seed is None:
            return None
        success, steps, reward = success and not self.helped[i], int(self.steps[i]), float(self.rewards[i])
        self.done[uri, seed] = Episode(seed, bool(success), steps, reward, uri, self.task.infos[i].measure)
        return self.done[uri, seed]

    def begin(self, i: int) -> int | None:
        """The seed that environment i is to be reset with, from the start; None: it rests."""
        self.steps[i], self.rewards[i], self.helped[i] = 0, 0.0, False
        if (seed := self.now[i]) is not None:
            self.streams[i] = episode_generators([seed], self.trial)[0]
        return seed
