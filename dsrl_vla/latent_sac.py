"""DSRL-SAC (arXiv 2506.15799): soft actor-critic whose action is the latent of a frozen sampler's noise.

One transition is one executed chunk: reward R = sum_i gamma^i r_i over the k steps really executed, and the
bootstrap is discounted by gamma^k. Timeouts bootstrap (unless `SACConfig.timeouts` is terminal); terminations do
not. Entropy is per dimension of the [-1, 1] box, so its target depends neither on the noise bound nor on the layout's
size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from .critic import CriticConfig, CriticEnsemble
from .draws import Source
from .errors import at_least, bad
from .flat import Flat
from .head import SteeringHead
from .imitation import imitation_loss
from .noise_bank import REACH, Keeper
from .recorded import Recorded
from .replay import Batch, Held

Info = dict[str, torch.Tensor]
"""What an update says of itself: figures by name, each of no dimensions."""


@dataclass(frozen=True)
class SACConfig:
    """Hyper-parameters of the update."""

    gamma: float = 0.99
    """Discount per environment step."""
    discount: Literal["step", "chunk"] = "step"
    """What gamma counts: environment steps; or chunks, as in the reference, whose rewards are then plainly summed."""
    timeouts: Literal["bootstrap", "terminal"] = "bootstrap"
    """What follows an episode that ran out of time: what would have followed; or nothing, as in the reference."""
    reward_offset: float = 1.0
    """Added to every step's reward. With 1, a task of -1 per step and 0 at success reads 0 and 1: values start
    where failure is and only success moves them."""
    reward_scale: float = 1.0
    """Multiplies the reward, after the offset."""
    n_step: int = 10
    """Decisions per return; see `dsrl_vla.n_step`."""
    tau: float = 0.01
    actor_lr: float = 3e-4
    critic_lr: float = 3e-4
    alpha_lr: float = 3e-3
    batch: int = 128
    alpha_init: float = 0.01
    target_entropy: float = -0.5
    """Nats per dimension of the [-1, 1] box, where uniform noise has ln 2 = 0.69, and nothing has more."""
    backup_entropy: bool = False
    """Whether the entropy bonus enters the target. Off: on it feeds itself (see the README)."""
    actor_average: float = 0.998
    """Weight of the past in the running average of the actor, per update. The average is what is validated, saved
    and served: the mode of the actor itself swings from one validation to the next. 0 turns it off."""
    max_grad_norm: float = 10.0
    jitter: float = 0.0
    """Noise on the states of every minibatch, in standard deviations of the state. A state alone tells which of few
    episodes it is from, and so how that ended: with some noise a critic has to look at what was done instead."""

    imitate: float = 0.0
    """What the actor loses, in units of the value, for squared distance from the noise that comes nearest to what a
    demonstration, or a person who took over, did (`dsrl_vla.inversion`). 0 does not look for that noise."""

    def __post_init__(self) -> None:
        if not 0 < self.gamma < 1:
            raise bad("sac.gamma", "above 0 and below 1", self.gamma)
        if not 0 < self.tau <= 1:
            raise bad("sac.tau", "above 0 and at most 1", self.tau)
        at_least(0, self, "sac", "jitter", "imitate")
        if not 0 <= self.actor_average < 1:
            raise bad("sac.actor_average", "0 or more and below 1", self.actor_average)
        at_least(1, self, "sac", "batch", "n_step")
        for name in ("reward_scale", "actor_lr", "critic_lr", "alpha_lr", "alpha_init", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise bad(f"sac.{name}", "above 0", getattr(self, name))
        for name in ("reward_offset", "reward_scale", "actor_lr", "critic_lr", "alpha_lr", "alpha_init", "imitate"):
            if not math.isfinite(getattr(self, name)):
                raise bad(f"sac.{name}", "a finite number", getattr(self, name))
        if not -math.inf < self.target_entropy < math.log(2):  # at more, alpha grows without end
            raise bad("sac.target_entropy", "a finite number below ln 2 = 0.693, uniform noise's", self.target_entropy)

    def chunk_reward(self, rewards: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """sum_i gamma^i (r_i + offset) scale over the steps really executed: (B, k), (B,) -> (B,); gamma is 1 within
        a chunk where `discount` says "chunk"."""
        i = np.arange(rewards.shape[1])
        executed = i < steps[:, None]
        within = self.gamma if self.discount == "step" else 1.0
        return self.reward_scale * ((rewards + self.reward_offset) * executed * within**i).sum(1)

    def chunk_discount(self, steps: np.ndarray) -> np.ndarray:
        """What the bootstrap after chunks of so many executed steps is discounted by: (B,) -> (B,)."""
        return self.gamma ** (steps if self.discount == "step" else np.ones_like(steps))

    def value_bounds(self, reward_range: tuple[float, float], chunk: int = 1) -> tuple[float, float]:
        """The least and greatest value that rewards in `reward_range` can add up to, forever, in chunks of `chunk`.

        None where entropy enters the target: it may take a value beyond what rewards alone add up to.
        """
        if self.backup_entropy:
            return -math.inf, math.inf
        most = (1 if self.discount == "step" else chunk) / (1 - self.gamma)
        low, high = (self.reward_scale * (r + self.reward_offset) for r in reward_range)
        return min(low, low * most), max(high, high * most)


def critic_loss(
    critic: CriticEnsemble,
    target: CriticEnsemble,
    head: SteeringHead,
    alpha: torch.Tensor,
    batch: Batch,
    bounds: tuple[float, float],
    backup_entropy: bool,
    source: Source,
) -> tuple[torch.Tensor, Info]:
    """Mean over members of (Q_i(s, u) - y)^2, y = R + gamma^k Red_i Q'_i(s', u'), kept to what the reward can give.
    A u that was found for what somebody else did counts by how near it comes to that."""
    with torch.no_grad():
        latent, log_prob = head.sample(batch.next_inputs, source)
        value = target.value(batch.next_inputs, latent)
        if backup_entropy:
            value = value - alpha * log_prob
        y = (batch.reward + batch.discount * value).clamp(*bounds)
    q = critic(batch.inputs, batch.latent)
    loss = ((q - y).square() * batch.extras.get(REACH, 1.0)).mean(1).sum()
    return loss, {"critic_loss": loss.detach() / q.shape[0], "q": q.detach().mean(), "target": y.mean()}


def actor_loss(
    critic: CriticEnsemble, head: SteeringHead, alpha: torch.Tensor, batch: Batch, source: Source
) -> tuple[torch.Tensor, Info]:
    """E[alpha log pi(u|s) - Red_i Q_i(s, u)], u ~ pi."""
    latent, log_prob = head.sample(batch.inputs, source)
    loss = (alpha * log_prob - critic.value(batch.inputs, latent)).mean()
    entropy = -log_prob.detach().mean() / latent[0].numel()
    return loss, {"actor_loss": loss.detach(), "entropy": entropy, "latent_abs": latent.detach().abs().mean()}


def alpha_loss(log_alpha: torch.Tensor, entropy: torch.Tensor, target_entropy: float) -> tuple[torch.Tensor, Info]:
    """alpha (H - H_target), in nats per dimension."""
    loss = log_alpha.exp() * (entropy - target_entropy)
    return loss, {"alpha": log_alpha.detach().exp()}


class LatentSAC:
    """Head, critics, temperature and their optimisers; `update` does one gradient step of each."""

    def __init__(
        self,
        head: SteeringHead,
        critic: CriticConfig,
        config: SACConfig,
        value_bounds: tuple[float, float],
        seed: int,
        device: str = "cpu",
    ):
        """`device`: where all of it lives and learns; `head` is moved there."""
        self.device = torch.device(device)
        self.head, self.config, self.bounds = head, config, value_bounds
        self.critic = CriticEnsemble(critic, head.config)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.average = copy.deepcopy(head).requires_grad_(False)
        """The head to use: the actor, averaged over its updates."""
        self.log_alpha = nn.Parameter(torch.tensor(config.alpha_init, device=self.device).log())
        self.modules: dict[str, nn.Module] = {}
        """Everything with weights, by the name it is saved under."""
        self.flat = {"alpha": Flat([self.log_alpha])}
        self.optimizers = {"alpha": self.flat["alpha"].adam(config.alpha_lr)}
        self._own("head", head, config.actor_lr)
        self._own("average", self.average)
        self._own("critic", self.critic, config.critic_lr)
        self._own("target", self.target)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.draws: Source = self.generator
        """Where an update's random numbers come from."""
        self.updates = 0
        self._recorded = None
        if self.device.type == "cuda":
            self._recorded = Recorded(
                self._learn_held, "the update", self._weight, repeatable=False, generator=self.generator
            )

    def _own(self, name: str, module: nn.Module, learning_rate: float | None = None) -> None:
        """Count a module among the learner's; with a learning rate it is trained."""
        module.to(self.device)
        self.modules[name], self.flat[name] = module, Flat(module.parameters())
        if learning_rate is not None:
            self.optimizers[name] = self.flat[name].adam(learning_rate)

    def keeper(self) -> Keeper:
        """What has to be kept of a decision beside noise, reward and observations."""
        return Keeper(inverts=self.config.imitate > 0)

    def fit_normaliser(self, replay: Held) -> None:
        """Fit head's and critics' observation statistics on warm-up data."""
        for module in self.modules.values():
            module.eyes.normalise.fit(replay.observations())  # type: ignore[union-attr, operator]

    def update(self, batch: Batch) -> Info:
        """One step each of critic, target, actor and temperature. Nothing is copied to Python.
        The batch is on `device`; on a GPU its shapes are always the same."""
        info = self._recorded(batch.tensors()) if self._recorded else self._learn(batch)
        # Young averages forget faster, so that the initial weights do not linger.
        weight = max(1 - self.config.actor_average, 1 / (1 + self.updates))
        self.flat["average"].follow(self.flat["head"], weight)
        self.updates += 1
        return info

    def _learn(self, batch: Batch) -> Info:
        """What of an update is the same work every time."""
        alpha = self.log_alpha.detach().exp()
        if self.config.jitter:
            batch = self._jittered(batch)
        info = self._update_critics(batch, alpha)
        self.flat["target"].follow(self.flat["critic"], self.config.tau)
        info |= self._update_actor(batch, alpha)
        loss, more = alpha_loss(self.log_alpha, info["entropy"], self.config.target_entropy)
        self._step("alpha", loss)
        return info | more

    def _learn_held(self, tensors: dict[str, torch.Tensor]) -> Info:
        return self._learn(Batch.of(tensors))

    def _weight(self) -> torch.Tensor:
        return self.log_alpha

    def _jittered(self, batch: Batch) -> Batch:
        shake = partial(self.head.eyes.normalise.jittered, amount=self.config.jitter, source=self.draws)
        return replace(batch, inputs=shake(batch.inputs), next_inputs=shake(batch.next_inputs))

    def _update_critics(self, batch: Batch, alpha: torch.Tensor) -> Info:
        backup = self.config.backup_entropy
        loss, info = critic_loss(self.critic, self.target, self.head, alpha, batch, self.bounds, backup, self.draws)
        self._step("critic", loss)
        return info

    def _update_actor(self, batch: Batch, alpha: torch.Tensor) -> Info:
        self.critic.requires_grad_(False)  # or its own gradients would be computed, for nobody
        try:
            loss, info = actor_loss(self.critic, self.head, alpha, batch, self.draws)
        finally:
            self.critic.requires_grad_(True)
        if self.config.imitate:
            apart, more = imitation_loss(self.head, batch)
            loss, info = loss + self.config.imitate * apart, info | more
        self._step("head", loss)
        return info

    def snapshot(self, head: SteeringHead) -> Callable[[Path], None]:
        """What writes `head`, and all that goes with it as it is now, to a folder: at once or later."""
        return head.save_pretrained

    def _step(self, name: str, loss: torch.Tensor) -> None:
        self.flat[name].descend(loss, self.optimizers[name], self.config.max_grad_norm)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything needed to go on, as flat named tensors."""
        state = {f"{name}.{k}": v for name, module in self.modules.items() for k, v in module.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            for index, slots in optimizer.state_dict()["state"].items():
                state |= {f"optimizer.{name}.{index}.{slot}": torch.as_tensor(value) for slot, value in slots.items()}
        return state | {"log_alpha": self.log_alpha.detach(), "generator": self.generator.get_state()}

    def load_tensors(self, state: dict[str, torch.Tensor], updates: int) -> None:
        """Undo `tensors`.

        Raises:
            DsrlError: a version wrote it whose optimisers were others.
        """
        slots: dict[str, dict[str, Any]] = {name: {} for name in self.optimizers}
        for key, value in state.items():
            if key.startswith("optimizer."):
                _, name, _, slot = key.split(".")
                if name not in slots:
                    what, to_do = f"an optimiser '{name}'", "Finish the run with the version that began it."
                    raise bad("checkpoint", f"optimisers of {', '.join(slots)}", what, to_do)
                slots[name][slot] = value
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(optimizer.state_dict() | {"state": {0: slots[name]} if slots[name] else {}})
        for name, module in self.modules.items():
            module.load_state_dict({k[len(name) + 1 :]: v for k, v in state.items() if k.startswith(f"{name}.")})
        with torch.no_grad():
            self.log_alpha.copy_(state["log_alpha"])
        self.generator.set_state(state["generator"])
        self.updates = updates
        if self._recorded:
            self._recorded.forget()  # the optimisers' tensors are others now
