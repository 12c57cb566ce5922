"""Collection: run the head (or base noise, while warming up) and fill the replay."""

from __future__ import annotations

from collections import deque

import numpy as np
import torch

from .head import HeadInputs, SteeringHead
from .latent_sac import SACConfig
from .n_step import Decision, NStepWindows
from .noise_bank import Keeper
from .observation import select
from .policy import Encoding, FrozenPolicy
from .replay import Replay
from .rollout import ChunkResult, VectorTask, episode_generators
from .watch import Finished


class Collector:
    """Steps a vector task one decision at a time; one prefix pass each, plus one for episodes that time out.

    Owns the order of training episodes: episode i of a run has seed ``first_seed + i``.
    """

    def __init__(
        self,
        base: FrozenPolicy,
        head: SteeringHead,
        task: VectorTask,
        replay: Replay,
        *,
        sac: SACConfig,
        first_seed: int,
        keeper: Keeper | None = None,
    ):
        self.base, self.head, self.task, self.replay = base, head, task, replay
        self.sac, self.first_seed, self.keeper = sac, first_seed, keeper or Keeper()
        self.episodes = self.env_steps = self.decisions = 0
        self.recent: deque[bool] = deque(maxlen=50)
        self.finished: deque[Finished] = deque(maxlen=20)
        self._start()

    def _next_seed(self) -> int:
        self.episodes += 1
        return self.first_seed + self.episodes - 1

    def _start(self) -> None:
        seeds = [self._next_seed() for _ in range(self.task.config.num_envs)]
        self.streams = episode_generators(seeds)
        self.observations = self.task.reset(seeds)
        self.windows = NStepWindows(self.sac.n_step, len(seeds), self.replay.add)
        self.open: list[list[Decision]] = [[] for _ in seeds]

    def resume(self, episodes: int, env_steps: int, decisions: int) -> None:
        """Go on counting from a checkpoint; episodes that were under way start anew, with new seeds."""
        self.episodes, self.env_steps, self.decisions = episodes, env_steps, decisions
        self._start()

    def restore(self) -> int:
        """Take in episodes that are on the disk and in no checkpoint; return how many. A simulator has none."""
        return 0

    @torch.no_grad()
    def step(self, warm_up: bool) -> None:
        """One decision in every environment."""
        encoding = self.base.encode(self.observations)
        inputs = self.head.read(self.observations, encoding)
        numbers = self._store(inputs, encoding)
        self.windows.observed(np.arange(len(numbers)), numbers)
        layout = self.head.layout
        latent = layout.sample(self.streams)[:, 0] if warm_up else self.head.latent(inputs, self.streams)
        chunks, extras = self.keeper.denoise(self.base, encoding, self.head, inputs, latent, self.streams)
        self.replay.attach(numbers, extras)
        result = self.task.step(chunks.numpy())
        reward = self.sac.chunk_reward(result.rewards, result.steps)
        discount = np.where(result.terminated, 0.0, self.sac.gamma**result.steps)
        self.env_steps += int(result.steps.sum())
        self.decisions += len(numbers)
        for row, number in enumerate(numbers):
            decision = Decision(int(number), latent[row], float(reward[row]), float(discount[row]))
            self.windows.push(row, decision)
            self.open[row].append(decision)
        self.observations = result.observations
        if result.done.any():
            self._finish(result)

    def _store(self, inputs: HeadInputs, encoding: Encoding) -> np.ndarray:
        """Store a batch of observations with what is to be kept of each; return their numbers."""
        numbers = self.replay.observe(inputs)
        self.replay.attach(numbers, self.keeper.observed(self.base, encoding))
        return numbers

    def _finish(self, result: ChunkResult) -> None:
        """Complete the transitions of finished episodes and start new ones. A timeout bootstraps."""
        late = np.flatnonzero(result.truncated & ~result.terminated)
        if len(late):
            final = select(result.observations, list(late))
            encoding = self.base.encode(final)
            for row, number in zip(late, self._store(self.head.read(final, encoding), encoding), strict=True):
                self.windows.truncated(int(row), int(number))
        for row in np.flatnonzero(result.terminated):
            self.windows.terminated(int(row))
        seeds: list[int | None] = [None] * len(result.done)
        for i in np.flatnonzero(result.done):
            self.recent.append(bool(result.success[i]))
            self.finished.append(Finished.of(self.open[i]))
            self.open[i] = []
            seeds[i] = self._next_seed()
            self.streams[i] = episode_generators([seeds[i]])[0]  # type: ignore[list-item]
        self.observations = self.task.reset(seeds)

    @property
    def success(self) -> float:
        """Share of successes among the last 50 finished episodes.

        NaN until every environment has finished about two: the first to finish are the successes.
        """
        enough = len(self.recent) >= 2 * self.task.config.num_envs
        return float(np.mean(self.recent)) if enough else float("nan")
