"""The whole DSRL family on MetaWorld: SAC, NA (bank and exact), offline, offline-to-online, noise search.

    python benchmarks/dsrl_family.py [--tasks …] [--variants …] [--seeds 0 1 2] [--workers 2] [--report-only]

Every variant uses the shipped recipe of its task. Offline data are recorded episodes of the base, its noise drawn in
the recipe's layout: 50 before learning online, drawn at every decision; 400 to learn from alone, drawn once per
episode. `demonstrations` starts from 50 of the task's scripted expert instead and imitates the noise found behind
them, by the recipe's own algorithm, for 8,000 steps at most. Runs are kept under runs/family/, and neither they nor
those that the results file already holds with the present recipes are repeated; what steer_metaworld.py has run, with
the shipped algorithm, is taken over from there.
ogbench-cube-2, which is not among the default tasks, needs its base first: `dsrl-vla pretrain nano-ogbench-cube --out
bases/ogbench-cube`. Writes benchmarks/results/dsrl_family.json, and prints the table.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tyro
from kept_runs import finished, holds, merged, of_base, read, recorded, settings, trained
from steer_metaworld import RUNS as BASE_RUNS
from steer_metaworld import base_measures, learning_curve, recipe_for

RUNS = Path("runs/family")
NA = {"algorithm": "na", "eval": {"baselines": ["best-of-k"], "video_episodes": 0}}
VARIANTS: dict[str, dict[str, Any]] = {
    "sac": {"algorithm": "sac"},
    "na": NA,
    "na-0.98": NA | {"sac": {"gamma": 0.98}},
    "na-exact": {"algorithm": "na-exact"},
    "offline-to-online": NA | {"offline": {"updates": 2000, "stride": 2}, "train": {"learning_starts": 1}},
    "offline": NA | {"offline": {"updates": 6000, "stride": 2}, "train": {"env_steps": 0}},
    "demonstrations": {
        "sac": {"imitate": 1.0, "jitter": 0.2},
        "offline": {"updates": 2000, "stride": 2},
        "train": {"learning_starts": 1, "env_steps": 8000},
    },
    "ticket": {},
}
DISCOUNT = {"pick-place": 0.98, "push": 0.98}
"""Of what goes online from offline data, on the tasks where DSRL-NA levels off below 0.9 at the recipe's 0.99; as
`na-0.98` DSRL-NA is run with it by itself too."""
RECORDED = {"offline-to-online": ("layout", 50), "offline": ("held", 400), "demonstrations": ("expert", 50)}
"""Offline episodes of a variant: what `record --noise` (or `--demonstrator`) is told, and how many."""


@dataclass(frozen=True)
class Args:
    """What to run."""

    tasks: tuple[str, ...] = ("drawer-open", "pick-place", "sweep-into", "push", "peg-insert-side")
    variants: tuple[str, ...] = tuple(v for v in VARIANTS if v != "na-0.98")
    seeds: tuple[int, ...] = (0, 1, 2)
    workers: int = 2
    report_only: bool = False
    """Run nothing; collect the runs that have finished."""
    out: Path = field(default=Path(__file__).parent / "results" / "dsrl_family.json")


def variant_recipe(task: str, variant: str, seed: int) -> Any:
    """The shipped recipe of a task with what the variant changes."""
    from dsrl_vla.recipe import load_recipe

    changes = json.loads(json.dumps(VARIANTS[variant]))
    if "offline" in changes:
        changes["offline"]["source"] = str(offline_data(task, *RECORDED[variant]))
    if variant == "offline-to-online" and task in DISCOUNT:
        changes["sac"] = {"gamma": DISCOUNT[task]}
    changes["train"] = changes.get("train", {}) | {"seed": seed}
    recipe = load_recipe(task, changes | {"name": f"{task}-{variant}-{seed}"})
    return replace(recipe, eval=replace(recipe.eval, video_episodes=0))


def run_dir(task: str, variant: str, seed: int) -> Path:
    """Where a run is kept."""
    return RUNS / f"{task}-{variant}-{seed}"


def as_shipped(task: str, variant: str) -> bool:
    """Whether the variant is what the task's recipe ships with, so that steer_metaworld.py runs it."""
    from dsrl_vla.recipe import load_recipe

    return variant == load_recipe(task).algorithm


