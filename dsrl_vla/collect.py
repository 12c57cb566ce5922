"""Collection: run the head (or random noise in its layout, while warming up) and fill the replay."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

from .collecting import AnyCollector
from .faults import Faults, finite_rows, seen_rows
from .head import HeadInputs, SteeringHead
from .latent_sac import SACConfig
from .n_step import Decision, NStepWindows
from .noise_bank import Keeper
from .observation import STATE, select
from .policy import Encoding, FrozenPolicy
from .replay import Store
from .rollout import ChunkResult, VectorTask
from .run_dir import part
from .under_way import UnderWay
from .watch import Finished

log = logging.getLogger(__name__)


def _made_finite(rows: dict[str, torch.Tensor], sound: np.ndarray) -> dict[str, torch.Tensor]:
    """Rows as they are; where one is unsound, all of them with 0 for NaN: statistics are taken of what is stored."""
    if sound.all():
        return rows
    return {k: v.nan_to_num(0.0, 0.0, 0.0) if v.is_floating_point() else v for k, v in rows.items()}


class Collector(AnyCollector):
    """Steps a vector task one decision at a time; one prefix pass each, plus one for episodes that time out.

    Owns the order of training episodes: episode i of a run has seed ``first_seed + i seed_step``.
    """

    def __init__(
        self,
        base: FrozenPolicy,
        head: SteeringHead,
        task: VectorTask,
        replay: Store,
        *,
        sac: SACConfig,
        first_seed: int,
        seed_step: int = 1,
        keeper: Keeper | None = None,
        faults: Faults | None = None,
    ):
        super().__init__(task.config.num_envs, faults)
        self.base, self.head, self.task, self.replay = base, head, task, replay
        self.sac, self.first_seed, self.seed_step, self.keeper = sac, first_seed, seed_step, keeper or Keeper()
        self._start()

    def _begin(self) -> UnderWay:
        self.episodes += 1
        return UnderWay.begin(self.first_seed + self.seed_step * (self.episodes - 1))

    def _start(self) -> None:
        count = self.num_envs
        self.rows = [self._begin() for _ in range(count)]
        self.windows = NStepWindows(self.sac.n_step, count, self.replay.add)
        self.observations = self.task.reset([row.seed for row in self.rows])
        self._restart(self._unsound())

    @property
    def streams(self) -> list[torch.Generator]:
        """The noise generators of the episodes under way."""
        return [row.stream for row in self.rows]

    @torch.no_grad()
    def step(self, warm_up: bool) -> None:
        """One decision in every environment.

        What is not finite is not learnt from: the episode it turns up in is dropped, and a new one begun.

        Raises:
            TooManyFaultsError: that has happened too often.
        """
        encoding = self.base.encode(self.observations)
        inputs = self.head.read(self.observations, encoding)
        count = len(self.rows)
        numbers, sound = self._store(inputs, encoding)
        layout = self.head.layout
        latent = layout.sample(self.streams)[:, 0] if warm_up else self.head.latent(inputs, self.streams)
        chunks, extras = self.keeper.denoise(self.base, encoding, self.head, inputs, latent, self.streams)
        sound &= finite_rows({"latent": latent, "chunk": chunks} | extras, count)
        chunks[torch.from_numpy(~sound)] = 0.0
        self.replay.attach(numbers, _made_finite(extras, sound))
        self.windows.observed(np.flatnonzero(sound), numbers[sound])
        result = self.task.step(chunks.numpy())
        sound &= np.isfinite(result.rewards).all(1) & seen_rows(result.observations)
        reward = self.sac.chunk_reward(result.rewards, result.steps)
        if self.sac.timeouts == "terminal":
            result.terminated |= result.truncated
        discount = np.where(result.terminated, 0.0, self.sac.chunk_discount(result.steps))
        self.env_steps += int(result.steps.sum())
        self.decisions += count
        for row in np.flatnonzero(sound):
            decision = Decision(int(numbers[row]), latent[row], float(reward[row]), float(discount[row]))
            self.windows.push(int(row), decision)
            self.rows[row].add(decision, chunks[row].numpy())
        self.observations = result.observations
        if (result.done | ~sound).any():
            self._finish(result, sound)

    def _store(self, inputs: HeadInputs, encoding: Encoding) -> tuple[np.ndarray, np.ndarray]:
        """Store a batch of observations with what is kept of each; return their numbers, and which are finite."""
        kept = self.keeper.observed(self.base, encoding)
        sound = finite_rows(inputs | kept, encoding.batch)
        numbers = self.replay.observe(_made_finite(inputs, sound))
        self.replay.attach(numbers, _made_finite(kept, sound))
        return numbers, sound

    def _finish(self, result: ChunkResult, sound: np.ndarray) -> None:
        """Complete the transitions of finished episodes and start new ones. A timeout bootstraps."""
        late = np.flatnonzero(result.truncated & ~result.terminated & sound)
        if len(late):
            final = select(result.observations, list(late))
            encoding = self.base.encode(final)
            numbers, sound[late] = self._store(self.head.read(final, encoding), encoding)
            for row, number in zip(late, numbers, strict=True):
                if sound[row]:
                    self.windows.truncated(int(row), int(number))
        for row in np.flatnonzero(result.terminated & sound):
            self.windows.terminated(int(row))
        for row in np.flatnonzero(~sound):
            self.windows.drop(int(row))
            words = f"episode of seed {self.rows[row].seed}: a reward, observation or action that is not finite"
            self.faults.add("episode", words)
        for row in np.flatnonzero(result.done & sound):
            self.recent.append(bool(result.success[row]))
            self.finished.append(Finished.of(self.rows[row].decisions))
        self._restart(result.done | ~sound)

    def _restart(self, over: np.ndarray) -> None:
        """Begin new episodes in these environments, and again in those that begin with an unsound observation."""
        while over.any():
            for row in np.flatnonzero(over):
                self.rows[row] = self._begin()
            seeds = [row.seed if new else None for row, new in zip(self.rows, over, strict=True)]
            self.observations = self.task.reset(seeds)
            over = self._unsound()

    def _unsound(self) -> np.ndarray:
        """Which episodes begin with an observation that is not finite; each is a fault."""
        over = ~seen_rows(self.observations)
        for row in np.flatnonzero(over):
            self.faults.add("reset", f"episode of seed {self.rows[row].seed}: its first observation is not finite")
        return over

    def tensors(self) -> dict[str, torch.Tensor]:
        """With `state`, all that is needed to go on with the very next decision."""
        found = {f"row.{i}.{k}": v for i, row in enumerate(self.rows) for k, v in row.tensors().items()}
        return found | self._past_tensors() | {"observed": torch.as_tensor(np.array(self.observations[STATE]))}

    def state(self) -> dict[str, Any]:
        """Counters, seeds and lengths; JSON-able."""
        seeds, windows = [row.seed for row in self.rows], [len(window) for window in self.windows.windows]
        return self._past_state() | {"seeds": seeds, "windows": windows}

    def resume(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Undo `tensors` and `state`: the episodes under way are executed again up to where they were.

        Where the task cannot repeat itself (a robot; a simulator with a will of its own), they are given up and new
        ones begun.
        """
        self._resume_past(tensors, state)
        rows = [UnderWay.from_tensors(seed, part(tensors, f"row.{i}.")) for i, seed in enumerate(state["seeds"])]
        if self.task.repeatable:
            seen = self.task.restore([(row.seed, row.chunks) for row in rows])
            if np.array_equal(np.asarray(seen[STATE]), tensors["observed"].numpy()):
                self.rows, self.observations = rows, seen
                for row, length in enumerate(state["windows"]):
                    for decision in rows[row].decisions[len(rows[row].decisions) - length :]:
                        self.windows.push(row, decision)
                return
            log.warning("the episodes under way do not repeat themselves: new ones are begun in their place.")
        self._start()
