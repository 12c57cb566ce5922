"""Environment steps per second of collection and learning: overlapped in two processes, against one after the other.

    python benchmarks/bench_overlap.py [--rounds 9]

One run's loop each, on the same recipe: a round is a decision in every environment and the updates it is owed. Both
are measured as shipped, and with so few updates per decision that collection and learning weigh about the same, which
is where overlapping has most to give. Wall-clock time on two cores, by turns; validation and checkpoints are left
out, for they are not overlapped. Writes results/overlap.json, with what each part takes alone and the ratio that
these allow at most.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from common import Goal, finish, interval, side_by_side
from dsrl_vla.policy import FrozenPolicy
from dsrl_vla.recipe import load_recipe
from dsrl_vla.rollout import VectorTask
from dsrl_vla.trainer import Trainer


@dataclass(frozen=True)
class Args:
    """What to measure."""

    recipe: str = "drawer-open"
    rounds: int = 9
    balanced: float = 0.5
    """Updates per decision at which collection and learning weigh about the same."""


@contextlib.contextmanager
def trainer(recipe: str, base: FrozenPolicy, backend: str, gradient_steps: float | None) -> Iterator[Trainer]:
    """A run that has warmed up and made its first updates."""
    train: dict[str, Any] = {"learning_starts": 150}
    if gradient_steps is not None:
        train["gradient_steps"] = gradient_steps
    config = load_recipe(recipe, {"train": train, "rollout": {"backend": backend}})
    with tempfile.TemporaryDirectory() as folder, VectorTask(config.task, base.spec.executed_steps) as task:
        made = Trainer(config, base, task, task, Path(folder))
        try:
            while made.learner.updates == 0:
                made._decide()
            yield made
        finally:
            made.collector.close()


def parts(made: Trainer, rounds: int = 10) -> dict[str, float]:
    """Seconds that collection and updates take in one process, medians over rounds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        made.collector.step(False)
        middle = time.perf_counter()
        made.catch_up()
        times.append((middle - start, time.perf_counter() - middle))
    collect, update = np.median(times, axis=0)
    return {"collect_s": round(float(collect), 4), "update_s": round(float(update), 4)}


def compare(args: Args, base: FrozenPolicy, gradient_steps: float | None) -> dict[str, Any]:
    """Steps per second of both, their ratio, and the ratio that the parts allow."""
    each = 4 if gradient_steps is None else 10  # rounds per turn
    with (
        trainer(args.recipe, base, "inline", gradient_steps) as inline,
        trainer(args.recipe, base, "process", gradient_steps) as process,
    ):
        sides = {"one after the other": inline, "overlapped": process}
        before = {name: made.collector.env_steps for name, made in sides.items()}
        times = side_by_side(
            {name: made._decide for name, made in sides.items()}, args.rounds, each, clock=time.perf_counter
        )
        per_round = {
            name: (made.collector.env_steps - before[name]) / ((args.rounds + 1) * each)
            for name, made in sides.items()
        }
        alone = parts(inline)
        ratio = times["one after the other"] / times["overlapped"]
        most = sum(alone.values()) / max(alone.values())
        return {
            "gradient_steps": inline.recipe.train.gradient_steps,
            "environments": inline.recipe.task.num_envs,
            "env_steps_per_second": {name: interval(per_round[name] / t) for name, t in times.items()},
            "ratio": interval(ratio),
            "parts_of_a_round": alone,
            "ratio_the_parts_allow": round(most, 3),
        }


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    base = load_recipe(args.recipe).base.load()
    shipped, balanced = compare(args, base, None), compare(args, base, args.balanced)
    goals = [
        Goal(f"overlapped over one after the other, {args.recipe} as shipped", shipped["ratio"]["median"], 1.5),
        Goal(
            f"overlapped over one after the other, {args.balanced:g} updates per decision",
            balanced["ratio"]["median"],
            1.5,
        ),
    ]
    return finish("overlap", goals, rounds=args.rounds, recipe=args.recipe, shipped=shipped, balanced=balanced)


if __name__ == "__main__":
    sys.exit(main())
