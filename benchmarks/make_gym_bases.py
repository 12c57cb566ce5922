"""Make the Gymnasium bases that ship: a half-trained expert, its rollouts, a diffusion policy cloned on them, a card.

    python benchmarks/make_gym_bases.py [--tasks hopper walker2d halfcheetah] [--data FOLDER]

About four minutes each for Hopper and Walker2d and twenty for HalfCheetah, on one core. Rollouts are kept in FOLDER,
and made again only where they are missing. Writes dsrl_vla/data/bases/<task>/.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gym_experts
import numpy as np
import torch
import tyro
from dsrl_vla import load_base
from dsrl_vla import seeds as ranges
from dsrl_vla.adapters.diffusion import DiffusionMLPConfig, clone_diffusion
from dsrl_vla.evaluation import measure_base
from dsrl_vla.noise import NoiseLayout
from dsrl_vla.rollout import TaskConfig, VectorTask

BASES = Path(__file__).parents[1] / "dsrl_vla" / "data" / "bases"
DATA_STEPS, CLONE_STEPS, EPISODES, BOUND = 200_000, 20_000, 100, 1.5
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
    cuts = np.cumsum(data["lengths"])[:-1]
    episodes = list(zip(np.split(data["states"], cuts), np.split(data["actions"], cuts), strict=True))
    config = DiffusionMLPConfig(data["states"].shape[1], data["actions"].shape[1])
    folder, expert = BASES / name, gym_experts.EXPERTS[name]
    if not (folder / "config.json").exists():
        clone_diffusion(episodes, config, CLONE_STEPS).save_pretrained(folder)
        (folder / "model.safetensors").chmod(0o644)
    base = load_base(f"diffusion:{name}")
    seeds = ranges.block(ranges.EVALUATION, EPISODES)
    with VectorTask(TaskConfig(f"gymnasium:{expert.env}", 1000, 10), base.spec.executed_steps) as task:
        found = measure_base(base, task, NoiseLayout(base.spec.noise, "chunk", BOUND), seeds, controls=True)
    result = {
        "env": expert.env,
        "algorithm": expert.algorithm.__name__,
        "stop_at": expert.stop_at,
        "expert_steps": int(data["steps"]),
        "data_steps": int(data["lengths"].sum()),
        "data_return": float(data["returns"].mean()),
        "clone_steps": CLONE_STEPS,
        "weights": sum(w.numel() for n, w in base.state_dict().items() if not n.startswith(("state_", "action_"))),
        "episodes": EPISODES,
        "seeds": [seeds[0], seeds[-1]],
        "bound": BOUND,
        "measures": {key: m.to_json() for key, m in found.items()},
    }
    (folder / "eval.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def card(name: str, result: dict[str, Any]) -> str:
    """Its README.md."""
    rows = "\n".join(
        f"| {key} | {m['return']:.0f} | [{m['ci95'][0]:.0f}, {m['ci95'][1]:.0f}] | {m['mean_steps']:.0f} |"
        for key, m in result["measures"].items()
    )
    first, last = result["seeds"]
    return CARD.format(name=name, rows=rows, first=first, last=last, **result)


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    for name in args.tasks:
        result = make(name, rollouts(name, args.data / f"{name}.npz"))
        (BASES / name / "README.md").write_text(card(name, result))
        print(name, {key: round(m["return"]) for key, m in result["measures"].items()}, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
