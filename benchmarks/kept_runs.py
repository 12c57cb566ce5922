"""Results that grow run by run: what a committed JSON already holds is not run again.

A run is known by its task, variant, training seed and *settings*: what its recipe sets away from the defaults. When a
recipe changes, the runs of the old one no longer count, and are dropped when the file is next written.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsrl_vla import seeds as ranges
from dsrl_vla.cli import main as command
from dsrl_vla.evaluation import Measure, measure_base
from dsrl_vla.recipe import Recipe
from dsrl_vla.rollout import Episode, VectorTask

Runs = list[dict[str, Any]]
_WITHOUT_EFFECT = {
    *("name", "description", "train.seed", "train.threads", "train.tracker", "train.checkpoint_every"),
    *("eval.video_episodes", "eval.baselines"),
}


def settings(recipe: Recipe) -> dict[str, Any]:
    """What decides a run's result, as flat ``{"section.field": value}``: all that differs from the defaults."""
    before, now = _flat(asdict(Recipe())), _flat(asdict(recipe))
    changed = {k: v for k, v in now.items() if before[k] != v and k not in _WITHOUT_EFFECT}
    return json.loads(json.dumps(changed))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def read(path: Path) -> dict[str, Any]:
    """The file's content; empty when there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def holds(runs: Runs, seed: int, wanted: dict[str, Any]) -> bool:
    """Whether a run of this seed and these settings is among `runs`."""
    return any(run["train_seed"] == seed and run["settings"] == wanted for run in runs)


def merged(old: Runs, new: Runs, wanted: dict[str, Any]) -> Runs:
    """`new` runs, and those of `old` with the wanted settings and another seed, in the order of seeds."""
    seeds = {run["train_seed"] for run in new}
    kept = [run for run in old if run["settings"] == wanted and run["train_seed"] not in seeds]
    return sorted([*kept, *new], key=lambda run: run["train_seed"])


def base_measures(path: Path, recipe: Recipe) -> dict[str, Measure]:
    """Base and controls on the evaluation seeds, measured once and kept at `path` for all training seeds."""
    if not path.exists():
        base = recipe.base.load()
        episodes = ranges.block(ranges.EVALUATION, recipe.eval.episodes)
        with VectorTask(recipe.task, base.spec.executed_steps) as task:
            found = measure_base(base, task, recipe.noise.over(base.spec.noise), episodes, controls=True)
        path.write_text(json.dumps({name: [asdict(e) for e in m.episodes] for name, m in found.items()}))
    raw = json.loads(path.read_text())
    return {name: Measure(tuple(Episode(**e) for e in episodes)) for name, episodes in raw.items()}


def recorded(recipe: str, noise: str, episodes: int, out: Path) -> None:
    """Record offline episodes of a shipped recipe's base, unless they are there."""
    options = ["--noise", noise, "--episodes", str(episodes), "--out", str(out)]
    if not out.exists() and (status := command(["record", recipe, *options])):
        raise SystemExit(status)
