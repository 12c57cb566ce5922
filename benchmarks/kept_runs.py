"""Results that grow run by run: what a committed JSON already holds is not run again.

A run is known by its task, variant, training seed and *settings*: what its recipe sets away from the defaults. When a
recipe changes, the runs of the old one no longer count, and are dropped when the file is next written; so are all of a
task's when its base has changed under the same name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from dsrl_vla import seeds as ranges
from dsrl_vla.cli import main as command
from dsrl_vla.episodes import Episode
from dsrl_vla.evaluation import Measure, measure, measure_base, paired_difference
from dsrl_vla.policy import FrozenPolicy
from dsrl_vla.recipe import Recipe, flat, load_recipe
from dsrl_vla.rollout import VectorTask
from dsrl_vla.sources import NoiseSource
from dsrl_vla.training import RunResult, train

Runs = list[dict[str, Any]]
DEFAULTS = Path(__file__).parent / "defaults.json"
Job = tuple[str, str, int]
"""Task, variant and training seed."""
_WITHOUT_EFFECT = {
    *("name", "description", "train.seed", "train.threads", "train.tracker", "train.checkpoint_every"),
    *("eval.video_episodes", "eval.baselines"),
}


def settings(recipe: Recipe) -> dict[str, Any]:
    """What decides a run's result, as flat ``{"section.field": value}``: all that differs from the defaults.

    Those are the defaults as they were when these files began (``defaults.json``), so that one that is changed since
    counts as a setting; of a field that has come since, its own.
    """
    now = json.loads(json.dumps(flat(asdict(recipe))))
    before = json.loads(json.dumps(flat(asdict(Recipe())))) | read(DEFAULTS)
    return {k: v for k, v in now.items() if before.get(k) != v and k not in _WITHOUT_EFFECT}


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


def of_base(entry: dict[str, Any], sha256: str) -> dict[str, Any]:
    """What a file holds of a task, if it is of this base: another one's figures do not belong beside."""
    return entry if entry.get("base_sha256", sha256) == sha256 else {}


def grow(
    out: Path,
    jobs: Iterable[Job],
    wanted: Callable[[str, str, int], dict[str, Any]],
    run: Callable[[str, str, int], tuple[dict[str, Any], dict[str, Any]]],
    recipe: Callable[[str], str],
) -> None:
    """Run every job that `out` does not hold, of the present base and as `wanted`, and write `out` after each.

    Args:
        run: from a job to its run, and to what the file says of the task beside its runs, ``base_sha256`` among it.
        recipe: the shipped recipe of a task, which says its base.
    """
    sha256 = cache(lambda task: load_recipe(recipe(task)).base.load().sha256())
    for task, variant, seed in jobs:
        settings, entry = wanted(task, variant, seed), of_base(read(out).get(task, {}), sha256(task))
        if holds(entry.get("variants", {}).get(variant, []), seed, settings):
            continue
        fresh, beside = run(task, variant, seed)
        fresh = {"settings": settings, "train_seed": seed} | fresh
        found = read(out)  # another process may have written meanwhile
        variants = of_base(found.get(task, {}), beside["base_sha256"]).get("variants", {})
        variants[variant] = merged(variants.get(variant, []), [fresh], settings)
        out.write_text(json.dumps(found | {task: beside | {"variants": variants}}, indent=1) + "\n")
        print(task, variant, seed, fresh["steered"], flush=True)


def trained(recipe: Recipe, out: Path, **options: Any) -> RunResult:
    """Train, or go on where a run was cut off.

    Raises:
        KeyboardInterrupt: it was cut off again: what it has found so far is not a run's.
    """
    result = train(recipe, out, resume=(out / "recipe.yaml").exists(), **options)
    if result.interrupted:
        raise KeyboardInterrupt
    return result


def evaluated(recipe: Recipe, source: NoiseSource, known: dict[str, Measure]) -> tuple[dict[str, Any], Measure]:
    """How a run's best noise does on the evaluation seeds, beside the base there; and its episodes."""
    base = recipe.base.load()
    episodes = ranges.block(ranges.EVALUATION, recipe.eval.episodes)
    with VectorTask(recipe.task, base.spec.executed_steps) as task:
        steered = measure(base, task, source, episodes)
    return {"steered": steered.to_json(), "difference": paired_difference(known["base"], steered)}, steered


def finished(out: Path, recipe: Recipe) -> bool:
    """Whether `out` holds this recipe's run, measured.

    Raises:
        SystemExit: it holds another recipe's.
    """
    started = out / "recipe.yaml"
    if started.exists() and settings(load_recipe(started)) != settings(recipe):
        raise SystemExit(f"{out}: expected a run of the recipe as it is now, got one of another. Move it away.")
    return (out / "eval.json").exists()


def _decisive(recipe: Recipe, base: FrozenPolicy) -> dict[str, Any]:
    """What decides how a base does and what its episodes are."""
    names = ("base.", "task.", "noise.", "eval.episodes")
    own = {key: value for key, value in settings(recipe).items() if key.startswith(names)}
    return own | {"sha256": base.sha256()}


def base_measures(path: Path, recipe: Recipe) -> dict[str, Measure]:
    """Base and controls on the evaluation seeds, measured once and kept at `path` for all training seeds.

    They are measured again when base, task, layout or number of episodes are no longer what they were.
    """
    base, kept = recipe.base.load(), read(path)
    of = _decisive(recipe, base)
    if kept.get("of") != of:
        episodes = ranges.block(ranges.EVALUATION, recipe.eval.episodes)
        with VectorTask(recipe.task, base.spec.executed_steps) as task:
            found = measure_base(base, task, recipe.noise.over(base.spec.noise), episodes, controls=True)
        kept = {"of": of, "measures": {name: [asdict(e) for e in m.episodes] for name, m in found.items()}}
        path.write_text(json.dumps(kept))
    return {name: Measure(tuple(Episode(**e) for e in m)) for name, m in kept["measures"].items()}


def recorded(recipe: str, by: str, episodes: int, out: Path) -> None:
    """Record offline episodes for a shipped recipe, unless they are there, of its base, task and layout.

    Args:
        by: what the base's noise is, as `record --noise` takes it; or who demonstrates, as `--demonstrator` does.
    """
    shipped, told = load_recipe(recipe), out.with_suffix(".of.json")
    of = _decisive(shipped, shipped.base.load()) | {"noise": by, "episodes": episodes}
    if out.exists() and read(told) == of:
        return
    out.unlink(missing_ok=True)
    how = "--demonstrator" if by in ("expert", "operator") else "--noise"
    if status := command(["record", recipe, how, by, "--episodes", str(episodes), "--out", str(out)]):
        raise SystemExit(status)
    told.write_text(json.dumps(of) + "\n")
