"""What preflight recommends for each MetaWorld task, beside what its shipped recipe says.

    python benchmarks/preflight_layouts.py [--tasks …] [--workers 2]

A recipe with `noise.layout: auto` takes preflight's word, so where the two columns agree, auto is the shipped recipe.
Writes benchmarks/results/preflight.json, task by task; what it already holds is not measured again (delete the file
to start over).
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from dataclasses import dataclass
from typing import Any

import tyro
from common import RESULTS
from kept_runs import read

OUT = RESULTS / "preflight.json"


@dataclass(frozen=True)
class Args:
    """What to measure."""

    tasks: tuple[str, ...] = ("drawer-open", "pick-place", "sweep-into", "push", "peg-insert-side")
    """Names of shipped recipes."""
    workers: int = 2


def run_task(name: str) -> tuple[str, dict[str, Any]]:
    """Preflight of one recipe's base and task."""
    import torch
    from dsrl_vla.recipe import load_recipe
    from dsrl_vla.rollout import VectorTask
    from dsrl_vla.steerability import preflight

    torch.set_num_threads(1)
    recipe = load_recipe(name)
    base = recipe.base.load()
    with VectorTask(recipe.task, base.spec.executed_steps) as task:
        found = preflight(base, task)
    shipped = {"layout": recipe.noise.layout, "bound": recipe.noise.bound}
    return name, found | {"shipped": shipped}


def cell(noise: dict[str, Any]) -> str:
    """Layout and bound in words."""
    return f"{noise['layout']}, {noise['bound']:g}"


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    layouts = ("repeat", "knots:2", "knots:4", "chunk")
    lines = [f"| task | base | {' | '.join(f'best of 4, {x}' for x in layouts)} | preflight says | the recipe says |"]
    lines.append("|" + "---|" * (4 + len(layouts)))
    for name, entry in found.items():
        reach = " | ".join(f"{entry['best_of'][f'layout {x}']['success']:.2f}" for x in layouts)
        words = f"{cell(entry['recommendation'])} | {cell(entry['shipped'])}"
        lines.append(f"| {name} | {entry['conditions']['base']['success']:.2f} | {reach} | {words} |")
    return "\n".join(lines)


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    found = read(OUT)
    with multiprocessing.get_context("spawn").Pool(args.workers, maxtasksperchild=1) as pool:
        for name, entry in pool.imap_unordered(run_task, [task for task in args.tasks if task not in found]):
            found[name] = entry
            OUT.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
