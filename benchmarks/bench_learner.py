"""Updates per second: ours against Stable-Baselines3's SAC, and the steering transformer against an MLP of its size.

    python benchmarks/bench_learner.py [--rounds 15]

Equal networks, batch and ensemble; each update draws its own minibatch from its own replay. SB3 runs its own `train`.
Ours is the MLP kind. By default its layers have a LayerNorm, which SB3's lack: both sides are measured without, as SB3
comes, and with, put into SB3's networks. Writes results/learner.json.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from common import Goal, finish, interval, side_by_side
from dsrl_vla.critic import CriticConfig
from dsrl_vla.head import HeadConfig, SteeringHead
from dsrl_vla.latent_sac import LatentSAC, SACConfig
from dsrl_vla.networks import NetworkConfig
from dsrl_vla.noise import NoiseLayout, NoiseSpace
from dsrl_vla.recipe import load_recipe
from dsrl_vla.replay import Replay
from torch import nn

STORED, AHEAD = 5000, 10


@dataclass(frozen=True)
class Args:
    """What to measure."""

    rounds: int = 15
    name: str = "learner"
    """Of the file in results/: another machine's stands beside it under another name."""


@dataclass(frozen=True)
class Size:
    """Of a learner: hidden layers of one width, an ensemble, a minibatch."""

    observed: int
    action: int
    width: int
    hidden: int
    critics: int
    batch: int


SIZES = {"2 critics": Size(64, 8, 256, 2, 2, 256), "10 critics": Size(64, 8, 128, 3, 10, 256)}
NETWORKS = {"plain": "the same network", "normed": "the same network with LayerNorms"}


class Still(gym.Env):
    """Spaces, for SB3 to build its networks by."""

    def __init__(self, size: Size):
        self.observation_space = gym.spaces.Box(-1, 1, (size.observed,), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, (size.action,), np.float32)


def put_norms(model: Any) -> None:
    """A LayerNorm before every ReLU of SB3's networks, as ours have them, and new optimisers."""

    def normed(net: nn.Sequential) -> nn.Sequential:
        layers: list[nn.Module] = []
        for layer in net:
            if isinstance(layer, nn.ReLU):
                layers.append(nn.LayerNorm(layers[-1].out_features, device=model.device))  # type: ignore[arg-type]
            layers.append(layer)
        return nn.Sequential(*layers)

    model.actor.latent_pi = normed(model.actor.latent_pi)
    for critic in (model.critic, model.critic_target):
        critic.q_networks = [normed(net) for net in critic.q_networks]
        for number, net in enumerate(critic.q_networks):
            setattr(critic, f"qf{number}", net)
    for trained in (model.actor, model.critic):
        trained.optimizer = torch.optim.Adam(trained.parameters(), 3e-4)


def theirs(size: Size, norms: bool, device: str = "cpu") -> Callable[[], object]:
    """SB3's SAC on random transitions: AHEAD updates per call."""
    from stable_baselines3 import SAC
    from stable_baselines3.common.logger import Logger

    policy = {"net_arch": [size.width] * size.hidden, "n_critics": size.critics}
    model = SAC("MlpPolicy", Still(size), policy_kwargs=policy, buffer_size=STORED, device=device, seed=0)
    if norms:
        put_norms(model)
    model.set_logger(Logger(folder=None, output_formats=[]))
    rng = np.random.default_rng(0)
    for _ in range(STORED):
        now, then = rng.uniform(-1, 1, (2, 1, size.observed)).astype(np.float32)
        action = rng.uniform(-1, 1, (1, size.action)).astype(np.float32)
        model.replay_buffer.add(now, then, action, rng.random(1), np.zeros(1), [{}])  # type: ignore[union-attr]
    return lambda: model.train(AHEAD, size.batch)


