"""What ships, and what is known about it: every figure is read from the evaluation that lies beside the artefact."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from .artefact import EVAL, RECIPE
from .hub import SHELF, shipped_heads
from .measures import shown
from .recipe import Recipe, load_recipe
from .recipes import shipped


@dataclass(frozen=True)
class Entry:
    """One shipped recipe."""

    name: str
    description: str
    status: str
    """measured: what came of this very recipe ships with its evaluation; no head ships: nothing of it
    does (for what was run, see the README); by reading: it says of itself that nobody has run it."""
    figures: str = ""
    artefact: str = ""
    """What it made: ``shipped:<name>``, or ``nano:``."""


def shelf() -> list[Entry]:
    """All shipped recipes, by name."""
    heads = {name: (folder, _anonymous(load_recipe(folder / RECIPE))) for name, folder in shipped_heads().items()}
    base = Path(str(resources.files("dsrl_vla.nano").joinpath("base")))
    pretrained = yaml.safe_load((base / "pretrain.yaml").read_text())["name"]
    entries = []
    for name, path in shipped().items():
        raw: dict[str, Any] = yaml.safe_load(path.read_text()) or {}
        told = raw.get("description", "")
        entry = Entry(name, told, "by reading" if "unverified" in told.lower() else "no head ships")
        if name == pretrained:
            entry = replace(entry, status="measured", figures=_base_figures(base / EVAL), artefact="nano:")
        elif "demos" not in raw:
            wanted = _anonymous(load_recipe(name))
            made = next((head for head, (_, recipe) in heads.items() if recipe == wanted), "")
            if made:
                figures = _head_figures(heads[made][0] / EVAL)
                entry = replace(entry, status="measured", figures=figures, artefact=SHELF + made)
        entries.append(entry)
    return entries


def _anonymous(recipe: Recipe) -> Recipe:
    """A recipe without its name, its seed, and what changes no figure."""
    train = replace(recipe.train, seed=0, threads=1, tracker="none", checkpoint_every=1)
    return replace(recipe, name="", description="", train=train, eval=replace(recipe.eval, video_episodes=0))


def _head_figures(path: Path) -> str:
    result = json.loads(path.read_text())
    base, steered = result["base"], result["steered"]
    return (
        f"base {shown(base)[0]}, steered {' '.join(shown(steered))} "
        f"of {result['episodes']} episodes, training seed {result['train_seed']}"
    )


def _base_figures(path: Path) -> str:
    result = json.loads(path.read_text())
    found = {uri.partition(":")[2] or uri: cells["base"]["success"] for uri, cells in result["tasks"].items()}
    return ", ".join(f"{name} {success:.2f}" for name, success in found.items()) + f" of {result['episodes']} episodes"
