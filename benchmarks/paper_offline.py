"""After Figure 5 of arXiv 2506.15799, on Gym: whether offline data speed online learning up.

    python benchmarks/paper_offline.py [--tasks hopper …] [--seeds 0 1 2]

`na` is the shipped recipe gym-<task> by DSRL-NA. `offline-to-online` starts it from 50 recorded episodes of the base,
its noise drawn once per episode and held; no offline episode's noise is told to the learner. Both play 10 validation
episodes every 2,000 environment steps. The speed-up is the ratio of steps to a return of so many times the base's, in
validation (the goals of the Gym benchmark); recorded steps are told beside it, they are not counted in it. The head
that is best by validation plays 20 held-out episodes. Runs that benchmarks/results/paper_offline.json holds are not
repeated; it grows run by run.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from dsrl_vla.recipe import Recipe, load_recipe
from kept_runs import base_measures, evaluated, finished, grow, recorded, settings
from paper_gym import run_ours

RUNS, RECORDED = Path("runs/paper-offline"), 50
VARIANTS: dict[str, dict[str, Any]] = {
    "na": {},
    "offline-to-online": {"offline": {"updates": 15000, "stride": 2}, "train": {"learning_starts": 1}},
}
TRAIN = {"env_steps": 60_000, "validate_every": 2000, "checkpoint_every": 10_000}


@dataclass(frozen=True)
class Args:
    """What to run."""

    tasks: tuple[str, ...] = ("hopper",)
    variants: tuple[str, ...] = tuple(VARIANTS)
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = field(default=Path(__file__).parent / "results" / "paper_offline.json")


def data(task: str) -> Path:
    """Where the recorded episodes are."""
    return RUNS / f"{task}-held-{RECORDED}.npz"


def recipe_for(task: str, variant: str, seed: int) -> Recipe:
    """The shipped recipe with what the variant changes."""
    changes = VARIANTS[variant] | {"algorithm": "na"}
    if "offline" in changes:
        changes["offline"] = {"source": str(data(task))} | changes["offline"]
    changes["train"] = TRAIN | changes.get("train", {}) | {"seed": seed}
    return load_recipe(f"gym-{task}", changes)


def run(task: str, variant: str, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """One run and its evaluation; and what the results file holds beside runs."""
    recipe, out = recipe_for(task, variant, seed), RUNS / f"{task}-{variant}-{seed}"
    recorded(f"gym-{task}", "held", RECORDED, data(task))
    known = base_measures(RUNS / f"{task}-base.json", recipe)
    finished(out, recipe)
    found, source = run_ours(recipe, out)
    facts, _ = evaluated(recipe, source, known)
    with np.load(data(task), allow_pickle=False) as kept:
        rows = len(kept["reward"])
    shutil.rmtree(out, ignore_errors=True)
    return facts | found, {
        "episodes": recipe.eval.episodes,
        "recorded_steps": rows,
        "base": known["base"].to_json(),
        "base_sha256": recipe.base.load().sha256(),
    }


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    RUNS.mkdir(parents=True, exist_ok=True)
    jobs = ((t, v, s) for s in args.seeds for v in args.variants for t in args.tasks)
    grow(args.out, jobs, lambda *job: settings(recipe_for(*job)), run, "gym-{}".format)
    return 0


if __name__ == "__main__":
    sys.exit(main())