def ours(
    size: Size, network: NetworkConfig, feature: int = 0, device: str = "cpu"
) -> tuple[LatentSAC, Callable[[], object]]:
    """Our SAC on random transitions: AHEAD updates per call."""
    torch.manual_seed(0)
    layout = NoiseLayout(NoiseSpace(1, size.action), "repeat")
    head = SteeringHead(HeadConfig(layout, size.observed, feature, 1, "none", "none:", network=network))
    critic, sac = CriticConfig(network, size.critics), SACConfig(batch=size.batch)
    learner = LatentSAC(head, critic, sac, (-100.0, 100.0), 0, device)
    replay, rng = Replay(STORED, layout.latent_shape), np.random.default_rng(0)
    uniform = lambda *shape: torch.from_numpy(rng.uniform(-1, 1, shape).astype(np.float32))
    numbers = replay.observe({"state": uniform(STORED, size.observed)} | _feature(feature, uniform))
    latents = uniform(STORED - 1, *layout.latent_shape)
    replay.add(numbers[:-1], latents, rng.random(STORED - 1), np.full(STORED - 1, 0.99), numbers[1:])
    learner.fit_normaliser(replay)

    def update() -> None:
        for batch in replay.batches(AHEAD, size.batch, rng, learner.device):
            learner.update(batch)

    return learner, update


def _feature(width: int, uniform: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"feature": uniform(STORED, width)} if width else {}


def weights(learner: LatentSAC) -> int:
    """Trained weights: head and critics."""
    return sum(p.numel() for module in (learner.head, learner.critic) for p in module.parameters())


def equal_mlp(size: Size, feature: int, transformer: NetworkConfig) -> NetworkConfig:
    """The MLP of as many layers whose weights come closest to the transformer's in number."""
    aim = weights(ours(size, transformer, feature)[0])
    widths = [replace(transformer, kind="mlp", width=width) for width in range(64, 320, 8)]
    return min(widths, key=lambda network: abs(weights(ours(size, network, feature)[0]) - aim))


def against_sb3(rounds: int) -> tuple[dict, list[Goal]]:
    """Both sizes of ensemble."""
    found, goals = {}, []
    for (name, size), goal in zip(SIZES.items(), (1.5, 1.6), strict=True):
        mlp = NetworkConfig("mlp", width=size.width, layers=size.hidden - 1)
        sides = {
            "ours, plain": ours(size, replace(mlp, norm=False))[1],
            "sb3, plain": theirs(size, False),
            "ours, normed": ours(size, mlp)[1],
            "sb3, normed": theirs(size, True),
        }
        times = side_by_side(sides, rounds)
        ratios = {kind: interval(times[f"sb3, {kind}"] / times[f"ours, {kind}"]) for kind in NETWORKS}
        ratios["ours normed, sb3 plain"] = interval(times["sb3, plain"] / times["ours, normed"])
        rates = {side: interval(AHEAD / value) for side, value in times.items()}
        found[name] = {"size": vars(size), "updates_per_second": rates, "ratio": ratios}
        for kind, words in NETWORKS.items():
            goals.append(Goal(f"updates/s over SB3's SAC, {words}, {name}", ratios[kind]["median"], goal))
    return found, goals


def against_mlp(rounds: int) -> tuple[dict, list[Goal]]:
    """The shipped recipes' transformer on the nano base's observations."""
    recipe = load_recipe("drawer-open")
    size, feature = Size(21, 4, 0, 0, recipe.critic.members, recipe.sac.batch), 96
    mlp = equal_mlp(size, feature, recipe.head.network)
    learners = {"transformer": ours(size, recipe.head.network, feature), "mlp": ours(size, mlp, feature)}
    times = side_by_side({name: update for name, (_, update) in learners.items()}, rounds)
    ratio = interval(times["transformer"] / times["mlp"])
    found = {
        "weights": {name: weights(learner) for name, (learner, _) in learners.items()},
        "mlp_width": mlp.width,
        "ms_per_update": {name: interval(1000 * value / AHEAD) for name, value in times.items()},
        "ratio": ratio,
    }
    return found, [Goal("transformer's update over an equal MLP's", ratio["median"], 2.0, at_least=False)]


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    sb3, sb3_goals = against_sb3(args.rounds)
    mlp, mlp_goals = against_mlp(args.rounds)
    return finish(args.name, sb3_goals + mlp_goals, rounds=args.rounds, against_sb3=sb3, against_mlp=mlp)


if __name__ == "__main__":
    sys.exit(main())
