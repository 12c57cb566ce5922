"""Make the Gymnasium bases that ship: a half-trained expert, its rollouts, a diffusion policy cloned on them, a card.

    python benchmarks/make_gym_bases.py [--tasks hopper walker2d halfcheetah] [--data FOLDER]

About four minutes each for Hopper and Walker2d and twenty for HalfCheetah, on one core. Rollouts are kept in FOLDER,
and made again only where they are missing. Writes dsrl_vla/data/bases/<task>/.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gym_experts
import numpy as np
import torch
import tyro
from diffusion_bases import clone, figures, write
from dsrl_vla.noise import NoiseLayout
from dsrl_vla.rollout import TaskConfig

DATA_STEPS, BOUND = 200_000, 1.5
CARD = """---
library_name: dsrl-vla
pipeline_tag: robotics
license: apache-2.0
tags: [diffusion-policy, gymnasium, dsrl-vla]
---
# {name}: a diffusion policy for {env}

An MLP with {weights:,} weights that reads the state and denoises a chunk of 4 actions, executed open loop, in 5 steps
of DDIM (eta 0; a schedule of 100 steps, cosine). Made by `benchmarks/make_gym_bases.py`.

It is a clone of a half-trained expert, and it is not D4RL's "medium" policy but one in its manner: {algorithm} of
Stable-Baselines3, one seed, stopped after {expert_steps:,} environment steps, when its stochastic policy earned about
{stop_at:g}; then {data_steps:,} steps of that stochastic policy (return {data_return:.0f}), cloned for {clone_steps:,}
updates.

Return over {episodes} episodes (seeds {first} to {last}, never trained on) with bootstrap 95 % intervals; the controls
are those of every report, bound {bound:g}:

| noise | return | 95 % interval | steps of an episode |
|---|---|---|---|
{rows}

`dsrl_vla.load_base("diffusion:{name}")` loads it. It is a test bed.
"""


@dataclass(frozen=True)
class Args:
    """What to make."""

    tasks: tuple[str, ...] = tuple(gym_experts.EXPERTS)
    data: Path = Path("runs/gym-data")


def rollouts(name: str, path: Path) -> dict[str, np.ndarray]:
    """The expert's episodes: lengths, states, actions, returns, and the steps that it was trained for."""
    if not path.exists():
        policy, steps = gym_experts.train(name)
        states, actions, returns = zip(*gym_experts.roll_out(name, policy, DATA_STEPS), strict=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        lengths = [len(episode) for episode in states]
        joined = {"states": np.concatenate(states), "actions": np.concatenate(actions)}
        np.savez(path, lengths=lengths, returns=np.array(returns), steps=steps, **joined)
    with np.load(path, allow_pickle=False) as data:
        return dict(data)


def make(name: str, data: dict[str, np.ndarray]) -> dict[str, Any]:
    """Clone, save and measure; return what ``eval.json`` holds."""
    base, expert = clone(name, data), gym_experts.EXPERTS[name]
    task = TaskConfig(f"gymnasium:{expert.env}", 1000, 10)
    return {
        "env": expert.env,
        "algorithm": expert.algorithm.__name__,
        "stop_at": expert.stop_at,
        "expert_steps": int(data["steps"]),
        "data_steps": int(data["lengths"].sum()),
        "data_return": float(data["returns"].mean()),
        "bound": BOUND,
    } | figures(base, task, lambda space: NoiseLayout(space, "chunk", BOUND))


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    for name in args.tasks:
        write(name, make(name, rollouts(name, args.data / f"{name}.npz")), CARD, steps=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
