"""Mediocre bases for robosuite: demonstrations by a mis-calibrated scripted operator, and a flow MLP cloned on them.

    python benchmarks/robosuite_base.py lift            # -> dsrl_vla/data/bases/robosuite-lift
    python benchmarks/robosuite_base.py can
    python benchmarks/robosuite_base.py lift --tryout      # measure on preflight's seeds, write nothing

In a share of the episodes the operator sees the object a few centimetres beside its place, closes the gripper on air
and carries on; these failures are kept, and the clone has two modes. The data are synthetic: they are not Robomimic's, and
the base is not the paper's. The settings below were chosen on preflight's seeds; the card's figures are of the
evaluation's.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Making:
    """How a base is made."""

    task: str
    max_episode_steps: int
    """Where demonstrations and the base's episodes are cut off."""
    episodes: int = 60
    offset: float = 0.045
    """Metres along x by which a mis-calibrated operator sees the object beside its place."""
    offset_share: float = 0.6
    """Share of episodes with a mis-calibrated operator."""
    action_noise: float = 0.2
    """Deviation of the operator's hand in action units; a quarter of it in rotations, none in the gripper."""
    chunk: int = 4
    width: int = 128
    layers: int = 3
    sampler_steps: int = 8
    clone_steps: int = 3000
    seed: int = 0


MAKINGS = {
    "lift": Making("robosuite:Lift", 60),
    "can": Making("robosuite:Can", 140, episodes=80),
}


@dataclass(frozen=True)
class Args:
    """Which base."""

    name: tyro.conf.Positional[Literal["lift", "can"]]
    tryout: bool = False
    """Measure on preflight's seeds and write nothing."""
    change: str = "{}"
    """JSON: fields of the making to try instead."""


def demonstrate(env: Any, seed: int, making: Making) -> tuple[np.ndarray, np.ndarray, bool]:
    """One demonstration: states (T, S), actions (T, A), and whether it succeeded."""
    rng = np.random.default_rng(seed)
    shift = making.offset if rng.random() < making.offset_share else 0.0
    env.begin(seed)
    expert, states, actions, success, after = env.expert(), [], [], False, making.chunk
    scale = making.action_noise * np.array([1, 1, 1, 0.25, 0.25, 0.25, 0])
    for _ in range(making.max_episode_steps):
        action = (expert(shift) + scale * rng.standard_normal(7)).clip(-1, 1).astype(np.float32)
        states.append(env.observe()["observation.state"])
        actions.append(action)
        success |= env.advance(action)[1]
        after -= success
        if not after:
            break
    return np.stack(states), np.stack(actions), success


def make_base(making: Making) -> tuple[Any, dict[str, Any]]:
    """Demonstrate and clone; return the base and what is to be said of the demonstrations."""
    import torch
    from dsrl_vla import make_task, seeds
    from dsrl_vla.adapters.flow_mlp import FlowMLP, FlowMLPConfig, clone_flow_mlp

    torch.set_num_threads(1)
    env = make_task(making.task, max_episode_steps=making.max_episode_steps)
    numbers = seeds.block(seeds.DEMONSTRATIONS, making.episodes)
    found = [demonstrate(env, seed, making) for seed in numbers]
    config = FlowMLPConfig(
        env.info.state_dim, env.info.action_dim, making.chunk, making.width, making.layers, making.sampler_steps
    )
    episodes = [(states, actions) for states, actions, _ in found]
    base = FlowMLP(clone_flow_mlp(episodes, config, steps=making.clone_steps, seed=making.seed))
    facts = {"success": float(np.mean([won for *_, won in found])), "steps": int(sum(len(s) for s, *_ in found))}
    return base, facts


def measured(base: Any, making: Making, first: int, episodes: int = 100) -> dict[str, Any]:
    """The base, zero noise and noise repeated over the chunk, on seeds from `first` on."""
    from dsrl_vla import seeds
    from dsrl_vla.evaluation import measure
    from dsrl_vla.noise import NoiseLayout
    from dsrl_vla.rollout import TaskConfig, VectorTask
    from dsrl_vla.sources import LayoutNoise, PriorNoise, ZeroNoise

    space = base.spec.noise
    sources = {"base": PriorNoise(space), "zero": ZeroNoise(space)}
    sources |= {f"{name} at random": LayoutNoise(NoiseLayout(space, name, 1.5)) for name in ("repeat", "chunk")}
    with VectorTask(TaskConfig(making.task, making.max_episode_steps, 10), making.chunk) as task:
        numbers = seeds.block(first, episodes)
        return {name: measure(base, task, source, numbers).to_json() for name, source in sources.items()}


# ruff: noqa: E501
CARD = """# {name}: a mediocre base for {making.task}

A flow-matching MLP (`flow-mlp:shipped:{name}`, {weights:,} weights) that reads robosuite's low-dimensional state and emits
chunks of {making.chunk} actions. Made by `benchmarks/robosuite_base.py {short}`, from our own scripted demonstrations: it is
neither cloned on Robomimic's data nor the paper's base.

{making.episodes} demonstrations ({facts[steps]:,} steps). In {making.offset_share:.0%} of them the operator is mis-calibrated,
sees the object {making.offset:g} m to the side along x, closes the gripper on air and carries on; failures are kept. The
hand shakes with a deviation of {making.action_noise:g}. {facts[success]:.0%} of the demonstrations succeed. An episode has
{making.max_episode_steps} steps.

Success over 100 episodes that nothing was trained or chosen on, with Wilson 95 % intervals:

| noise | success |
|---|---|
{table}

It is mediocre on purpose and for one reason: its demonstrations are. It is a test bed, not a robot policy.
"""


def write(name: str, base: Any, making: Making, facts: dict[str, Any], results: dict[str, Any]) -> Path:
    """The base, its card, and ``eval.json``."""
    folder = ROOT / "dsrl_vla" / "data" / "bases" / f"robosuite-{name}"
    base.save_pretrained(folder)
    row = "| {} | {success:.2f} [{ci95[0]:.2f}, {ci95[1]:.2f}] |"
    table = "\n".join(row.format(source, **found) for source, found in results.items())
    weights = sum(p.numel() for p in base.model.parameters())
    words = {"making": making, "facts": facts, "table": table, "weights": weights, "short": name}
    (folder / "README.md").write_text(CARD.format(name=folder.name, **words))
    content = {"making": asdict(making), "demonstrations": facts, "results": results}
    (folder / "eval.json").write_text(json.dumps(content, indent=1) + "\n")
    return folder


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    from dsrl_vla import seeds

    making = replace(MAKINGS[args.name], **json.loads(args.change))
    base, facts = make_base(making)
    results = measured(base, making, seeds.PREFLIGHT if args.tryout else seeds.EVALUATION)
    print(json.dumps(facts), {name: found["success"] for name, found in results.items()})
    if not args.tryout:
        print("written:", write(args.name, base, making, facts, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
