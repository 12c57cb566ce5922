"""What an update costs: DSRL-NA over a noise bank, and as the paper has it, against DSRL-SAC, in the same run.

    python benchmarks/update_cost.py [--task pick-place] [--rounds 30] [--updates 20]

Rounds of the three alternate, so that whatever else the machine does hits all of them. Writes
benchmarks/results/update_cost.json: milliseconds per update and the ratio to SAC's, median and 95 % bootstrap
interval over rounds.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro


@dataclass(frozen=True)
class Args:
    """What to measure."""

    task: str = "pick-place"
    """Name of a shipped recipe: its base, network sizes, layout and batch."""
    kind: str = "transformer"
    rounds: int = 30
    updates: int = 20
    """Updates per round and algorithm."""
    out: Path = field(default=Path(__file__).parent / "results" / "update_cost.json")


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


def interval(values: np.ndarray) -> dict[str, Any]:
    """Median and its bootstrap interval."""
    draws = np.random.default_rng(0).integers(0, len(values), (5000, len(values)))
    low, high = np.quantile(np.median(values[draws], 1), (0.025, 0.975))
    return {"median": round(float(np.median(values)), 3), "ci95": [round(float(low), 3), round(float(high), 3)]}


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    updates = {name: prepare(args.task, args.kind, name) for name in ("sac", "na", "na-exact")}
    times: dict[str, list[float]] = {name: [] for name in updates}
    for number in range(args.rounds + 1):  # the first one warms up
        for name, update in updates.items():
            start = time.perf_counter()
            for _ in range(args.updates):
                update()
            if number:
                times[name].append(1000 * (time.perf_counter() - start) / args.updates)
    found = {name: np.array(values) for name, values in times.items()}
    result = {
        "task": args.task,
        "network": args.kind,
        "rounds": args.rounds,
        "updates_per_round": args.updates,
        "torch": torch.__version__,
        "threads": 1,
        "ms_per_update": {name: interval(values) for name, values in found.items()},
        "ratio_to_sac": {name: interval(found[name] / found["sac"]) for name in ("na", "na-exact")},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
