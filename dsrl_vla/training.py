"""Train a head by a recipe, and leave a run directory behind."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import seeds as seed_ranges
from .bases import check_device
from .closing import evaluate_run, settle
from .errors import DsrlError, bad
from .evaluation import Measure, evaluation_episodes, evaluation_seeds
from .finalists import HEADS, LIST
from .head import SteeringHead
from .head_config import CONFIG
from .journal import FOLDER
from .learners import build_learner
from .manifest import MANIFEST
from .plots import draw_run
from .policy import FrozenPolicy
from .probing import probe
from .recipe import AUTO, Recipe, differing, load_recipe
from .resuming import resume as resume_run
from .rollout import VectorTask
from .run_dir import alone, make_folder, write_json, write_text
from .tasks import TaskInfo
from .team import LaunchedTeam, join_team
from .trainer import Trainer

log = logging.getLogger(__name__)
_PROGRESS = ("metrics.jsonl", "checkpoints", "best", HEADS, LIST, FOLDER, "preflight.json", "ticket.json")
"""What a run leaves from its first step on. A directory without is one whose start failed: it may be started anew."""
_HEAD = (CONFIG, MANIFEST)


@dataclass
class RunResult:
    """What a run leaves in memory; the rest is in its directory."""

    head: SteeringHead
    """The best head, by validation."""
    evaluation: dict[str, Any] | None
    """What ``eval.json`` holds; None when the run was interrupted, and in a process that only helped."""
    out: Path
    leads: bool = True
    """Whether this process collected and wrote; the others of `accelerate launch` only helped."""
    interrupted: bool = False
    """Whether the run was stopped by a signal before its end; its state is saved."""


def train(
    recipe: Recipe | Path | str,
    out: Path | str,
    *,
    base: FrozenPolicy | None = None,
    resume: bool = False,
    evaluate_after: bool = True,
    known: dict[str, Measure] | None = None,
) -> RunResult:
    """Train a head by a recipe.

    Args:
        recipe: one that was loaded, or what `load_recipe` takes: a shipped one's name, a YAML file.
        out: the run's directory: ``recipe.yaml``, ``metrics.jsonl``, ``checkpoints/``, ``best/`` (the head),
            ``eval.json``, ``curves.png``, ``rollouts.mp4``.
        base: an already loaded base; by default the recipe's.
        resume: go on from the newest checkpoint in `out`.
        known: measures of base and controls on the evaluation seeds, not to be run again.

    Raises:
        DsrlError: `out` holds another run and `resume` is off, or its recipe differs and `resume` is on; the
            base does not fit the task; the disk is still full at the end. TooManyFaultsError:
            ``train.max_faults`` losses, rewards or observations were not finite.
        NotSteerableError: the base fails the probe. WorkerLostError: too many rollout workers died; the state is
            saved.
    """
    out, team = Path(out), join_team()
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    torch.set_num_threads(recipe.train.threads)
    if team.size > 1 and recipe.train.device != "cpu":
        raise bad("train.device", f"cpu for {team.size} processes, which share updates", recipe.train.device)
    check_device("train.device", recipe.train.device)
    if isinstance(team, LaunchedTeam) and not team.leads:
        return RunResult(_follow(team, recipe), None, out, leads=False)
    if resume and not (out / "recipe.yaml").exists():
        raise bad(f"{out}", "a run to resume", "no recipe.yaml there")
    make_folder(out)
    if base is not None and base.spec.uri != recipe.base.uri:
        words = "%s: the base is '%s', but other commands will load the recipe's, '%s', for this run. Set base.uri."
        log.warning(words, out, base.spec.uri, recipe.base.uri)
    with contextlib.ExitStack() as stack:
        stack.enter_context(alone(out))
        _prepare(recipe, out, resume)
        base = base or recipe.base.load()
        held_out = stack.enter_context(VectorTask(recipe.task, base.spec.executed_steps))
        # Workers have environments of their own; what is asked of the task here, the other one can answer.
        inline = recipe.rollout.backend == "inline"
        task = stack.enter_context(VectorTask(recipe.task, base.spec.executed_steps)) if inline else held_out
        for info in task.infos:
            _check_task(recipe, base, info)
        if evaluate_after:
            evaluation_seeds(task, recipe.eval.episodes, known=known)  # refused before the work, and not after it
        if task.info.live and evaluate_after:
            total = evaluation_episodes(recipe.task, recipe.eval.episodes, recipe.eval.controls, len(known or ()))
            words = "every validation is %d episodes on the robot, and the evaluation that ends the run %d"
            log.warning(words, recipe.train.validation_episodes, total)
        _check_warm_up(recipe, base)
        probe(base, example(task))
        recipe = resolve_layout(recipe, base, task, out)
        trainer = Trainer(recipe, base, task, held_out, out, team)
        stack.callback(trainer.collector.close)
        if resume:
            resume_run(trainer)
        finished = trainer.run()
        if finished:
            _check_learnt(trainer)
        trainer.check_saved()
        if finished:
            settle(trainer)
            trainer.check_saved()
        head = trainer.best_head()
        result = None
        if finished and evaluate_after:
            result = evaluate_run(trainer, head, known)
            draw_run(out, recipe, base, head, trainer.metrics.rows(), result, held_out.info.live)
    return RunResult(head, result, out, interrupted=not finished)


def _check_task(recipe: Recipe, base: FrozenPolicy, info: TaskInfo) -> None:
    """Refuse a task that the base, the head or the recipe does not fit."""
    base.check_task(info)
    if recipe.sac.imitate and not (recipe.offline.source or info.live):
        raise bad("sac.imitate", "offline.source, or a robot whose operator takes over", "nobody to imitate")
    if absent := [name for name in recipe.head.cameras if name not in info.cameras]:
        there = ", ".join(info.cameras) or "none"
        raise bad("head.cameras", f"cameras of the task '{info.uri}' ({there})", f"'{absent[0]}'")
    if recipe.train.stop_at is not None and info.measure != "success":
        raise bad("train.stop_at", f"none for {info.uri}, where nothing is a success", recipe.train.stop_at)


def _check_warm_up(recipe: Recipe, base: FrozenPolicy) -> None:
    """Say beforehand that a run may end without having learnt."""
    total, steps, (needed, by) = recipe.train.env_steps, base.spec.executed_steps, recipe.warm_up
    if not recipe.offline.updates and total <= needed * steps:
        words = "train.env_steps %d may not do for the %d decisions of %s, of up to %d steps each"
        log.warning(words, total, needed, by, steps)


def _check_learnt(trainer: Trainer) -> None:
    """Refuse to call a head trained that never was."""
    if trainer.learner.updates:
        return
    collector, (needed, by) = trainer.collector, trainer.recipe.warm_up
    each = (collector.env_steps - trainer.searched) / max(1, collector.decisions)
    least = trainer.searched + math.ceil(needed * each)
    wanted = f"steps for more than the {needed} decisions of {by}"
    got = f"{collector.decisions} decisions: nothing has been learnt"
    raise bad(f"train.env_steps {trainer.recipe.train.env_steps}", wanted, got, f"About {least} steps make so many.")


def _follow(team: LaunchedTeam, recipe: Recipe) -> SteeringHead:
    """Take part in the first process's updates; return the averaged head."""
    build = lambda config, bounds: build_learner(
        recipe.algorithm, None, SteeringHead(config), recipe.critic, recipe.sac, recipe.na, bounds, recipe.train.seed
    )
    return team.follow(build)


