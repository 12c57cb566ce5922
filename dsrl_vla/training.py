"""Train a head by a recipe, and leave a run directory behind."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import seeds as seed_ranges
from .errors import bad
from .evaluation import Measure
from .head import SteeringHead
from .plots import draw_run
from .policy import FrozenPolicy
from .probing import probe
from .recipe import Recipe
from .rollout import VectorTask
from .run_dir import disk_errors, write_text
from .trainer import Trainer

log = logging.getLogger(__name__)


@dataclass
class RunResult:
    """What a run leaves in memory; the rest is in its directory."""

    head: SteeringHead
    """The best head, by validation."""
    evaluation: dict[str, Any] | None
    """What ``eval.json`` holds; None when the run was interrupted."""
    out: Path


def train(
    recipe: Recipe,
    out: Path | str,
    *,
    base: FrozenPolicy | None = None,
    resume: bool = False,
    evaluate_after: bool = True,
    known: dict[str, Measure] | None = None,
) -> RunResult:
    """Train a head by a recipe.

    Args:
        out: the run's directory: ``recipe.yaml``, ``metrics.jsonl``, ``checkpoints/``, ``best/`` (the head),
            ``eval.json``, ``curves.png``, ``rollouts.mp4``.
        base: an already loaded base; by default the recipe's.
        resume: go on from the newest checkpoint in `out`.
        known: measures of base and controls on the evaluation seeds, not to be run again.

    Raises:
        DsrlError: `out` holds another run and `resume` is off, or its recipe differs and `resume` is on; the
            base does not fit the task; the disk is full. NotSteerableError: the base fails the probe.
    """
    out = Path(out)
    _prepare(recipe, out, resume)
    torch.set_num_threads(recipe.train.threads)
    base = base or recipe.base.load()
    with contextlib.ExitStack() as stack:
        task = stack.enter_context(VectorTask(recipe.task, base.spec.executed_steps))
        held_out = stack.enter_context(VectorTask(recipe.task, base.spec.executed_steps))
        base.check_task(task.info)
        probe(base, example(task))
        trainer = Trainer(recipe, base, task, held_out, out)
        if resume:
            trainer.resume()
        finished = trainer.run()
        head = trainer.best_head()
        result = None
        if finished and evaluate_after:
            result = trainer.evaluate(head, known)
            draw_run(out, recipe, base, head, trainer.metrics.rows(), result)
    return RunResult(head, result, out)


def example(task: VectorTask) -> dict[str, Any]:
    """One observation of a task, prompt included."""
    observations = task.reset([seed_ranges.PREFLIGHT] * task.config.num_envs)
    return {key: value[0] for key, value in observations.items()}


def _prepare(recipe: Recipe, out: Path, resume: bool) -> None:
    path = out / "recipe.yaml"
    if path.exists() and not resume:
        raise bad(f"{out}", "a new directory", "one that holds a run", "Choose another --out, or go on with --resume.")
    if resume and not path.exists():
        raise bad(f"{out}", "a run to resume", "no recipe.yaml there")
    if resume and path.read_text() != recipe.to_yaml():
        raise bad(f"{path}", "the recipe this run was started with", "another one", "Resume without overrides.")
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        write_text(path, recipe.to_yaml())


def load_run(out: Path | str) -> tuple[Recipe, SteeringHead]:
    """The recipe and the best head of a run.

    Raises:
        DsrlError: `out` is no run, or it has not yet validated a head.
    """
    from .recipe import load_recipe

    out = Path(out)
    if not (out / "recipe.yaml").exists():
        raise bad(str(out), "a run's directory", "one without a recipe.yaml")
    return load_recipe(out / "recipe.yaml"), SteeringHead.from_pretrained(out / "best")
