"""After Figures 4 and 5 of arXiv 2506.15799: steering a frozen diffusion policy on robosuite's Lift, Can and Square.

    python benchmarks/paper_robosuite.py [--tasks lift can can-hard square] [--variants sac na …] [--seeds 0 1 2]

Not the paper's setting: the base is a clone of a scripted operator (`make_robosuite_bases.py`), not of Robomimic's
people. `sac`, `na` and `na-exact` are the shipped recipe robosuite-<task> by each algorithm; `offline-to-online`
starts `na` from 50 recorded episodes of the base, its noise drawn once per episode. Can's recipe validates every 4,000
steps only; its `early` runs compare the two by validations every 1,000, for 6,000 steps. Every run ends when two
validations in a row are good enough; the head that is best by validation plays 100 held-out episodes, the same as base
and controls. Runs that benchmarks/results/paper_robosuite.json holds are not repeated; it grows run by run.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from dsrl_vla.recipe import Recipe, load_recipe
from kept_runs import base_measures, finished, grow, recorded, settings, trained
from steer_metaworld import learning_curve

RUNS = Path("runs/paper-robosuite")
RECORDED = 50
EARLY = {"validate_every": 1000, "validation_episodes": 50, "env_steps": 6000}
OFFLINE = {"updates": 2000, "stride": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "sac": {"algorithm": "sac"},
    "na": {"algorithm": "na"},
    "na-exact": {"algorithm": "na-exact"},
    "offline-to-online": {
        "algorithm": "na",
        "offline": OFFLINE,
        "train": {"learning_starts": 1},
    },
    "na, early": {"algorithm": "na", "train": EARLY},
    "offline-to-online, early": {
        "algorithm": "na",
        "offline": OFFLINE,
        "train": EARLY | {"learning_starts": 1},
    },
}
OF_TASK = {
    "lift": ("sac", "na", "na-exact", "offline-to-online"),
    "can-hard": ("offline-to-online", "na"),
    "square": ("offline-to-online", "na"),
}
OTHERS = tuple(name for name in VARIANTS if name != "offline-to-online")
"""Variants of the tasks not named above: there the early runs tell what offline data save."""
OWN = ("steered", "steered_stochastic", "difference", "finalists", "env_steps", "updates", "train_seconds")


@dataclass(frozen=True)
class Args:
    """What to run."""

    tasks: tuple[str, ...] = ("lift", "can", "can-hard", "square")
    variants: tuple[str, ...] = tuple(VARIANTS)
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = field(default=Path(__file__).parent / "results" / "paper_robosuite.json")


def recipe_for(task: str, variant: str, seed: int) -> Recipe:
    """The shipped recipe with what the variant changes."""
    changes = json.loads(json.dumps(VARIANTS[variant]))
    if "offline" in changes:
        changes["offline"]["source"] = str(RUNS / f"{task}-held-{RECORDED}.npz")
    changes["train"] = changes.get("train", {}) | {"seed": seed}
    return load_recipe(f"robosuite-{task}", changes)


def run(task: str, variant: str, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """One run; and what the results file holds beside runs."""
    recipe, out = recipe_for(task, variant, seed), RUNS / f"{task}-{variant.replace(', ', '-')}-{seed}"
    if recipe.offline.source:
        recorded(f"robosuite-{task}", "held", RECORDED, Path(recipe.offline.source))
    known = base_measures(RUNS / f"{task}-base.json", recipe)
    if not finished(out, recipe):
        trained(recipe, out, known=known)
    result = json.loads((out / "eval.json").read_text())
    fresh = {key: result[key] for key in OWN if key in result} | learning_curve(out)
    beside = {key: result[key] for key in ("task", "episodes", "base", "controls")}
    return fresh, beside | {"base_sha256": result["base_sha256_after"]}


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    RUNS.mkdir(parents=True, exist_ok=True)
    jobs = ((t, v, s) for s in args.seeds for t in args.tasks for v in args.variants if v in OF_TASK.get(t, OTHERS))
    grow(args.out, jobs, lambda *job: settings(recipe_for(*job)), run, "robosuite-{}".format)
    return 0


if __name__ == "__main__":
    sys.exit(main())
