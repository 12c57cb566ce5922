"""Collection beside an operator: one whole episode at a time, journalled, then learnt from.

An episode enters the replay when it is over and its operator has let it count. Updates happen between episodes,
while the scene is made ready, never between two actions of a robot.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .collect import Collector
from .episodes import episode_generators
from .errors import DsrlError, bad
from .faults import all_finite
from .head import HeadInputs
from .interrupts import undisturbed
from .journal import EpisodeRecord, Journal
from .n_step import Decision, NStepWindows
from .noise_bank import IMITATED
from .observation import PROMPT, Observations
from .replay import Extras
from .rollout import ChunkResult
from .tasks.live import Ending
from .watch import Finished

log = logging.getLogger(__name__)
_LATE_SHARE = 0.1
RETRY_S = 10.0
"""Between tries to save an episode."""
_UNSOUND = (
    "episode {}: what the base saw in it or would have done, or a reward, is not finite; nothing is learnt from it"
)


@dataclass
class _Played:
    """An episode while it is being played; one entry per decision."""

    number: int
    streams: list[torch.Generator]
    observations: list[Observations] = field(default_factory=list)
    chosen: list[_Chosen | None] = field(default_factory=list)
    """None where a person drove."""
    results: list[ChunkResult] = field(default_factory=list)

    def add(self, observation: Observations, chosen: _Chosen | None, result: ChunkResult) -> None:
        """Take a decision in. One without steps brought only the operator's word about the one before."""
        if result.steps[0]:
            self.observations.append(observation)
            self.chosen.append(None if result.human[0] else chosen)
            self.results.append(result)
        elif result.ending[0] and self.results:
            last = self.results[-1]
            last.rewards[0, last.steps[0] - 1] += result.rewards[0, 0]


@dataclass(frozen=True)
class _Chosen:
    """What the head chose at a decision, each with a leading 1."""

    inputs: HeadInputs
    observed: Extras
    extras: Extras
    latent: torch.Tensor


