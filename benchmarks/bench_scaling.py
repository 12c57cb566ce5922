"""Rollout workers: how collection scales from one to two of Ray's, and what the measured parts say of more.

    python benchmarks/bench_scaling.py [--rounds 9]

Measured, in wall-clock time: rounds of collection by one and by two workers (two cores, so no more), the learner
only entering what they bring. Measured apart: a decision of the base and the head, the environments' steps, an update,
what the learner does per harvest and per order, and the bytes of each. From these the table for 8 to 64 workers, with
a core each, is computed and marked so: upper bounds, for they leave out the network and that a round waits for its
slowest worker. Writes results/scaling.json.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import tyro
from common import Goal, finish, interval, side_by_side
from dsrl_vla.policy import FrozenPolicy
from dsrl_vla.recipe import load_recipe
from dsrl_vla.rollout import VectorTask
from dsrl_vla.trainer import Trainer
from dsrl_vla.workers.parcels import arrays, pack, unpack
from dsrl_vla.workers.worker import RolloutWorker

MANY = (8, 16, 32, 64)


@dataclass(frozen=True)
class Args:
    """What to measure."""

    recipe: str = "drawer-open"
    rounds: int = 9
    each: int = 10
    """Rounds of collection per turn."""


@contextlib.contextmanager
def crew(recipe: str, base: FrozenPolicy, backend: str, workers: int) -> Iterator[Trainer]:
    """A run whose workers have begun."""
    config = load_recipe(recipe, {"rollout": {"backend": backend, "workers": workers}})
    with tempfile.TemporaryDirectory() as folder, VectorTask(config.task, base.spec.executed_steps) as task:
        made = Trainer(config, base, task, task, Path(folder))
        try:
            for _ in range(3):
                made.collector.step(True)
            yield made
        finally:
            made.collector.close()


def scaling(args: Args, base: FrozenPolicy) -> dict[str, Any]:
    """Steps per second with one and two workers. They take turns: the others then wait for orders."""
    with crew(args.recipe, base, "ray", 1) as one, crew(args.recipe, base, "ray", 2) as two:
        sides = {"1": one, "2": two}
        before = {name: made.collector.env_steps for name, made in sides.items()}
        collect = {name: (lambda made=made: made.collector.step(True)) for name, made in sides.items()}
        times = side_by_side(collect, args.rounds, args.each, clock=time.perf_counter)
        steps = {
            name: (made.collector.env_steps - before[name]) / ((args.rounds + 1) * args.each)
            for name, made in sides.items()
        }
    rates = {name: steps[name] / t for name, t in times.items()}
    return {
        "env_steps_per_second": {name: interval(rate) for name, rate in rates.items()},
        "efficiency_of_two": interval(rates["2"] / (2 * rates["1"])),
    }


def median_seconds(function: Callable[[], object], times: int = 30) -> float:
    """Wall-clock seconds of a call."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return float(np.median(found))


def parts(args: Args, base: FrozenPolicy) -> dict[str, float]:
    """What a round is made of, for one worker, and what it costs the learner; seconds, bytes, steps."""
    with crew(args.recipe, base, "inline", 1) as made:
        while made.collector.decisions < made.recipe.train.learning_starts:
            made.collector.step(True)
        made.catch_up()
        start, before = time.perf_counter(), made.learner.updates
        made.updates.until(before + 60)
        update = (time.perf_counter() - start) / 60
        collector: Any = made.collector
        chunks = np.zeros((made.recipe.task.num_envs, base.spec.executed_steps, base.spec.action_dim), np.float32)
        seeds = [collector.first_seed + i for i in range(len(chunks))]
        collector.task.reset(seeds)
        environments = median_seconds(lambda: collector.task.step(chunks), 10)
        spec = _spec(made)
        worker, order = RolloutWorker(), pack({"warm_up": False, "head": arrays(made.head.state_dict())})
        worker.begin(spec, 0, b"")
        harvests = [worker.round(order) for _ in range(60)]
        round_ = median_seconds(lambda: worker.round(order))
        worker.collector.task.close()  # type: ignore[attr-defined]
        opened = [unpack(harvest) for harvest in harvests]
        written = [len(pack(harvest["writes"])) for harvest in opened]
        return {
            "environments_per_worker": len(chunks),
            "steps_per_round": float(np.mean([h["counts"]["env_steps"] for h in opened])),
            "round_s": round(round_, 5),
            "of_it_environments_s": round(environments, 5),
            "of_it_base_and_head_s": round(round_ - environments, 5),
            "update_s": round(update, 5),
            "enter_a_harvest_s": round(_entering(made, spec, harvests), 6),
            "make_an_order_s": round(median_seconds(lambda: pack({"head": arrays(made.head.state_dict())})), 6),
            "harvest_bytes": float(np.mean([len(h) for h in harvests])),
            "bytes_per_transition": round(float(np.mean(written)) / len(chunks)),
            "order_bytes": len(order),
        }


def _spec(made: Trainer) -> Any:
    from dataclasses import replace

    from dsrl_vla.collectors import make_collector
    from dsrl_vla.workers.config import RolloutConfig

    recipe = replace(made.recipe, rollout=RolloutConfig("process"))
    keeper = made.learner.keeper()
    hired = make_collector(
        recipe, made.base, made.head, made.held_out, made.replay, made.out, keeper=keeper, faults=made.faults
    )
    return hired.spec  # type: ignore[attr-defined]


def _entering(made: Trainer, spec: Any, harvests: list[bytes]) -> float:
    """Seconds to open a harvest and to put it into the replay; the mean, for transitions come in bursts."""
    from dsrl_vla.workers.config import RolloutConfig
    from dsrl_vla.workers.crew import Crew

    entered = Crew(made.head, made.replay, spec, RolloutConfig("process"))
    start = time.perf_counter()
    for harvest in harvests:
        entered._enter(0, unpack(harvest))
    return (time.perf_counter() - start) / len(harvests)


def compute(found: dict[str, float]) -> list[dict[str, Any]]:
    """Many workers, with a core each, and one learner; nothing here was run.

    A round takes as long as a worker's, or as the learner needs to enter all harvests and to send all orders, where
    that is longer. In what is left of it the learner updates: so many updates per decision it can keep up with.
    """
    rows = []
    for workers in MANY:
        serial = workers * found["enter_a_harvest_s"] + found["make_an_order_s"]
        lasts = max(found["round_s"], serial)
        updates = max(0.0, (lasts - serial) / found["update_s"])
        rate = workers * found["steps_per_round"] / lasts
        rows.append(
            {
                "workers": workers,
                "env_steps_per_second": round(rate),
                "efficiency": round(found["round_s"] / lasts, 3),
                "updates_per_decision_kept_up": round(updates / (workers * found["environments_per_worker"]), 4),
                "megabytes_per_second_in": round(workers * found["harvest_bytes"] / lasts / 1e6, 2),
                "megabytes_per_second_out": round(workers * found["order_bytes"] / lasts / 1e6, 2),
            }
        )
    return rows


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    base = load_recipe(args.recipe).base.load()
    # Three workers are there, of which at most two are at work.
    ray.init(num_cpus=3, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
    measured, found = scaling(args, base), parts(args, base)
    goal = Goal("efficiency of two of Ray's workers", measured["efficiency_of_two"]["median"], 0.8)
    return finish(
        "scaling", [goal], rounds=args.rounds, recipe=args.recipe, measured=measured, parts=found,
        computed_for_many_workers=compute(found),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
