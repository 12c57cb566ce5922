"""The README's MetaWorld table: every task, three training seeds, transformer and MLP, against base and controls.

    python benchmarks/steer_metaworld.py [--workers 2] [--seeds 0 1 2] [--tasks …] [--kinds transformer mlp]

Runs are kept under runs/benchmark/, and neither they nor those that the results file already holds with the present
recipes are repeated (delete the file to start over). Writes benchmarks/results/metaworld.json, and prints the table.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import kept_runs
import tyro
from kept_runs import finished, holds, merged, of_base, read, settings

ROOT = Path(__file__).parent
RUNS = Path("runs/benchmark")


@dataclass(frozen=True)
class Args:
    """What to run."""

    tasks: tuple[str, ...] = ("drawer-open", "pick-place", "sweep-into", "push", "peg-insert-side")
    """Names of shipped recipes."""
    seeds: tuple[int, ...] = (0, 1, 2)
    kinds: tuple[str, ...] = ("transformer", "mlp")
    workers: int = 2
    report_only: bool = False
    """Run nothing; collect the runs that have finished."""
    out: Path = field(default=ROOT / "results" / "metaworld.json")


def recipe_for(task: str, kind: str, seed: int) -> Any:
    """The shipped recipe with the network and the seed of this run; the MLP: twice as wide, 0.6 times the weights."""
    from dsrl_vla.recipe import load_recipe

    recipe = load_recipe(task)
    name = f"{task}-{kind}-{seed}"
    recipe = replace(
        recipe, name=name, train=replace(recipe.train, seed=seed), eval=replace(recipe.eval, video_episodes=0)
    )
    if kind == "mlp":
        overrides = {"kind": "mlp", "width": 2 * recipe.head.network.width}
        network = replace(recipe.head.network, **overrides)
        critic = replace(recipe.critic, network=replace(recipe.critic.network, **overrides))
        recipe = replace(recipe, head=replace(recipe.head, network=network), critic=critic)
    return recipe


def base_measures(task: str) -> dict[str, Any]:
    """Base and controls on the evaluation seeds: once per task, for all its runs."""
    return kept_runs.base_measures(RUNS / f"{task}-base.json", recipe_for(task, "transformer", 0))


def run_task(job: tuple[str, str, int]) -> None:
    """One training run, unless its directory is there already."""
    import torch

    task, kind, seed = job
    torch.set_num_threads(1)
    out = RUNS / f"{task}-{kind}-{seed}"
    if kind == "base":
        base_measures(task)
    elif not finished(out, recipe_for(task, kind, seed)):
        kept_runs.trained(recipe_for(task, kind, seed), out, known=base_measures(task))
    print("done", task, kind, seed, flush=True)


SHARED = ("task", "episodes", "seeds", "base", "controls")
OWN = (
    *("steered", "steered_stochastic", "difference", "train_seed", "env_steps", "validation_env_steps"),
    *("updates", "train_seconds", "base_sha256_before", "base_sha256_after"),
)


def learning_curve(out: Path) -> dict[str, Any]:
    """A run's validations, and the environment steps at which they first reached 0.9 (None: never)."""
    from dsrl_vla.run_dir import Metrics

    rows = Metrics(out / "metrics.jsonl").rows()
    curve = [[r["env_steps"], r["validation_success"]] for r in rows if "validation_success" in r]
    reached = next((steps for steps, success in curve if success >= 0.9), None)
    return {"steps_to_0.9": reached, "validation": curve}


def summary_cells(runs: list[dict[str, Any]]) -> str:
    """Mean success, every seed's, and every seed's steps to 0.9, as cells of a Markdown row."""
    each = [run["steered"]["success"] for run in runs]
    reached = [run.get("steps_to_0.9") for run in runs]
    steps = ", ".join("–" if r is None else f"{r / 1000:.1f}k" for r in reached)
    return f"**{sum(each) / len(each):.2f}** | {', '.join(f'{success:.2f}' for success in each)} | {steps}"


def missing(args: Args) -> list[tuple[str, str, int]]:
    """The runs asked for that the results file does not hold."""
    tasks = read(args.out)

    def held(task: str, kind: str, seed: int) -> bool:
        runs = [run for run in tasks.get(task, {}).get("runs", []) if run["kind"] == kind]
        return holds(runs, seed, settings(recipe_for(task, kind, seed)))

    jobs = [(t, k, s) for k in args.kinds for s in args.seeds for t in args.tasks]
    return [job for job in jobs if not held(*job)]


def collect(args: Args) -> dict[str, Any]:
    """The results file with all runs that have finished since."""
    tasks = read(args.out)
    for task, kind in itertools.product(args.tasks, args.kinds):
        fresh = []
        for seed in args.seeds:
            out, recipe = RUNS / f"{task}-{kind}-{seed}", recipe_for(task, kind, seed)
            if not finished(out, recipe):
                continue
            result = json.loads((out / "eval.json").read_text())
            own = {key: result[key] for key in OWN}
            fresh.append({"kind": kind, "settings": settings(recipe), **own, **learning_curve(out)})
            sha256 = result["base_sha256_after"]
            held = of_base(tasks.get(task, {}), sha256).get("runs", [])
            tasks[task] = {key: result[key] for key in SHARED} | {"base_sha256": sha256, "runs": held}
        runs = tasks.get(task, {}).get("runs", [])
        of_kind = merged([r for r in runs if r["kind"] == kind], fresh, settings(recipe_for(task, kind, 0)))
        if task in tasks:
            tasks[task]["runs"] = [*(r for r in runs if r["kind"] != kind), *of_kind]
    return tasks


def table(tasks: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| task | base | zero | clipped | layout | head | steered, mean | every seed | steps to 0.90 (validation) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in tasks.items():
        cells = [
            f"{m['success']:.2f}"
            for m in (entry["base"], *(entry["controls"][c] for c in ("zero", "clipped", "layout")))
        ]
        for kind in dict.fromkeys(run["kind"] for run in entry["runs"]):
            runs = [run for run in entry["runs"] if run["kind"] == kind]
            lines.append(f"| {name} | {' | '.join(cells)} | {kind} | {summary_cells(runs)} |")
    return "\n".join(lines)


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    RUNS.mkdir(parents=True, exist_ok=True)
    if not args.report_only:
        with multiprocessing.get_context("spawn").Pool(args.workers, maxtasksperchild=1) as pool:
            jobs = missing(args)
            pool.map(run_task, [(task, "base", 0) for task in dict.fromkeys(t for t, *_ in jobs)], chunksize=1)
            pool.map(run_task, jobs, chunksize=1)
    tasks = collect(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(tasks, indent=1) + "\n")
    print(table(tasks))
    return 0


if __name__ == "__main__":
    sys.exit(main())
