"""Updates per second on one GPU: ours against Stable-Baselines3's SAC, and the transformer against an MLP of its size.

    python benchmarks/bench_gpu_learner.py [--rounds 15]

As `bench_learner.py`, in wall-clock time, each side waiting for the GPU at the end of its turn. An update of ours is
one recorded CUDA graph; `unrecorded` is the same launched from Python, `compiled` a graph of networks that
torch.compile has fused, which takes it a minute. Writes results/gpu_learner.json.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import tyro
from bench_learner import AHEAD, SIZES, Size, equal_mlp, ours, theirs
from common import Goal, finish, interval, on_the_gpu
from dsrl_vla.latent_sac import LatentSAC
from dsrl_vla.networks import NetworkConfig
from dsrl_vla.recipe import load_recipe


@dataclass(frozen=True)
class Args:
    """What to measure."""

    rounds: int = 15


def syncs_per_update(update: Callable[[], object]) -> float:
    """How often a call of AHEAD updates makes Python wait for the GPU, as torch itself reports it, per update."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        update()
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(each.message) for each in told) / AHEAD


def unrecorded(learner: LatentSAC) -> None:
    learner._recorded = None


def compiled(learner: LatentSAC) -> None:
    for module in (learner.head, learner.critic, learner.target):
        module.network.compile()  # type: ignore[operator, union-attr]


def against_sb3(rounds: int) -> tuple[dict[str, Any], list[Goal]]:
    """Both sizes of ensemble, with LayerNorms on both sides and without."""
    found: dict[str, Any] = {}
    goals = []
    for name, size in SIZES.items():
        mlp = NetworkConfig("mlp", width=size.width, layers=size.hidden - 1)
        launched, by_python = ours(size, mlp, device="cuda")
        unrecorded(launched)
        sides = {
            "ours, plain": ours(size, replace(mlp, norm=False), device="cuda")[1],
            "sb3, plain": theirs(size, False, "cuda"),
            "ours, normed": ours(size, mlp, device="cuda")[1],
            "sb3, normed": theirs(size, True, "cuda"),
            "ours, normed, unrecorded": by_python,
        }
        times = on_the_gpu(sides, rounds, 5)
        ratios = {kind: interval(times[f"sb3, {kind}"] / times[f"ours, {kind}"]) for kind in ("plain", "normed")}
        waits = {side: syncs_per_update(update) for side, update in sides.items()}
        rates = {side: interval(AHEAD / value) for side, value in times.items()}
        found[name] = {"size": vars(size), "updates_per_second": rates, "ratio": ratios, "syncs_per_update": waits}
        words = {"plain": "the same network", "normed": "the same network with LayerNorms"}
        for kind in ratios:
            goals.append(Goal(f"GPU: updates/s over SB3's SAC, {words[kind]}, {name}", ratios[kind]["median"], 4.0))
            goals.append(
                Goal(f"GPU: host syncs per update, {words[kind]}, {name}", waits[f"ours, {kind}"], 0, False, "")
            )
    return found, goals


def shipped(rounds: int) -> dict[str, Any]:
    """The shipped recipes' transformer, an MLP of as many weights, and both on one thread of this machine's CPU."""
    recipe = load_recipe("drawer-open")
    size, feature = Size(21, 4, 0, 0, recipe.critic.members, recipe.sac.batch), 96
    networks = {"transformer": recipe.head.network, "mlp": equal_mlp(size, feature, recipe.head.network)}
    sides = {}
    for name, network in networks.items():
        sides[f"{name}, gpu"] = ours(size, network, feature, "cuda")[1]
        sides[f"{name}, cpu"] = ours(size, network, feature)[1]
        learner, sides[f"{name}, gpu, compiled"] = ours(size, network, feature, "cuda")
        compiled(learner)
    times = on_the_gpu(sides, rounds, 2)
    return {"ms_per_update": {name: interval(1000 * value / AHEAD) for name, value in times.items()}}


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    found, goals = against_sb3(args.rounds)
    gpu = torch.cuda.get_device_name()
    return finish("gpu_learner", goals, gpu=gpu, rounds=args.rounds, against_sb3=found, shipped=shipped(args.rounds))


if __name__ == "__main__":
    sys.exit(main())
