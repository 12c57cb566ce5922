"""Write benchmarks/REPORT.md, with pictures, from benchmarks/results: the paper's benchmarks as far as run.

    python benchmarks/paper_report.py

Where there are several seeds, their interquartile mean (without the best and the worst quarter, rounded down, of all
seeds' and tasks' scores) comes with a stratified bootstrap interval.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS
from dsrl_vla.measures import shown, value
from scipy.stats import trim_mean

HERE = Path(__file__).parent
PICTURE = RESULTS / "paper_gym.png"
COLOURS = {"ours": "#0b6e99", "sac": "#9fc5d8", "sb3": "#7a4fa3", "base": "#b5651d"}
GOALS = {"hopper": 1.8, "walker2d": 1.8, "halfcheetah": 1.2}
SCALE = {"hopper": (-20.272305, 3234.3), "walker2d": (1.629008, 4592.3), "halfcheetah": (-280.178953, 12135.0)}
"""Returns that D4RL scores 0 (random) and 100 (expert)."""
SEEDS, BUDGET = 3, 200_000
CAVEAT = """Score: on D4RL's scale, 0 for its random and 100 for its expert policy, which were measured on version 2 of
these environments; here it is version 5. Compare rows of the same environment steps only. CPU seconds are those of a
whole run, validation included; the wall times in the JSON were taken on a machine busy with other work."""
INTRODUCTION = """# The paper's benchmarks

