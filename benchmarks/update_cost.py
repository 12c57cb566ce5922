"""What an update costs: DSRL-NA over a noise bank, and as the paper has it, against DSRL-SAC, in the same run.

    python benchmarks/update_cost.py [--task pick-place] [--rounds 30] [--updates 20]

Rounds of the three alternate, so that whatever else the machine does hits all of them. Writes
benchmarks/results/update_cost.json: milliseconds per update and the ratio to SAC's, median and 95 % bootstrap
interval over rounds.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import tyro
from common import Goal, finish, interval, side_by_side


@dataclass(frozen=True)
class Args:
    """What to measure."""

    task: str = "pick-place"
    """Name of a shipped recipe: its base, network sizes, layout and batch."""
    kind: str = "transformer"
    rounds: int = 30
    updates: int = 20
    """Updates per round and algorithm."""


def prepare(task: str, kind: str, algorithm: str) -> Any:
    """A function that makes one update of a learner on replay that its keeper filled."""
    from dsrl_vla.collect import Collector
    from dsrl_vla.head import HeadConfig, SteeringHead
    from dsrl_vla.learners import build_learner
    from dsrl_vla.recipe import load_recipe
    from dsrl_vla.replay import Replay
    from dsrl_vla.rollout import VectorTask

    recipe = load_recipe(task)
    network = replace(recipe.head.network, kind=kind)
    base = recipe.base.load()
    layout = recipe.noise.over(base.spec.noise)
    torch.manual_seed(0)
    head = SteeringHead(HeadConfig.for_base(base.spec, layout, network))
    critic = replace(recipe.critic, network=network)
    learner = build_learner(algorithm, base, head, critic, recipe.sac, recipe.na, (0.0, 1.0), 0)  # type: ignore[arg-type]
    replay, rng = Replay(2000, layout.latent_shape), np.random.default_rng(0)
    with VectorTask(recipe.task, base.spec.executed_steps) as vector:
        keeper = learner.keeper()
        collector = Collector(base, head, vector, replay, sac=recipe.sac, first_seed=0, keeper=keeper)
        for _ in range(30):
            collector.step(warm_up=True)
    learner.fit_normaliser(replay)
    return lambda: learner.update(replay.sample(recipe.sac.batch, rng))


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    updates = {name: prepare(args.task, args.kind, name) for name in ("sac", "na", "na-exact")}
    times = side_by_side(updates, args.rounds, args.updates)
    ratios = {name: interval(times[name] / times["sac"]) for name in ("na", "na-exact")}
    return finish(
        "update_cost",
        [Goal("update of NA's bank over SAC's", ratios["na"]["median"], 1.5, at_least=False)],
        task=args.task,
        network=args.kind,
        rounds=args.rounds,
        updates_per_round=args.updates,
        ms_per_update={name: interval(1000 * values) for name, values in times.items()},
        ratio_to_sac=ratios,
    )


if __name__ == "__main__":
    sys.exit(main())
