"""Make the robosuite bases that ship: a scripted operator's imperfect demonstrations, a diffusion policy, a card.

    python benchmarks/make_robosuite_bases.py [--tasks lift] [--data FOLDER]

Ten minutes on one core for Lift or Can, forty for can-hard or Square. Demonstrations are kept in FOLDER, and made
again only where they are missing. They are no people's, and not the Robomimic data set: in half of the episodes, or
six of ten, the operator sees the object 4.5 cm from where it is, and mostly fails; failures are kept.
Writes dsrl_vla/data/bases/<task>/.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from diffusion_bases import clone, figures, write
from dsrl_vla import seeds as ranges
from dsrl_vla.observation import STATE
from dsrl_vla.recipe import load_recipe
from dsrl_vla.tasks import make_task
from tqdm import tqdm


@dataclass(frozen=True)
class Demos:
    """How a task's demonstrations are made."""

    env: str
    max_episode_steps: int
    """Where an episode is cut off."""
    episodes: int = 300
    offset: float = 0.045
    """How far a mis-calibrated operator sees the object from where it is, in metres along x."""
    offset_share: float = 0.5
    shake: float = 0.1
    """Standard deviation of the operator's hand, in action units."""


TASKS = {
    "lift": Demos("Lift", 60),
    "can": Demos("Can", 150),
    "can-hard": Demos("Can", 150, episodes=900, offset_share=0.6),
    "square": Demos("Square", 200),
}
CARD = """---
library_name: dsrl-vla
pipeline_tag: robotics
license: apache-2.0
tags: [diffusion-policy, robosuite, dsrl-vla]
---
# {name}: a diffusion policy for robosuite's {env}

An MLP with {weights:,} weights that reads the low-dimensional state and denoises a chunk of 4 actions, executed open
loop, in 5 steps of DDIM (eta 0; a schedule of 100 steps, cosine). Made by `benchmarks/make_robosuite_bases.py`.

It is a clone of {episodes_cloned} demonstrations by a scripted operator ({clone_steps:,} updates), and has nothing to
do with the Robomimic data set or its people: in {offset_share:.0%} of the episodes the operator sees the object
{offset:g} m from where it is, along x, and carries on when it has closed its gripper on air. Of the demonstrations
{demos_success:.0%} succeed; failures are kept.

Success over {episodes} episodes of at most {limit} steps (seeds {first} to {last}, never trained on) with Wilson 95 %
intervals; the controls are those of every report, layout {layout}, bound {bound:g}:

| noise | success | 95 % interval |
|---|---|---|
{rows}

`dsrl_vla.load_base("diffusion:{name}")` loads it. It is a test bed.
"""


@dataclass(frozen=True)
class Args:
    """What to make."""

    tasks: tuple[str, ...] = tuple(TASKS)
    data: Path = Path("runs/robosuite-data")


def demonstrate(env: Any, seed: int, demos: Demos) -> tuple[np.ndarray, np.ndarray, bool]:
    """One episode: states (T, S), actions (T, A), and whether it succeeded."""
    rng = np.random.default_rng(seed)
    shift = demos.offset if rng.random() < demos.offset_share else 0.0
    env.begin(seed)
    expert, states, actions, success = env.expert(), [], [], False
    while not success and len(actions) < demos.max_episode_steps:
        meant = expert(shift)
        action = meant + demos.shake * rng.standard_normal(len(meant))
        action[-1] = meant[-1]  # nobody's hand shakes a gripper open
        actions.append(action.clip(-1, 1).astype(np.float32))
        states.append(env.observe()[STATE])
        success = env.advance(actions[-1])[1]
    return np.stack(states), np.stack(actions), success


def demonstrations(demos: Demos, path: Path) -> dict[str, np.ndarray]:
    """All episodes: their lengths, states and actions one after the other, and which succeeded."""
    if not path.exists():
        env = make_task(f"robosuite:{demos.env}", max_episode_steps=demos.max_episode_steps)
        seeds = ranges.block(ranges.DEMONSTRATIONS, demos.episodes)
        episodes = [demonstrate(env, seed, demos) for seed in tqdm(seeds, desc=demos.env, disable=None)]
        env.close()
        states, actions, success = zip(*episodes, strict=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        joined = {"states": np.concatenate(states), "actions": np.concatenate(actions)}
        np.savez(path, lengths=[len(each) for each in states], success=np.array(success), **joined)
    with np.load(path, allow_pickle=False) as data:
        return dict(data)


def make(name: str, data: dict[str, np.ndarray]) -> dict[str, Any]:
    """Clone, save and measure; return what ``eval.json`` holds."""
    base, recipe = clone(name, data), load_recipe(f"robosuite-{name}")
    return (
        asdict(TASKS[name])
        | {
            "episodes_cloned": len(data["lengths"]),
            "demos_success": float(data["success"].mean()),
            "limit": recipe.task.max_episode_steps,
            "layout": recipe.noise.layout,
            "bound": recipe.noise.bound,
        }
        | figures(base, recipe.task, recipe.noise.over)
    )


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    for name in args.tasks:
        write(name, make(name, demonstrations(TASKS[name], args.data / f"{name}.npz")), CARD, steps=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
