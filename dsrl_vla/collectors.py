"""Which collector a recipe and its task call for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import seeds as seed_ranges
from .collect import Collector
from .collecting import AnyCollector
from .errors import bad
from .faults import Faults
from .head import SteeringHead
from .noise_bank import Keeper
from .policy import FrozenPolicy
from .recipe import Recipe
from .replay import Replay
from .rollout import VectorTask


def make_collector(
    recipe: Recipe,
    base: FrozenPolicy,
    head: SteeringHead,
    task: VectorTask,
    replay: Replay,
    out: Path,
    *,
    keeper: Keeper,
    faults: Faults,
) -> AnyCollector:
    """The collector that fills `replay`; `out` is the run's directory, where a live task keeps its journal.

    Raises:
        DsrlError: workers for a robot, of which there is one.
    """
    rollout, first_seed = recipe.rollout, seed_ranges.TRAINING * (1 + recipe.train.seed)
    options: dict[str, Any] = {"sac": recipe.sac, "first_seed": first_seed, "keeper": keeper, "faults": faults}
    if task.info.live:
        from .journal import FOLDER, Journal
        from .live_collect import EpisodeCollector

        if rollout.backend != "inline":
            raise bad("rollout.backend", "inline for a task with an operator", rollout.backend)
        return EpisodeCollector(base, head, task, replay, journal=Journal(out / FOLDER), **options)
    if rollout.backend == "inline":
        return Collector(base, head, task, replay, **options)
    from .workers.crew import Crew
    from .workers.worker import WorkerSpec

    spec = WorkerSpec(
        base=recipe.base,
        task=recipe.task,
        head=head.config,
        keeper=keeper,
        sac=recipe.sac,
        first_seed=first_seed,
        workers=rollout.workers,
        threads=recipe.train.threads,
        max_faults=recipe.train.max_faults,
        gpus=rollout.gpus,
    )
    return Crew(head, replay, spec, rollout, faults)
