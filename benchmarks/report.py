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
    "learner-intel": "bench_learner.py",
    "update_cost": "update_cost.py",
    "prefix": "bench_prefix.py",
    "replay": "bench_replay.py",
    "overlap": "bench_overlap.py",
    "scaling": "bench_scaling.py",
    "demo_time": "bench_demo.py",
    "import": "bench_import.py",
    "memory": "bench_memory.py",
    "gpu_learner": "bench_gpu_learner.py",
    "gpu_pi0": "bench_gpu_pi0.py",
}
INTRODUCTION = """# Performance

Written by `benchmarks/report.py` from the JSON in `benchmarks/results/`; `make bench` measures it all again. Ratios
are taken within a round, in which the compared sides take turns on one thread; a figure is the median over rounds,
and of a single round there is no spread. The clock is CPU time, but for collecting while learning, for rollout
workers and on a GPU, where it is the wall's. The machine was a shared one (two cores under other load): trust ratios,
not milliseconds. Ratios too differ between processors; "x86_64" was an AMD one. The machine with the H200 was
another one, of sixteen slow cores.
"""
GIB = 2**30


def load() -> dict[str, dict[str, Any]]:
    """Every result that is there, by name."""
    paths = {name: RESULTS / f"{name}.json" for name in SCRIPTS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def goal_table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Each goal in a row."""
    rows = ["| what | found | goal | | rounds | processor | script |", "|---|---|---|---|---|---|---|"]
    for name, result in results.items():
        for goal in result["goals"]:
            sign, unit = ("≥" if goal["at_least"] else "≤"), goal["unit"].replace("x", "×")
            verdict = "met" if goal["met"] else "**missed**"
            found = f"{goal['value']:.4g}{unit} | {sign} {goal['goal']:g}{unit} | {verdict}"
            rounds = "computed" if result.get("computed") else result["rounds"]
            processor = result.get("gpu") or result.get("machine", {}).get("processor", "")
            rows.append(f"| {goal['what']} | {found} | {rounds} | {processor} | `{SCRIPTS[name]}` |")
    return rows


def profile_table(result: dict[str, Any]) -> list[str]:
    """Where the demo's CPU time went."""
    before, after = (result["cpu_seconds_by_part"][name] for name in ("before", "after"))
    rows = [f"CPU seconds, before (commit {result['before']}) and after, of one training run per seed.", ""]
    rows += ["| to a validation of 0.95 | before | after |", "|---|---|---|"]
    times, steps = result["times"]["reached, cpu s"], result["env_steps"]
    when = lambda name, i: f"{times[name][i]:g}" if steps[name][i] else f"never (the end: {times[name][i]:g})"
    rows += [f"| seed {seed} | {when('before', i)} | {when('after', i)} |" for i, seed in enumerate(result["seeds"])]
    rows += ["", "| part of a whole run, mean | before | after |", "|---|---|---|"]
    for part in sorted(before | after, key=lambda part: max(before.get(part, 0), after.get(part, 0)), reverse=True):
        cells = (f"{side[part]:.1f}" if part in side else "in the rest" for side in (before, after))
        rows.append(f"| {part} | {' | '.join(cells)} |")
    return [*rows, f"| all | {sum(before.values()):.1f} | {sum(after.values()):.1f} |"]


def overlap_table(result: dict[str, Any]) -> list[str]:
    """Collection and learning, overlapped and not."""
    rows = ["Wall-clock time on two cores; a round is a decision in every environment and the updates it is owed.", ""]
    rows += ["| updates per decision | collecting, s | updating, s | ratio that allows | ratio found |"]
    rows += ["|---|---|---|---|---|"]
    for found in (result["shipped"], result["balanced"]):
        alone, ratio = found["parts_of_a_round"], found["ratio"]
        rows.append(
            f"| {found['gradient_steps']:g} | {alone['collect_s']:.3f} | {alone['update_s']:.3f} "
            f"| {found['ratio_the_parts_allow']:.2f} | {ratio['median']:.2f} {ratio['ci95']} |"
        )
    return rows


def scaling_table(result: dict[str, Any]) -> list[str]:
    """Rollout workers: two measured, many computed."""
    rows = [
        "One and two workers are measured. More are **computed** from the measured parts, with a core each: upper "
        "bounds, without the network and the wait for a round's slowest worker. No such run was made. Updates: per "
        "decision, that one learner keeps up with.",
        "",
        "| workers | env steps/s | efficiency | updates | MB/s in | out | |",
        "|---|---|---|---|---|---|---|",
    ]
    rates, two = result["measured"]["env_steps_per_second"], result["measured"]["efficiency_of_two"]["median"]
    for workers, efficiency in (("1", 1.0), ("2", two)):
        rows.append(f"| {workers} | {rates[workers]['median']:.0f} | {efficiency:.2f} | | | | measured |")
    for row in result["computed_for_many_workers"]:
        rows.append(
            f"| {row['workers']} | {row['env_steps_per_second']} | {row['efficiency']:.2f} "
            f"| {row['updates_per_decision_kept_up']:.3g} | {row['megabytes_per_second_in']:g} "
            f"| {row['megabytes_per_second_out']:g} | computed |"
        )
    return rows


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


def updates_table(result: dict[str, Any]) -> list[str]:
    """Updates on a GPU."""
    rows = ["| | ours | ours, launched from Python | SB3's | host syncs per update, ours and SB3's |"]
    rows += ["|---|---|---|---|---|"]
    words = {"plain": "the same network", "normed": "the same network with LayerNorms"}
    for size, found in result["against_sb3"].items():
        rates = {side: f"{rate['median']:g}" for side, rate in found["updates_per_second"].items()}
        syncs = found["syncs_per_update"]
        for kind, name in words.items():
            waits = f"{syncs[f'ours, {kind}']:g} and {syncs[f'sb3, {kind}']:g}"
            launched = rates.get(f"ours, {kind}, unrecorded", "")
            row = f"{size}, {name} | {rates[f'ours, {kind}']} | {launched} | {rates[f'sb3, {kind}']} | {waits}"
            rows.append(f"| {row} |")
    rows += ["", "Updates per second; milliseconds per update of the shipped recipes' networks, below.", ""]
    times = result["shipped"]["ms_per_update"]
    rows += ["| | recorded | of compiled networks | one thread of that CPU |", "|---|---|---|---|"]
    for kind in ("transformer", "mlp"):
        cells = (times[f"{kind}, {side}"]["median"] for side in ("gpu", "gpu, compiled", "cpu"))
        rows.append(f"| {kind} | " + " | ".join(f"{value:.3g}" for value in cells) + " |")
    return rows


def decisions_table(result: dict[str, Any]) -> list[str]:
    """A full-size π0's decisions on a GPU."""
    found = result["cameras"]
    ceilings = {name: value / 1e12 for name, value in result["ceilings"].items()}
    rows = [
        f"Milliseconds. Measured ceilings: {ceilings['flops_per_second']:.0f} Tflop/s (bfloat16), "
        f"{ceilings['bytes_per_second']:.2f} TB/s. The floor counts the prefix's products and the reading of the "
        "expert's weights, once per step.",
        "",
        f"| | {' | '.join(f'{cameras} cameras' for cameras in found)} |",
        "|---|" + "---|" * len(found),
    ]
    for name in next(iter(found.values()))["ms"]:
        cells = (f"{v['ms'][name]['median']:.3g} {v['ms'][name]['ci95']}" for v in found.values())
        rows.append(f"| {name} | {' | '.join(cells)} |")
    floors = (f"{v['floor_ms']['prefix']:.1f} + {v['floor_ms']['sampler']:.1f}" for v in found.values())
    rows.append(f"| floor of an unsteered decision | {' | '.join(floors)} |")
    rows.append(
        f"| unsteered, times the floor | {' | '.join(str(v['over_the_floor']['median']) for v in found.values())} |"
    )
    return [*rows, f"| greatest memory, GiB | {' | '.join(str(v['peak_gib']) for v in found.values())} |"]


def main() -> int:
    results = load()
    lines = [INTRODUCTION, *goal_table(results)]
    if "demo_time" in results:
        lines += ["", "## Where the demo's time goes", "", *profile_table(results["demo_time"])]
    if "overlap" in results:
        lines += ["", "## Collecting while learning", "", *overlap_table(results["overlap"])]
    if "scaling" in results:
        lines += ["", "## Rollout workers", "", *scaling_table(results["scaling"])]
    if "memory" in results:
        lines += ["", "## π0 on a 24 GB GPU", "", *memory_table(results["memory"])]
    if "gpu_learner" in results:
        lines += ["", f"## Updates on a GPU ({results['gpu_learner']['gpu']})", ""]
        lines += updates_table(results["gpu_learner"])
    if "gpu_pi0" in results:
        lines += ["", f"## A full-size π0 on a GPU ({results['gpu_pi0']['gpu']})", ""]
        lines += decisions_table(results["gpu_pi0"])
    (Path(__file__).parent / "PERFORMANCE.md").write_text("\n".join(lines) + "\n")
    goals = [goal for result in results.values() for goal in result["goals"]]
    for goal in goals:
        print(f"{'met   ' if goal['met'] else 'MISSED'} {goal['what']}: {goal['value']:g} (goal {goal['goal']:g})")
    return int(not all(goal["met"] for goal in goals))


if __name__ == "__main__":
    sys.exit(main())
