"""LeRobot, trained and evaluated for real: a miniature SmolVLA in LeRobot's format, steered on drawer-open.

    python benchmarks/steer_lerobot.py [--seeds 0] [--base FOLDER] [--workers 2]      (Python 3.12)

The base is the one in benchmarks/assets/, or is made by `dsrl-vla pretrain nano-smolvla` where FOLDER is empty. Steers
it with the shipped recipe, measures base, controls and head on the same 100 held-out episodes, and writes
benchmarks/results/lerobot.json. What has been done is kept under runs/benchmark/ and not done again.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).parent
RUNS = Path("runs/benchmark")


@dataclass(frozen=True)
class Args:
    """What to run."""

    seeds: tuple[int, ...] = (0, 1, 2)
    base: Path = ROOT / "assets" / "nano-smolvla"
    """The base's folder; made when it holds none."""
    workers: int = 2
    out: Path = field(default=ROOT / "results" / "lerobot.json")


def recipe_for(base: Path, seed: int) -> Any:
    """The shipped recipe on this base."""
    from dsrl_vla.recipe import load_recipe

    changes = {"name": f"lerobot-drawer-open-{seed}", "base": {"uri": f"lerobot:{base}"}, "train": {"seed": seed}}
    return load_recipe("lerobot-drawer-open", changes)


def measured(base: Path) -> dict[str, Any]:
    """Base and controls on the evaluation seeds, for all training seeds."""
    import torch
    from kept_runs import base_measures

    torch.set_num_threads(1)
    return base_measures(RUNS / "lerobot-drawer-open-base.json", recipe_for(base, 0))


def trained(base: Path, seed: int) -> Path:
    """A head: the best of its run."""
    import kept_runs

    recipe = recipe_for(base, seed)
    out = RUNS / recipe.name
    kept_runs.finished(out, recipe)  # refuses another recipe's
    if not (out / "finished").exists():
        kept_runs.trained(recipe, out, evaluate_after=False)
        (out / "finished").touch()
    return out


def evaluated(base: Path, seed: int) -> dict[str, Any]:
    """The head beside what `measured` found, on the same episodes."""
    import torch
    from dsrl_vla import SteeringHead
    from dsrl_vla.evaluation import evaluate
    from dsrl_vla.rollout import VectorTask
    from dsrl_vla.run_dir import Metrics

    torch.set_num_threads(1)
    recipe, out = recipe_for(base, seed), trained(base, seed)
    policy = recipe.base.load()
    with VectorTask(recipe.task, policy.spec.executed_steps) as task:
        result = evaluate(policy, SteeringHead.from_pretrained(out / "best"), task, known=measured(base))
    rows = Metrics(out / "metrics.jsonl").rows()
    curve = [[r["env_steps"], r["validation_success"]] for r in rows if "validation_success" in r]
    return result | {"train_seed": seed, "env_steps": max(r.get("env_steps", 0) for r in rows), "validation": curve}


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    import lerobot
    from dsrl_vla.pretraining import load_pretrain_recipe, pretrain

    RUNS.mkdir(parents=True, exist_ok=True)
    if not (args.base / "config.json").exists():
        pretrain(load_pretrain_recipe("nano-smolvla"), args.base)
    with multiprocessing.get_context("spawn").Pool(args.workers, maxtasksperchild=1) as pool:
        training = pool.map_async(partial(trained, args.base), args.seeds, chunksize=1)
        pool.apply(measured, (args.base,))
        training.get()
        runs = pool.map(partial(evaluated, args.base), args.seeds, chunksize=1)
    results: dict[str, Any] = {key: runs[0][key] for key in ("task", "episodes", "seeds", "base", "controls")}
    results["lerobot"] = lerobot.__version__
    own = ("train_seed", "env_steps", "validation", "steered", "steered_stochastic", "difference")
    results["runs"] = [{key: run[key] for key in own} for run in runs]
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    for run in runs:
        print(f"seed {run['train_seed']}: {run['base']['success']:.2f} -> {run['steered']['success']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
