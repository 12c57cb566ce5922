"""Noise search without an actor: baselines that a head has to beat.

A "golden ticket" (arXiv 2603.15757) is the best constant noise: one latent for every decision of every episode,
found by trying some. Best-of-K draws K noises at every decision and takes the one whose action a critic likes most.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import seeds as seed_ranges
from .episodes import Episode
from .errors import at_least, bad
from .evaluation import Measure, compared, evaluation_seeds, measure
from .head import SteeringHead
from .head_config import HeadConfig
from .networks import NetworkConfig
from .noise import NoiseLayout, generators
from .noise_aliasing import ActionCritic
from .policy import FrozenPolicy
from .rollout import VectorTask
from .run_dir import write_json
from .sources import ConstantNoise, NoiseSource, PriorNoise


@dataclass(frozen=True)
class SearchConfig:
    """Successive halving over candidates."""

    candidates: int = 24
    """Constant latents to try; the first is zero, the others are drawn from the base's prior."""
    episodes: int = 3
    """Episodes a candidate plays in every round it survives; all play the same ones."""
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(1, self, "search", "candidates", "episodes")

    @property
    def rounds(self) -> list[int]:
        """Candidates that play in each round."""
        left = self.candidates
        found: list[int] = []
        while left > 1 or not found:
            found.append(left)
            left //= 2
        return found

    @property
    def total_episodes(self) -> int:
        """Episodes of the whole search."""
        return self.episodes * sum(self.rounds)


@dataclass(frozen=True)
class Ticket:
    """The best constant latent, and what finding it took."""

    latent: tuple[tuple[float, ...], ...]
    """(n, d) in [-1, 1]."""
    success: float
    """Over the episodes it was chosen on: too high, as the best of many is. Evaluate it on others."""
    episodes: int
    env_steps: int
    """Environment steps of the whole search."""
    rounds: tuple[dict[str, float], ...]
    """Per round: candidates left, mean and best success so far, environment steps so far."""

    def source(self, layout: NoiseLayout) -> ConstantNoise:
        """The noise source that plays it.

        Raises:
            DsrlError: the latent is of another layout.
        """
        latent = torch.tensor(self.latent)
        if tuple(latent.shape) != layout.latent_shape:
            raise bad(
                "ticket", f"a latent of shape {layout.latent_shape} for layout '{layout.name}'", tuple(latent.shape)
            )
        return ConstantNoise(layout, latent)

    def head(self, base: FrozenPolicy, layout: NoiseLayout) -> SteeringHead:
        """A head that chooses it wherever it looks, to be shared and served as any other. Raises as `source`."""
        smallest = NetworkConfig("mlp", width=8, layers=1)
        head = SteeringHead(HeadConfig.for_base(base.spec, layout, smallest, fingerprint=base.fingerprint()))
        head.always(self.source(layout).latent)
        return head.eval()

    def save(self, path: Path) -> None:
        """Write as JSON, all or nothing."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Ticket:
        """Undo `save`."""
        raw: dict[str, Any] = json.loads(path.read_text())
        latent = tuple(tuple(row) for row in raw.pop("latent"))
        return cls(latent=latent, rounds=tuple(raw.pop("rounds")), **raw)


@dataclass(frozen=True)
class BestOfK(NoiseSource):
    """At every decision, K draws from the layout behind one prefix; the one with the greatest Q^A is executed."""

    base: FrozenPolicy
    head: SteeringHead
    critic: ActionCritic
    k: int = 8

    @torch.no_grad()
    def __call__(self, observations, encoding, generators):
        noise = self.head.layout.expand(self.head.layout.sample(generators, self.k))
        chunks = self.base.denoise(encoding, noise)[:, :, : self.base.spec.executed_steps]
        rows, count = chunks.shape[:2]
        inputs = {k: v.repeat_interleave(count, 0) for k, v in self.head.read(observations, encoding).items()}
        value = self.critic.value(inputs, chunks.flatten(0, 1)).view(rows, count)
        return noise[torch.arange(rows), value.argmax(1)].unsqueeze(1)


def search_ticket(
    base: FrozenPolicy,
    task: VectorTask,
    layout: NoiseLayout,
    config: SearchConfig | None = None,
    on_episode: Callable[[Episode], None] = lambda _: None,
) -> Ticket:
    """Find a good constant latent by successive halving on the search's own seeds.

    Ties go to the candidate with fewer steps. Costs `SearchConfig.total_episodes` episodes.

    Raises:
        DsrlError: the base does not fit the task.
    """
    for info in task.infos:
        base.check_task(info)
    config = config or SearchConfig()
    drawn = layout.sample(generators([config.seed]), config.candidates)[0]
    drawn[0] = 0.0
    played: dict[int, list[Episode]] = {i: [] for i in range(config.candidates)}
    alive, rounds, steps = list(played), [], 0
    merit = lambda i: (Measure(tuple(played[i])).mean, -np.mean([e.steps for e in played[i]]))
    for number, count in enumerate(config.rounds):
        alive = alive[:count]
        seeds = seed_ranges.block(seed_ranges.SEARCH + number * config.episodes, config.episodes)
        for i in alive:
            found = measure(base, task, ConstantNoise(layout, drawn[i]), seeds, on_episode=on_episode)
            played[i] += found.episodes
            steps += sum(e.steps for e in found.episodes)
        alive.sort(key=merit, reverse=True)
        scores = [float(merit(i)[0]) for i in alive]
        rounds.append(
            {"candidates": len(alive), "mean": float(np.mean(scores)), "best": max(scores), "env_steps": steps}
        )
    winner = alive[0]
    return Ticket(
        latent=tuple(tuple(row) for row in drawn[winner].tolist()),
        success=float(merit(winner)[0]),
        episodes=len(played[winner]),
        env_steps=steps,
        rounds=tuple(rounds),
    )


def evaluate_ticket(
    base: FrozenPolicy,
    task: VectorTask,
    layout: NoiseLayout,
    ticket: Ticket,
    episodes: int = 100,
    on_episode: Callable[[Episode], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure a ticket against its base on held-out episodes; return what ``eval.json`` holds."""
    seeds = evaluation_seeds(task, episodes)
    own = measure(base, task, PriorNoise(base.spec.noise), seeds, on_episode=on_episode)
    found = measure(base, task, ticket.source(layout), seeds, on_episode=on_episode)
    more = {"layout": layout.name, "search_env_steps": ticket.env_steps}
    return compared(base, task, seeds, own, found, {}) | more