def resolve_layout(recipe: Recipe, base: FrozenPolicy, task: VectorTask, out: Path) -> Recipe:
    """A recipe whose layout is ``auto`` with the layout and bound that preflight recommends.

    What preflight measured is written to ``preflight.json``, and read from there when a run is resumed.
    """
    if recipe.noise.layout != AUTO:
        return recipe
    from .steerability import PreflightConfig, preflight

    path, config = out / "preflight.json", PreflightConfig(columns=recipe.noise.columns)
    if not path.exists():
        total = config.total_episodes(base) * len(task.config.uris)
        with tqdm(total=total, unit="episode", desc="preflight", disable=None) as bar:
            write_json(path, preflight(base, task, config, lambda *_: bar.update()))
    advice = json.loads(path.read_text())["recommendation"]
    tell = log.info if advice["worth_steering"] else log.warning
    tell("layout auto: %s, bound %g. %s", advice["layout"], advice["bound"], advice["words"])
    return replace(recipe, noise=replace(recipe.noise, layout=advice["layout"], bound=advice["bound"]))


def example(task: VectorTask) -> dict[str, Any]:
    """One observation of a task, prompt included."""
    observations = task.reset([seed_ranges.PREFLIGHT] * task.config.num_envs)
    return {key: value[0] for key, value in observations.items()}


def _prepare(recipe: Recipe, out: Path, resume: bool) -> None:
    path = out / "recipe.yaml"
    if (out / "best").exists() and not (out / "metrics.jsonl").exists():
        raise bad(
            f"{out}", "a new directory, or a run's", "one that a search left its ticket in", "Choose another --out."
        )
    there = [name for name in _PROGRESS if (out / name).exists()]
    if there and not resume:
        fix = "Choose another --out" + (", or go on with --resume." if path.exists() else ".")
        got = "one that holds a run" if path.exists() else f"one that holds a {there[0]}"
        raise bad(f"{out}", "a new directory", got, fix)
    if any((out / name).exists() for name in _HEAD):
        raise bad(
            f"{out}", "a new directory", "one that holds a head, which a run would spoil", "Choose another --out."
        )
    if path.exists() and not resume and not _resolved(path):
        raise bad(f"{out}", "a new directory", f"one with a recipe of your own, {path}", "Choose another --out.")
    if resume and (started := load_recipe(path)) != recipe:
        got = f"another one, which differs in {', '.join(differing(started, recipe)) or 'its name'}"
        raise bad(f"{path}", "the recipe this run was started with", got, "Give the same options again, or none.")
    write_text(path, recipe.to_yaml())


def _resolved(path: Path) -> bool:
    """Whether a recipe is one that a run has written: nothing is lost when the next one writes it anew."""
    try:
        return path.read_text() == load_recipe(path).to_yaml()
    except DsrlError:
        return False


def load_run(out: Path | str) -> tuple[Recipe, SteeringHead]:
    """The recipe and the best head of a run.

    Raises:
        DsrlError: `out` is no run, or it has not yet validated a head.
    """
    out = Path(out)
    if not (out / "recipe.yaml").exists():
        raise bad(str(out), "a run's directory", "one without a recipe.yaml")
    if not (out / "best").is_dir():
        heads = "It is a head's folder, which serve, drive, eval and inspect take; a run's has recipe.yaml and best/."
        fix = heads if (out / CONFIG).exists() else ""
        raise bad(str(out), "the directory of a run that has validated a head", "one without best/", fix)
    return load_recipe(out / "recipe.yaml"), SteeringHead.from_pretrained(out / "best")
