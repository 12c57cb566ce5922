"""What ends a run: its finalists play again; the paired evaluation, with the baselines that its recipe asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from . import seeds as seed_ranges
from .evaluation import Measure, evaluate, evaluation_episodes, measure
from .head import SteeringHead
from .noise_aliasing import NoiseAliasing
from .noise_search import BestOfK
from .run_dir import write_json

if TYPE_CHECKING:
    from .trainer import Trainer


def settle(trainer: Trainer) -> None:
    """Let the finalists play as many further episodes as they have played, and keep the best of them.

    Nothing must be waiting to be written: a checkpoint of after it would let them play once more when resumed.
    """
    episodes, count = trainer.recipe.train.validation_episodes, len(trainer.finalists.ranked)
    if count < 2:
        return
    total = count * episodes * len(trainer.recipe.task.uris)
    with tqdm(total=total, unit="episode", desc="finalists", disable=None) as bar:
        trainer.finalists.settle(lambda head: trainer.play(head, episodes, episodes, lambda _: bar.update()))


def evaluate_run(trainer: Trainer, head: SteeringHead, known: dict[str, Measure] | None) -> dict[str, Any]:
    """Measure a run's head; write ``eval.json`` and return what it holds."""
    recipe, config = trainer.recipe, trainer.recipe.eval
    total = evaluation_episodes(recipe.task, config.episodes, config.controls, len(known or ()))
    with tqdm(total=total, unit="episode", desc="evaluation", disable=None) as bar:
        tick = lambda _: bar.update()
        result = evaluate(
            trainer.base, head, trainer.held_out, config.episodes, config.controls, on_episode=tick, known=known
        )
    result |= _baselines(trainer, head)
    result |= {
        "recipe": recipe.name,
        "train_seed": recipe.train.seed,
        "env_steps": trainer.collector.env_steps,
        "validation_env_steps": trainer.validation_env_steps,
        "finalists": trainer.finalists.to_json(),
        "updates": trainer.learner.updates,
        "train_seconds": round(trainer.seconds, 1),
        "warnings": trainer.watch.warnings,
        "base_sha256_before": trainer.base_sha256,
        "base_sha256_after": trainer.base.sha256(),
    }
    write_json(trainer.out / "eval.json", result)
    return result


def _baselines(trainer: Trainer, head: SteeringHead) -> dict[str, Any]:
    """``{"baselines": {name: measure}}`` of the noise searches that the recipe asks for."""
    found: dict[str, Any] = {}
    base, held_out, config = trainer.base, trainer.held_out, trainer.recipe.eval
    seeds = seed_ranges.block(seed_ranges.EVALUATION, config.episodes)
    if "ticket" in config.baselines:
        ticket = trainer.ticket()
        measured = measure(base, held_out, ticket.source(head.layout), seeds).to_json()
        found["ticket"] = measured | {"search_env_steps": ticket.env_steps}
    if "best-of-k" in config.baselines and isinstance(trainer.learner, NoiseAliasing):
        critic = trainer.learner.load_action_critic(trainer.out / "best")
        source = BestOfK(base, head, critic)
        found["best-of-k"] = measure(base, held_out, source, seeds).to_json() | {"k": source.k}
    return {"baselines": found} if found else {}
