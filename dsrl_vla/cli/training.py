"""``train`` and ``pretrain``."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from .options import parse, read_recipe

if TYPE_CHECKING:
    from ..recipe import Recipe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainArgs:
    """Train a steering head by a recipe, and evaluate it. Recipe fields are options too; see --help-recipe."""

    recipe: tyro.conf.Positional[str]
    """Name of a shipped recipe (`dsrl-vla recipes`) or a YAML file."""
    out: Path | None = None
    """Run directory; by default runs/<recipe>."""
    resume: bool = False
    """Go on from the newest checkpoint in the run directory."""
    help_recipe: bool = False
    """Show every field of the recipe with its value, and stop: dsrl-vla train demo --help-recipe"""


@dataclass(frozen=True)
class PretrainArgs:
    """Clone a nano base on tasks that come with an expert, and measure it."""

    recipe: tyro.conf.Positional[str]
    """Name of a shipped pretraining recipe or a YAML file."""
    out: Path
    """Folder for the base, in Hub format; use it as nano:<folder>."""


def as_started(recipe: Recipe, out: Path) -> Recipe:
    """The recipe a run was started with, overrides included; where that is not the one asked for, it is said."""
    from ..recipe import differing

    started: Recipe = read_recipe(str(out / "recipe.yaml"), [])
    fields = differing(recipe, started)
    if fields:
        told = ", ".join(fields)
        log.warning("%s goes on with the recipe it was started with, which differs from this one in %s.", out, told)
    return started


def run_train(argv: list[str]) -> int:
    """Train a steering head by a recipe, and evaluate it."""
    args, rest = parse(TrainArgs, argv, "train")
    recipe = read_recipe(args.recipe, rest)
    out = args.out or Path("runs") / recipe.name
    if args.resume and not rest and (out / "recipe.yaml").exists():
        recipe = as_started(recipe, out)
    if args.help_recipe:
        print(recipe.to_yaml())
        return 0
    from ..evaluation import summary
    from ..training import train

    result = train(recipe, out, resume=args.resume)
    if not result.leads:
        return 0
    if result.evaluation is None:
        return 130
    print(summary(result.evaluation))
    print(f"run directory: {result.out}")
    return 0


def run_pretrain(argv: list[str]) -> int:
    """Clone a nano base on tasks that come with an expert, and measure it."""
    args = tyro.cli(PretrainArgs, prog="dsrl-vla pretrain", args=argv)
    from ..pretraining import load_pretrain_recipe, pretrain

    pretrain(load_pretrain_recipe(args.recipe), args.out)
    print(f"base written; use it as nano:{args.out}")
    return 0