def offline_data(task: str, noise: str, episodes: int) -> Path:
    """Episodes of the base, recorded once per task."""
    return RUNS / f"{task}-{noise}-{episodes}.npz"


def record_task(task: str, variants: set[str]) -> None:
    """Record what a task's variants learn from offline, and measure its base and controls, unless they are there."""
    base_measures(task)
    for noise, episodes in sorted({RECORDED[v] for v in variants if v in RECORDED}):
        recorded(task, noise, episodes, offline_data(task, noise, episodes))


def run_ticket(task: str, seed: int, out: Path) -> None:
    """Search and evaluate a golden ticket."""
    from dsrl_vla.noise_search import SearchConfig, evaluate_ticket, search_ticket
    from dsrl_vla.rollout import VectorTask

    recipe = recipe_for(task, "transformer", seed)
    base = recipe.base.load()
    layout = recipe.noise.over(base.spec.noise)
    with VectorTask(recipe.task, base.spec.executed_steps) as vector:
        ticket = search_ticket(base, vector, layout, SearchConfig(seed=seed))
        result = evaluate_ticket(base, vector, layout, ticket, recipe.eval.episodes)
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.yaml").write_text(variant_recipe(task, "ticket", seed).to_yaml())
    ticket.save(out / "ticket.json")
    own = {"env_steps": ticket.env_steps, "train_seed": seed, "base_sha256_after": base.sha256()}
    (out / "eval.json").write_text(json.dumps(result | own, indent=1) + "\n")


def take_over(task: str, variant: str, seed: int, out: Path) -> bool:
    """Take steer_metaworld.py's run of the same settings, best-of-K by its Q^A added; False when there is none."""
    source = BASE_RUNS / f"{task}-transformer-{seed}"
    if not as_shipped(task, variant) or not finished(source, variant_recipe(task, variant, seed)):
        return False
    shutil.copytree(source, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("eval.json"))
    result = json.loads((source / "eval.json").read_text())
    more = best_of_k(task, seed, out) if variant == "na" else {}
    (out / "eval.json").write_text(json.dumps(result | more, indent=1) + "\n")  # which says that all is there
    return True


def best_of_k(task: str, seed: int, out: Path) -> dict[str, Any]:
    """``{"baselines": …}`` of a finished DSRL-NA run: the best of K draws by the Q^A it left."""
    from dsrl_vla import seeds as ranges
    from dsrl_vla.evaluation import measure
    from dsrl_vla.noise_aliasing import ACTION_CRITIC, ActionCritic
    from dsrl_vla.noise_search import BestOfK
    from dsrl_vla.rollout import VectorTask
    from dsrl_vla.training import load_run
    from safetensors.torch import load_file

    recipe, head = load_run(out)
    base = recipe.base.load()
    critic = ActionCritic(recipe.critic, head.config, (base.spec.executed_steps, base.spec.action_dim))
    critic.load_state_dict(load_file(out / "best" / ACTION_CRITIC))
    source = BestOfK(base, head, critic)
    episodes = ranges.block(ranges.EVALUATION, recipe.eval.episodes)
    with VectorTask(recipe.task, base.spec.executed_steps) as vector:
        found = measure(base, vector, source, episodes)
    return {"baselines": {"best-of-k": found.to_json() | {"k": source.k}}}


def run_job(job: tuple[str, str, int]) -> None:
    """One run, unless it is there already."""
    import torch

    task, variant, seed = job
    torch.set_num_threads(1)
    out = run_dir(task, variant, seed)
    if finished(out, variant_recipe(task, variant, seed)):
        return
    if variant == "ticket":
        run_ticket(task, seed, out)
    elif not take_over(task, variant, seed, out):
        recipe = variant_recipe(task, variant, seed)
        trained(recipe, out, known=base_measures(task))
    print("done", task, variant, seed, flush=True)


OWN = (
    *("steered", "steered_stochastic", "baselines", "tasks", "train_seed", "env_steps", "updates", "train_seconds"),
    "warnings",
)


def wanted(task: str, variant: str, seed: int) -> dict[str, Any]:
    """The settings a run of this variant has; of a searched ticket, what evaluates it."""
    return settings(variant_recipe(task, variant, seed))


def missing(args: Args) -> list[tuple[str, str, int]]:
    """The runs asked for that no results file holds."""
    found = read_all(args)

    def held(task: str, variant: str, seed: int) -> bool:
        runs = found.get(task, {}).get("variants", {}).get(variant, [])
        return holds(runs, seed, wanted(task, variant, seed))

    jobs = [(t, v, s) for s in args.seeds for v in args.variants for t in args.tasks]
    return [job for job in jobs if not held(*job)]