class EpisodeCollector(Collector):
    """A collector for a `LiveTask`, of which there is one environment: a step is an episode.

    Where a person drives, the base is not asked, so that it does not slow them down; their actions are labelled
    once the episode is over, and enter the replay only where the algorithm learns from actions or finds their noise.

    Raises:
        DsrlError: a robot in dry run.
    """

    live = True

    def __init__(self, *args: Any, journal: Journal, **kwargs: Any):
        self.journal = journal
        super().__init__(*args, **kwargs)

    def _start(self) -> None:
        if self.task.envs.get_attr("dry_run")[0]:
            raise bad("dry_run", "false, to train on a robot", "true", "`dsrl-vla drive` rehearses.")
        self.human_steps = self.void = 0
        self._ticks = self._late = 0.0

    def tensors(self) -> dict[str, torch.Tensor]:
        """Of finished episodes alone: one under way is played again."""
        return self._past_tensors()

    def state(self) -> dict[str, Any]:
        """Counters; JSON-able."""
        return self._past_state() | {"human_steps": self.human_steps, "void": self.void}

    def resume(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Go on counting from a checkpoint."""
        self._resume_past(tensors, state)
        self.human_steps, self.void = state["human_steps"], state["void"]

    def restore(self) -> int:
        """Take in the journal's episodes that the checkpoint does not know; return how many."""
        numbers = [n for n in self.journal.numbers() if n >= self.episodes]
        for number in numbers:
            if not self._enter(self.journal.read(number)):  # counted when it was played
                log.warning("%s", _UNSOUND.format(number))
        return len(numbers)

    @torch.no_grad()
    def step(self, warm_up: bool) -> None:
        """Play one episode that counts."""
        while True:
            self.whole = True
            played = self._play(warm_up)
            self.whole = False
            ending = played.results[-1].ending[0] if played.results else Ending.REDO
            if played.results and not played.results[-1].void[0]:
                with undisturbed("the episode is being saved") as told:
                    record = self._record(played)
                    self._save(record)
                if told.is_set():  # `restore` enters it, when the run goes on
                    raise KeyboardInterrupt
                if not self._enter(record):
                    self.faults.add("episode", _UNSOUND.format(record.number))
                return
            self.void += 1
            self.episodes += ending == Ending.DISCARD

    def _save(self, record: EpisodeRecord) -> None:
        """Put an episode into the journal: nobody can play it again, so that a full disk is waited for."""
        while True:
            try:
                self.journal.append(record)
                return
            except (DsrlError, OSError) as error:
                words = "episode %d waits to be saved: %s. Trying again in %g s; Ctrl-C three times gives it up."
                log.error(words, record.number, error, RETRY_S)
                time.sleep(RETRY_S)

    def _play(self, warm_up: bool) -> _Played:
        """Play an episode to its end."""
        seed = self.first_seed + self.episodes
        played = _Played(self.episodes, episode_generators([seed]))
        observation = self.task.reset([seed])
        while True:
            driven = self.task.driven
            chosen, chunks = (None, None) if driven else self._choose(observation, played.streams, warm_up)
            result = self.task.step(chunks)
            played.add(observation, chosen, result)
            observation = result.observations
            if result.done[0]:
                if played.results:
                    played.results[-1] = _ended(played.results[-1], result)
                self._check_rate()
                return played

    def _check_rate(self) -> None:
        """Say it when an episode did not keep its control rate."""
        report = self.task.envs.call("report")[0]
        ticks, late = report.get("ticks", 0) - self._ticks, report.get("late", 0) - self._late
        self._ticks, self._late = self._ticks + ticks, self._late + late
        if late > _LATE_SHARE * ticks:
            log.warning(
                "%d of %d control steps came late. Lower fps, or look for what is slow (cameras, motors).", late, ticks
            )

    def _choose(
        self, observation: Observations, streams: list[torch.Generator], warm_up: bool
    ) -> tuple[_Chosen, np.ndarray]:
        """The head's choice (or random noise, while warming up), and the chunk (1, k, A) that it gives."""
        encoding = self.base.encode(observation)
        inputs = self.head.read(observation, encoding)
        latent = self.head.layout.sample(streams)[:, 0] if warm_up else self.head.latent(inputs, streams)
        chunks, extras = self.keeper.denoise(self.base, encoding, self.head, inputs, latent, streams)
        return _Chosen(inputs, self.keeper.observed(self.base, encoding), extras, latent), chunks.numpy()

    def _label(self, observation: Observations, result: ChunkResult | None, streams: list) -> _Chosen:
        """The same for a decision of a person's, or for an episode's last observation (no result)."""
        encoding = self.base.encode(observation)
        inputs, extras = self.head.read(observation, encoding), Extras()
        latent = torch.zeros(1, *self.head.layout.latent_shape)
        if result is not None and self.keeper.learns_from_actions:
            assert result.executed is not None
            done = torch.from_numpy(result.executed), torch.from_numpy(result.steps)
            latent, extras = self.keeper.label(self.base, encoding, self.head, inputs, *done, streams)
        return _Chosen(inputs, self.keeper.observed(self.base, encoding), extras, latent)

    def _record(self, played: _Played) -> EpisodeRecord:
        """Label what a person did, and put the episode into one record."""
        results, last = played.results, played.results[-1]
        rows = [
            chosen or self._label(observation, result, played.streams)
            for observation, chosen, result in zip(played.observations, played.chosen, results, strict=True)
        ]
        human = np.array([chosen is None for chosen in played.chosen])
        latent = torch.cat([row.latent for row in rows])
        noise = self.head.layout.expand(latent)
        noise[torch.from_numpy(human)] = torch.nan
        ends = [] if last.terminated[0] else [self._label(last.observations, None, played.streams)]
        joined = [*rows, *ends]
        extras = _cat([row.observed for row in joined]) | _align([row.extras for row in rows])
        taken = self.task.envs.call("taken")[0]
        steps = np.array([int(result.steps[0]) for result in results])
        taken |= {"decision": np.repeat(np.arange(len(steps)), steps)}
        return EpisodeRecord(
            number=played.number,
            env_steps=int(steps.sum()),
            decisions_before=self.decisions,
            prompt=str(last.observations[PROMPT][0]),
            ending=str(last.ending[0]),
            terminated=bool(last.terminated[0]),
            success=bool(last.success[0]),
            inputs=_cat([row.inputs for row in joined]),
            extras=extras,
            decisions={
                "latent": latent,
                "rewards": torch.from_numpy(np.concatenate([result.rewards for result in results])),
                "steps": torch.from_numpy(steps),
                "human": torch.from_numpy(human),
            },
            steps=taken,
            fps=float(self.task.envs.get_attr("fps")[0]),
            noise=noise,
        )

    def _enter(self, record: EpisodeRecord) -> bool:
        """Learn from an episode, if all of it is finite; return whether it is. No return reaches across a change of
        hands."""
        self._count(record)
        if not all_finite(record.inputs | record.extras | record.decisions):
            return False
        numbers = self.replay.observe(record.inputs)
        for name, rows in record.extras.items():
            rows = rows * float(record.success) if name == IMITATED else rows
            self.replay.attach(numbers[: len(rows)], {name: rows})
        steps, human = record.decisions["steps"].numpy(), record.decisions["human"].numpy()
        reward = self.sac.chunk_reward(record.decisions["rewards"].numpy(), steps)
        windows = NStepWindows(self.sac.n_step, 1, self.replay.add)
        own: list[Decision] = []
        timed_out = not record.terminated and not record.ending
        terminated = record.terminated or (timed_out and self.sac.timeouts == "terminal")
        for i in range(len(record)):
            if i and human[i] != human[i - 1]:
                windows.truncated(0, int(numbers[i]))
            else:
                windows.observed(np.array([0]), numbers[i : i + 1])
            over = terminated and i == len(record) - 1
            discount = 0.0 if over else float(self.sac.chunk_discount(steps[i]))
            decision = Decision(int(numbers[i]), record.decisions["latent"][i], float(reward[i]), discount)
            if not human[i] or self.keeper.learns_from_actions:
                windows.push(0, decision)
                self.decisions += 1
            own += [] if human[i] else [decision]
        windows.terminated(0) if terminated else windows.truncated(0, int(numbers[-1]))
        self.recent.append(record.success and not human.any())
        if own and not human.any():
            self.finished.append(Finished.of(own))
        return True

    def _count(self, record: EpisodeRecord) -> None:
        self.episodes = record.number + 1
        self.env_steps += record.env_steps
        self.human_steps += int(record.steps["human"].sum())


def _ended(result: ChunkResult, final: ChunkResult) -> ChunkResult:
    """The last decision with steps, ended as the one after it says, which may have had none."""
    for name in ("terminated", "truncated", "success", "ending", "observations"):
        setattr(result, name, getattr(final, name))
    return result


def _cat(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _align(parts: list[Extras]) -> Extras:
    """Extras of every decision, zeros where one has none."""
    example = next((part for part in parts if part), {})
    return _cat([part or {k: torch.zeros_like(v) for k, v in example.items()} for part in parts]) if example else {}
