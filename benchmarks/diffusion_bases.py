"""What the makers of the shipped diffusion bases share: clone, measure, and write eval.json and the card."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from dsrl_vla import load_base
from dsrl_vla import seeds as ranges
from dsrl_vla.adapters.diffusion import DiffusionMLPConfig, clone_diffusion
from dsrl_vla.evaluation import measure_base
from dsrl_vla.measures import shown
from dsrl_vla.noise import NoiseLayout, NoiseSpace
from dsrl_vla.policy import FrozenPolicy
from dsrl_vla.rollout import TaskConfig, VectorTask

BASES = Path(__file__).parents[1] / "dsrl_vla" / "data" / "bases"
CLONE_STEPS, EPISODES = 20_000, 100


def clone(name: str, data: Mapping[str, np.ndarray]) -> FrozenPolicy:
    """The base of this name; where it is not there, cloned on all episodes' `lengths`, `states` and `actions`."""
    folder = BASES / name
    if not (folder / "config.json").exists():
        cuts = np.cumsum(data["lengths"])[:-1]
        episodes = list(zip(np.split(data["states"], cuts), np.split(data["actions"], cuts), strict=True))
        config = DiffusionMLPConfig(data["states"].shape[1], data["actions"].shape[1])
        clone_diffusion(episodes, config, CLONE_STEPS).save_pretrained(folder)
        (folder / "model.safetensors").chmod(0o644)
    return load_base(f"diffusion:{name}")


def figures(base: FrozenPolicy, task: TaskConfig, layout: Callable[[NoiseSpace], NoiseLayout]) -> dict[str, Any]:
    """What every base's ``eval.json`` holds: its measures and the controls', on the evaluation seeds."""
    seeds = ranges.block(ranges.EVALUATION, EPISODES)
    with VectorTask(task, base.spec.executed_steps) as vector:
        found = measure_base(base, vector, layout(base.spec.noise), seeds, controls=True)
    return {
        "clone_steps": CLONE_STEPS,
        "weights": sum(w.numel() for n, w in base.state_dict().items() if not n.startswith(("state_", "action_"))),
        "episodes": EPISODES,
        "seeds": [seeds[0], seeds[-1]],
        "measures": {key: m.to_json() for key, m in found.items()},
    }


def write(name: str, result: dict[str, Any], template: str, steps: bool) -> None:
    """Write ``eval.json``, and `template` filled in as the card; `steps` adds a column of them to its table."""
    (BASES / name / "eval.json").write_text(json.dumps(result, indent=1) + "\n")
    (BASES / name / "README.md").write_text(card(name, result, template, steps))
    print(name, {key: shown(m)[0] for key, m in result["measures"].items()}, flush=True)


def card(name: str, result: dict[str, Any], template: str, steps: bool) -> str:
    """A base's README.md."""
    ends = {key: f" {m['mean_steps']:.0f} |" * steps for key, m in result["measures"].items()}
    rows = "\n".join(f"| {key} | {' | '.join(shown(m))} |{ends[key]}" for key, m in result["measures"].items())
    first, last = result["seeds"]
    return template.format(name=name, rows=rows, first=first, last=last, **result)