def read_all(args: Args) -> dict[str, Any]:
    """The results file, with DSRL-SAC's runs from steer_metaworld.py's where the shipped recipe is SAC."""
    found = read(args.out)
    for task, entry in read(args.out.with_name("metaworld.json")).items():
        runs = [run for run in entry["runs"] if run["kind"] == "transformer"]
        if as_shipped(task, "sac") and runs:
            own = found.setdefault(task, {"base": entry["base"], "controls": entry["controls"], "variants": {}})
            own["variants"] = {"sac": [{k: v for k, v in r.items() if k != "kind"} for r in runs]} | own["variants"]
    return found


def collect(args: Args) -> dict[str, Any]:
    """All results with the runs that have finished since: task -> variant -> list of runs."""
    found = read_all(args)
    for task, variant in itertools.product(args.tasks, args.variants):
        fresh = []
        for seed in args.seeds:
            out = run_dir(task, variant, seed)
            if not finished(out, variant_recipe(task, variant, seed)):
                continue
            result = json.loads((out / "eval.json").read_text())
            run = {"settings": wanted(task, variant, seed)} | {key: result[key] for key in OWN if key in result}
            if (out / "metrics.jsonl").exists():
                run |= learning_curve(out)
            fresh.append(run)
            sha256 = result.get("base_sha256_after") or found.get(task, {}).get("base_sha256", "")
            if not of_base(found.get(task, {}), sha256):
                found[task] = {"base": result["base"], "variants": {}}
            found[task]["base_sha256"] = sha256
            if result.get("controls"):  # a ticket's evaluation has none; what is there goes with the base's figures
                found[task].setdefault("controls", result["controls"])
        old = found.get(task, {}).get("variants", {}).get(variant, [])
        runs = merged(old, fresh, wanted(task, variant, 0))
        if runs:
            found[task]["variants"][variant] = runs
        elif old:  # of other settings
            del found[task]["variants"][variant]
    return found


COLUMNS = ("sac", "na", "na-0.98", "na-exact", "offline-to-online", "offline", "demonstrations", "ticket", "best-of-k")


def successes(variants: dict[str, Any], column: str) -> list[float]:
    """Every seed's success; the best of K by Q^A is measured by DSRL-NA's runs."""
    if column == "best-of-k":
        found = (run.get("baselines", {}).get(column) for run in variants.get("na", []))
        return [each["success"] for each in found if each]
    return [run["steered"]["success"] for run in variants.get(column, [])]


def cell(variants: dict[str, Any], column: str) -> str:
    """Mean success and every seed's; below, each seed's steps to 0.90 on validation episodes, where it has any."""
    each = successes(variants, column)
    if not each:
        return ""
    words = f"**{sum(each) / len(each):.2f}** ({', '.join(f'{success:.2f}' for success in each)})"
    steps = [run["steps_to_0.9"] for run in variants.get(column, []) if "steps_to_0.9" in run]
    counts = ", ".join("–" if count is None else f"{count / 1000:.1f}k" if count else "0" for count in steps)
    return f"{words}<br>{counts}" if counts else words


def table(found: dict[str, Any]) -> str:
    """The results as Markdown: a row for each task, a column for each variant that has been run."""
    columns = [c for c in COLUMNS if any(successes(entry["variants"], c) for entry in found.values())]
    lines = [f"| task | base | {' | '.join(columns)} |", "|" + "---|" * (2 + len(columns))]
    for task, entry in found.items():
        cells = " | ".join(cell(entry["variants"], column) for column in columns)
        lines.append(f"| {task} | {entry['base']['success']:.2f} | {cells} |")
    return "\n".join(lines)


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    for folder in (RUNS, BASE_RUNS):
        folder.mkdir(parents=True, exist_ok=True)
    if not args.report_only:
        with multiprocessing.get_context("spawn").Pool(args.workers, maxtasksperchild=1) as pool:
            jobs = missing(args)
            wants = {task: {v for t, v, _ in jobs if t == task} for task, *_ in jobs}
            pool.starmap(record_task, wants.items(), chunksize=1)
            pool.map(run_job, jobs, chunksize=1)
    found = collect(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
