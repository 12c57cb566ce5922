"""Write benchmarks/PERFORMANCE.md from benchmarks/results, and print every goal.

python benchmarks/report.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from common import RESULTS

SCRIPTS = {
    "learner": "bench_learner.py",
    "update_cost": "update_cost.py",
    "prefix": "bench_prefix.py",
    "replay": "bench_replay.py",
    "demo_time": "bench_demo.py",
    "import": "bench_import.py",
    "memory": "bench_memory.py",
}
INTRODUCTION = """# Performance

Written by `benchmarks/report.py` from the JSON in `benchmarks/results/`; `make bench` measures it all again. Ratios
are taken within a round, in which the compared sides take turns on one thread; a figure is the median over rounds,
and of a single round there is no spread. The clock is CPU time. The machine was a shared one (two cores under other
load): trust ratios, not milliseconds.
"""
GIB = 2**30


def load() -> dict[str, dict[str, Any]]:
    """Every result that is there, by name."""
    paths = {name: RESULTS / f"{name}.json" for name in SCRIPTS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def goal_table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Each goal in a row."""
    rows = ["| what | found | goal | | rounds | script |", "|---|---|---|---|---|---|"]
    for name, result in results.items():
        for goal in result["goals"]:
            sign, unit = ("≥" if goal["at_least"] else "≤"), goal["unit"].replace("x", "×")
            verdict = "met" if goal["met"] else "**missed**"
            found = f"{goal['value']:.3g}{unit} | {sign} {goal['goal']:g}{unit} | {verdict}"
            rounds = "computed" if result.get("computed") else result["rounds"]
            rows.append(f"| {goal['what']} | {found} | {rounds} | `{SCRIPTS[name]}` |")
    return rows


def profile_table(result: dict[str, Any]) -> list[str]:
    """Where the demo's CPU time went."""
    before, after = (result["cpu_seconds_by_part"][name] for name in ("before", "after"))
    rows = [f"CPU seconds of one run, before (commit {result['before']}) and after.", ""]
    rows += ["| part | before | after |", "|---|---|---|"]
    for part in sorted(before, key=before.get, reverse=True):
        rows.append(f"| {part} | {before[part]:.1f} | {after.get(part, 0):.1f} |")
    return [*rows, f"| all | {sum(before.values()):.1f} | {sum(after.values()):.1f} |"]


def memory_table(result: dict[str, Any]) -> list[str]:
    """What π0 takes on a GPU."""
    rows = ["Computed from the real class's weights on the meta device; activations are not counted.", ""]
    rows += ["| part | GiB |", "|---|---|"]
    rows += [f"| {part} | {size / GIB:.3f} |" for part, size in result["bytes"].items()]
    rows += [f"| all, of {result['set_up']['gpu_gb'] * 1e9 / GIB:.1f} | {result['total_bytes'] / GIB:.2f} |", ""]
    kept = result["replay_bytes_per_observation"]
    rows.append(
        "There is one copy of the base: none in targets, none in checkpoints. In the replay an observation takes "
        f"{kept['pooled feature and state'] / 1e3:.1f} kB; with its keys and values it would take "
        f"{kept['keys and values, were they kept'] / 1e6:.1f} MB."
    )
    return rows


def main() -> int:
    results = load()
    lines = [INTRODUCTION, *goal_table(results)]
    if "demo_time" in results:
        lines += ["", "## Where the demo's time goes", "", *profile_table(results["demo_time"])]
    if "memory" in results:
        lines += ["", "## π0 on a 24 GB GPU", "", *memory_table(results["memory"])]
    (Path(__file__).parent / "PERFORMANCE.md").write_text("\n".join(lines) + "\n")
    goals = [goal for result in results.values() for goal in result["goals"]]
    for goal in goals:
        print(f"{'met   ' if goal['met'] else 'MISSED'} {goal['what']}: {goal['value']:g} (goal {goal['goal']:g})")
    return int(not all(goal["met"] for goal in goals))


if __name__ == "__main__":
    sys.exit(main())