Written by `benchmarks/paper_report.py` from the JSON in `benchmarks/results/`; `make paper` runs what is missing.
"""


def read(name: str) -> dict[str, Any]:
    """A result; empty when there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def iqm(scores: list[list[float]]) -> str:
    """Interquartile mean of every task's seeds, and its 95 % interval by stratified bootstrap over seeds, in words.

    rliable's definitions, by scipy and numpy: rliable 1.2 does not import beside the arch and pandas of today. Of
    fewer than four scores nothing is cut off, and it is their mean.
    """
    tasks = [np.array(each) for each in scores]
    middle = lambda parts: float(trim_mean(np.concatenate(parts), 0.25))
    found = f"{middle(tasks):.2f}" + " (mean)" * (sum(map(len, tasks)) < 4)
    if max(map(len, tasks)) < 2:
        return f"{found} | one seed: none"
    rng = np.random.default_rng(0)
    drawn = [middle([rng.choice(each, len(each)) for each in tasks]) for _ in range(2000)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return f"{found} | [{low:.2f}, {high:.2f}]"


def best_so_far(run: dict[str, Any], steps: float) -> float:
    """The best validation within a budget; what selection would have taken."""
    return max((found for at, _, found in run["curve"] if at <= 1.01 * steps), default=float("nan"))


def draw(found: dict[str, Any]) -> None:
    """Validation return against environment steps, every run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(5.2 * len(found), 3.6), squeeze=False)
    for axis, (task, entry) in zip(axes[0], found.items(), strict=True):
        axis.axhline(entry["base"]["return"], color=COLOURS["base"], ls="--", label="base")
        for variant, runs in entry["variants"].items():
            for number, run in enumerate(runs):
                steps, _, returns = zip(*run["curve"], strict=True)
                label = None if number else f"{variant}, {len(runs)} seed" + "s" * (len(runs) > 1)
                axis.plot(steps, returns, "o-", ms=3, color=COLOURS[variant], label=label)
        axis.set(title=task, xlabel="environment steps", ylabel="return, validation episodes")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=130)
    plt.close(figure)


def rows(measures: dict[str, dict[str, Any]], task: str, episodes: int, base: float) -> list[str]:
    """A row for each way of picking noise that takes no training."""
    return [
        f"| {task}, {episodes} episodes | {k} | | | {' | '.join(shown(m))} | {relative(task, m, base)} | |"
        for k, m in measures.items()
    ]


def relative(task: str, measure: dict[str, Any], base: float) -> str:
    """D4RL's score, and times the base's return."""
    low, high = SCALE[task]
    return f"{100 * (value(measure) - low) / (high - low):.0f} | {value(measure) / base:.2f}"


def gym_section(found: dict[str, Any]) -> list[str]:
    """Figure 3's Gym part."""
    lines = ["## Gym: a diffusion policy, steered here and by Stable-Baselines3", ""]
    if not found:
        return [*lines, "Nothing has been run yet: `python benchmarks/paper_gym.py`.", ""]
    draw(found)
    lines += [f"![validation return against environment steps](results/{PICTURE.name})", ""]
    lines += [
        "| task | noise | training seed | env steps | return | 95 % interval | score | of the base's | CPU seconds |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for task, entry in found.items():
        base = value(entry["base"])
        lines += rows({"base": entry["base"]} | entry["controls"], task, entry["episodes"], base)
        for variant, runs in entry["variants"].items():
            for run in runs:
                cells = " | ".join(shown(run["steered"]))
                times = f"{relative(task, run['steered'], base)} | {run.get('cpu_seconds', '–')}"
                lines.append(
                    f"| {task} | {variant} | {run['train_seed']} | {run['env_steps']:,} | {cells} | {times} |"
                )
    return [*lines, "", CAVEAT, "", *side_by_side(found), *verdicts(found)]


def side_by_side(found: dict[str, Any]) -> list[str]:
    """The best validation so far at every budget: mean over the seeds that both sides have, and each of them."""
    lines = ["Best validation return so far, mean of the seeds that both have run (and each seed's):", ""]
    lines += ["| task | seeds | environment steps | ours | sb3 |", "|---|---|---|---|---|"]
    for task, entry in found.items():
        sides = [{run["train_seed"]: run for run in entry["variants"].get(name, [])} for name in ("ours", "sb3")]
        seeds = sorted(sides[0].keys() & sides[1].keys())
        reached = min((side[seed]["curve"][-1][0] for side in sides for seed in seeds), default=0)
        for budget in [at for at, *_ in sides[1][seeds[0]]["curve"] if at <= 1.01 * reached] if seeds else []:
            cells = " | ".join(told([best_so_far(side[seed], budget) for seed in seeds]) for side in sides)
            lines.append(f"| {task} | {', '.join(map(str, seeds))} | {budget:,} | {cells} |")
    return [*lines, ""]


def told(each: list[float]) -> str:
    """A mean, and what it is the mean of."""
    return f"**{np.mean(each):.0f}** ({', '.join(f'{x:.0f}' for x in each)})"


def verdicts(found: dict[str, Any]) -> list[str]:
    """The goals, met, missed or not run."""
    lines = [f"Goals: within {BUDGET:,} environment steps, {SEEDS} training seeds.", ""]
    for task, goal in GOALS.items():
        entry = found.get(task, {"variants": {}})
        runs = entry["variants"].get("ours", [])
        if not runs:
            lines.append(f"- {task}, {goal} times the base's return: **not run**. `{command(task)}`")
            continue
        times = [value(run["steered"]) / value(entry["base"]) for run in runs]
        short = sum(t < goal for t in times)
        verdict = f"**missed** by {short} of {len(runs)} seeds" if short else "met by every seed run"
        said = f"{', '.join(f'{t:.2f}' for t in times)} times"
        more = "" if len(runs) >= SEEDS else f"; **only {len(runs)} of {SEEDS} seeds run**: `{command(task)}`"
        lines.append(f"- {task}, {goal} times the base's return: {verdict} ({said}){more}")
    return [*lines, ""]


def offline_section(found: dict[str, Any]) -> list[str]:
    """Figure 5 on Gym: steps to the goal of the Gym benchmark, with recorded episodes and without."""
    columns = "task | variant | training seeds | steps to the goal | mean | held-out return"
    lines = ["## Gym: fifty recorded episodes before the first online step", "", f"| {columns} |", "|---" * 6 + "|"]
    notes: list[str] = []
    for task, entry in found.items():
        goal = GOALS[task] * value(entry["base"])
        for variant, runs in entry["variants"].items():
            seeds = ", ".join(str(run["train_seed"]) for run in runs)
            each = [steps_to(run, goal) for run in runs]
            words = ", ".join("–" if steps is None else f"{steps:,}" for steps in each)
            mean = "–" if None in each else f"{np.mean([x for x in each if x is not None]):,.0f}"
            returns = told([value(run["steered"]) for run in runs])
            lines.append(f"| {task} | {variant} | {seeds} | {words} | {mean} | {returns} |")
        recorded = f"{entry['recorded_steps']:,} recorded steps are not counted"
        notes += [
            f"- {task}: the goal is {goal:.0f} in validation, {GOALS[task]} times the base's return; {recorded}."
        ]
    return [*lines, "", *notes, ""]


def steps_to(run: dict[str, Any], goal: float) -> int | None:
    """Environment steps at the first validation that reaches `goal`."""
    return next((int(at) for at, _, found in run["curve"] if found >= goal), None)


def command(task: str) -> str:
    """What runs the rest."""
    return f"python benchmarks/paper_gym.py --tasks {task}"


def success_section(title: str, found: dict[str, Any], runs_of: Any) -> list[str]:
    """Tasks with success: a table with every control, and IQM over the tasks that a variant has been run whole on."""
    columns = "task | base | zero | clipped | layout | variant | every seed | mean | steps to 0.90"
    lines = [f"## {title}", "", f"| {columns} |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    scores: dict[str, dict[str, list[float]]] = {}
    for task, entry in found.items():
        cells = [entry["base"], *(entry["controls"][name] for name in ("zero", "clipped", "layout"))]
        known = " | ".join(f"{shown(m)[0]} {shown(m)[1]}" for m in cells)
        for variant, runs in runs_of(entry).items():
            each = [value(run["steered"]) for run in runs]
            if len(each) >= SEEDS:
                scores.setdefault(variant, {})[task] = each
            seeds_told = ", ".join(f"{x:.2f}" for x in each)
            lines.append(f"| {task} | {known} | {variant} | {seeds_told} | **{np.mean(each):.2f}** | {speed(runs)} |")
    lines += ["", "| variant | tasks | seeds | IQM of success | 95 % interval |", "|---|---|---|---|---|"]
    for variant, by_task in scores.items():
        fewest, most = (how(map(len, by_task.values())) for how in (min, max))
        seeds = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        lines.append(f"| {variant} | {', '.join(by_task)} | {seeds} | {iqm(list(by_task.values()))} |")
    return [*lines, ""]


def speed(runs: list[dict[str, Any]]) -> str:
    """Environment steps to 0.90 on validation episodes, every seed's; a dash where it was not reached."""
    reached = [run["steps_to_0.9"] for run in runs if "steps_to_0.9" in run]
    return ", ".join("–" if steps is None else f"{steps:,}" for steps in reached)


KINDS = {"offline-to-online": "the base's own", "demonstrations": "demonstrations, imitated"}
"""What 50 episodes a variant starts from."""


def online_section(*files: dict[str, Any]) -> list[str]:
    """Steps to 0.90 with offline episodes before the first step, and without them; other settings that differ are
    told."""
    columns = "task | 50 episodes | algorithm | steps to 0.90, with | without | share | 95 % interval | times fewer"
    lines = ["## Offline to online: with 50 recorded episodes, and without", "", f"| {columns} |", "|---" * 8 + "|"]
    tasks = [(task, entry["variants"]) for found in files for task, entry in found.items()]
    held = [(task, name, runs, variants) for task, variants in tasks for name, runs in variants.items()]
    for kind, words in KINDS.items():
        for task, name, runs, variants in held:
            if name.partition(",")[0] == kind and (alone := without(name, runs, variants)):
                cells = (task, words, algorithm(runs), speed(runs), speed(alone), share(runs, alone))
                lines.append(f"| {' | '.join(cells)} |")
    words = "Share: the mean of one over the mean of the other, its interval by bootstrap over seeds. A run that never"
    words += " reaches 0.90 counts as all its steps: ≤ and ≥ say which way that errs. From demonstrations runs have"
    return [*lines, "", f"{words} 8,000 steps at most, and `sac.jitter` 0.2; the others 15,000 or 40,000, and 0.", ""]


def without(name: str, runs: list[dict[str, Any]], variants: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs by the same algorithm without recorded episodes: the same discount, validated as often."""
    how = name.partition(",")[2]
    gamma = lambda held: held[0]["settings"].get("sac.gamma")
    by = algorithm(runs)
    alone = (variants.get(other, []) for other in (f"{by}-0.98", f"{by},{how}" if how else by))
    return next((held for held in alone if held and gamma(held) == gamma(runs)), [])


def algorithm(runs: list[dict[str, Any]]) -> str:
    """By its name; the default is not among the settings."""
    return str(runs[0]["settings"].get("algorithm", "sac"))


def share(runs: list[dict[str, Any]], alone: list[dict[str, Any]]) -> str:
    """Share, interval and its inverse as three cells."""
    steps = lambda held: np.array([r["env_steps"] if r["steps_to_0.9"] is None else r["steps_to_0.9"] for r in held])
    never = [any(run["steps_to_0.9"] is None for run in held) for held in (runs, alone)]
    lengths = {run["settings"].get("train.env_steps") for run in (*runs, *alone)}
    if all(never) or (never[0] and len(lengths) > 1):
        return "– | – | –"
    own, theirs, rng = steps(runs), steps(alone), np.random.default_rng(0)
    drawn = [rng.choice(own, len(own)).mean() / rng.choice(theirs, len(theirs)).mean() for _ in range(2000)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    sign, inverse = ("≥ ", "≤ ") if never[0] else ("≤ ", "≥ ") if never[1] else ("", "")
    found = own.mean() / theirs.mean()
    fewer = f"{inverse}**{1 / found:.1f}**" if found else "**none needed**"
    return f"{sign}{found:.2f} | [{low:.2f}, {high:.2f}] | {fewer}"


def by_kind(entry: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """steer_metaworld.py's runs by network."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in entry["runs"]:
        found.setdefault(run["kind"], []).append(run)
    return found


def main() -> int:
    lines = [INTRODUCTION, *gym_section(read("paper_gym"))]
    if offline := read("paper_offline"):
        lines += offline_section(offline)
    robosuite = {t: e for t, e in read("paper_robosuite").items() if {"base", "controls", "variants"} <= set(e)}
    if robosuite:
        title = "robosuite: a base cloned from a scripted operator"
        lines += success_section(title, robosuite, lambda entry: entry["variants"])
    lines += success_section("MetaWorld, the shipped recipes", read("metaworld"), by_kind)
    title = "MetaWorld and OGBench, the DSRL family"
    family = read("dsrl_family")
    lines += success_section(title, family, lambda entry: entry["variants"])
    lines += online_section(family, robosuite)
    (HERE / "REPORT.md").write_text("\n".join(lines).rstrip() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
