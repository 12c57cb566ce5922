"""DSRL-NA (arXiv 2506.15799, algorithm 1): a critic over actions, distilled into one over noise.

Many noises end in nearly the same action (they are aliases), and what an action is worth can be learnt from any
data, whether its noise is known or not. So Q^A(s, a) learns from executed actions, and Q^W(s, u), which steers
the actor, is fitted to Q^A(s, f(s, u)) for noises u that were never tried.

The paper denoises inside the update to get f(s, u). A frozen base never changes its mind, so here it is asked
once, at the decision, for a few extra (u, f(s, u)) pairs behind the prefix it has already computed: a *noise
bank* in the replay. The update makes no call to the base. `ExactNoiseAliasing` is the paper's form.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .critic import CriticConfig, CriticEnsemble
from .draws import uniform
from .errors import bad
from .head import HeadConfig, HeadInputs, SteeringHead, deviation
from .latent_sac import Info, LatentSAC
from .noise_bank import ACTION, BANK_ACTION, BANK_LATENT, PREFIX, BankConfig, BankKeeper, Keeper, PrefixKeeper
from .policy import FrozenPolicy
from .replay import Batch, Extras, Held
from .run_dir import part, write_tensors

ACTION_CRITIC = "action_critic.safetensors"
Pairs = tuple[HeadInputs, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class NAConfig:
    """What DSRL-NA has beyond SAC's settings."""

    bank: BankConfig = field(default_factory=BankConfig)
    pairs: int = 1
    """Pairs per observation and update that Q^W is fitted on."""

    def __post_init__(self) -> None:
        if not 1 <= self.pairs <= self.bank.size + 1:
            raise bad("na.pairs", f"from 1 to na.bank.size + 1 = {self.bank.size + 1}", self.pairs)


class ActionCritic(CriticEnsemble):
    """Q^A_i(observation, chunk): the critic's network, reading the chunk, as one token, in place of noise vectors."""

    action_mean: torch.Tensor
    action_std: torch.Tensor

    def __init__(self, config: CriticConfig, head: HeadConfig, shape: tuple[int, int]):
        super().__init__(config, head, (1, shape[0] * shape[1]))
        self.register_buffer("action_mean", torch.zeros(shape[1]))
        self.register_buffer("action_std", torch.ones(shape[1]))

    @torch.no_grad()
    def fit_actions(self, actions: torch.Tensor) -> None:
        """Set the scale of each action column from a sample (…, A)."""
        flat = actions.reshape(-1, actions.shape[-1]).double()
        self.action_mean.copy_(flat.mean(0))
        self.action_std.copy_(deviation(flat).clamp(min=1e-3))

    def forward(self, inputs: HeadInputs, action: torch.Tensor) -> torch.Tensor:
        """inputs (B, …), action (B, k, A) in environment units -> (E, B)."""
        scaled = (action - self.action_mean) / self.action_std
        return super().forward(inputs, scaled.flatten(1).unsqueeze(1))


def action_critic_loss(
    critic: ActionCritic, next_value: torch.Tensor, batch: Batch, bounds: tuple[float, float]
) -> tuple[torch.Tensor, Info]:
    """Mean over members of (Q^A_i(s, a) - y)^2, y = R + gamma^k V(s'), kept to what the reward can give."""
    y = (batch.reward + batch.discount * next_value).clamp(*bounds)
    q = critic(batch.inputs, batch.extras[ACTION])
    loss = (q - y).square().mean(1).sum()
    return loss, {"critic_loss": loss.detach() / q.shape[0], "q": q.detach().mean(), "target": y.mean()}


def distillation_loss(
    critic: CriticEnsemble, teacher: ActionCritic, inputs: HeadInputs, latent: torch.Tensor, action: torch.Tensor
) -> tuple[torch.Tensor, Info]:
    """Mean over members of (Q^W_i(s, u) - Q^A_i(s, f(s, u)))^2: each member has its own teacher."""
    with torch.no_grad():
        taught = teacher(inputs, action)
    loss = (critic(inputs, latent) - taught).square().mean(1).sum()
    return loss, {"distillation_loss": loss.detach() / taught.shape[0]}


class NoiseAliasing(LatentSAC):
    """DSRL-NA over a noise bank. `critic` and `target` are Q^W; `action_critic` is Q^A."""

    def __init__(self, *args: Any, na: NAConfig, action_dim: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.na, head = na, self.head.config
        self.action_critic = ActionCritic(self.critic.config, head, (head.executed_steps, action_dim))
        self._own("action_critic", self.action_critic, self.config.critic_lr)

    def fit_normaliser(self, replay: Held) -> None:
        """Fit the statistics of observations and actions on warm-up data."""
        super().fit_normaliser(replay)
        self.action_critic.fit_actions(replay.held(ACTION))

    def keeper(self) -> Keeper:
        """What has to be kept of a decision."""
        return BankKeeper(self.na.bank, inverts=self.config.imitate > 0)

    def snapshot(self, head: SteeringHead) -> Callable[[Path], None]:
        """As `LatentSAC.snapshot`; with the head goes Q^A (``action_critic.safetensors``)."""
        weights = copy.deepcopy(self.action_critic.state_dict())

        def write(folder: Path) -> None:
            head.save_pretrained(folder)
            write_tensors(folder / ACTION_CRITIC, weights)

        return write

    def load_action_critic(self, folder: Path) -> ActionCritic:
        """The Q^A that a snapshot wrote, beside the present one."""
        critic = copy.deepcopy(self.action_critic).cpu()
        critic.load_state_dict(load_file(folder / ACTION_CRITIC))
        return critic

    def _update_critics(self, batch: Batch, alpha: torch.Tensor) -> Info:
        with torch.no_grad():
            latent, log_prob = self.head.sample(batch.next_inputs, self.draws)
            value = self._next_value(batch, latent) - alpha * log_prob * self.config.backup_entropy
        loss, info = action_critic_loss(self.action_critic, value, batch, self.bounds)
        self._step("action_critic", loss)
        inputs, latent, action = self._pairs(batch)
        loss, more = distillation_loss(self.critic, self.action_critic, inputs, latent, action)
        self._step("critic", loss)
        return info | more

    def _next_value(self, batch: Batch, latent: torch.Tensor) -> torch.Tensor:
        """V(s') = Red_i Q^W'_i(s', u'): the distilled critic stands in for a call to the base."""
        return self.target.value(batch.next_inputs, latent)

    def _pairs(self, batch: Batch) -> Pairs:
        """`na.pairs` different pairs of every observation's bank, with the observation repeated for each."""
        latents, actions = batch.extras[BANK_LATENT], batch.extras[BANK_ACTION]
        size, count = latents.shape[:2]
        chosen = uniform((size, count), self.draws, latents.device).argsort(1)[:, : self.na.pairs]
        rows = torch.arange(size, device=latents.device).unsqueeze(1)
        inputs = {k: v.repeat_interleave(self.na.pairs, 0) for k, v in batch.inputs.items()}
        return inputs, latents[rows, chosen].flatten(0, 1), actions[rows, chosen].flatten(0, 1)


class ExactNoiseAliasing(NoiseAliasing):
    """The paper's form: the base denoises inside the update, for s' and for the pairs.

    The replay keeps the prefix of every observation, which for a real π0 is 15 MB each: for small bases, and as
    the yardstick for the bank.
    """

    def __init__(self, *args, base: FrozenPolicy, **kwargs):
        super().__init__(*args, **kwargs)
        self.base = base
        self.action_target = copy.deepcopy(self.action_critic).requires_grad_(False)
        self._own("action_target", self.action_target)

    def fit_normaliser(self, replay: Held) -> None:
        """Fit the statistics of observations and actions on warm-up data."""
        super().fit_normaliser(replay)
        self.action_target.load_state_dict(self.action_critic.state_dict())

    def keeper(self) -> Keeper:
        """What has to be kept of a decision."""
        return PrefixKeeper(inverts=self.config.imitate > 0)

    def _update_critics(self, batch: Batch, alpha: torch.Tensor) -> Info:
        info = super()._update_critics(batch, alpha)
        self.flat["action_target"].follow(self.flat["action_critic"], self.config.tau)
        return info

    def _next_value(self, batch: Batch, latent: torch.Tensor) -> torch.Tensor:
        action = self._denoise(batch.next_extras, latent)
        return self.action_target.value(batch.next_inputs, action)

    def _pairs(self, batch: Batch) -> Pairs:
        latent = uniform(batch.latent.shape, self.draws) * 2 - 1
        return batch.inputs, latent, self._denoise(batch.extras, latent)

    def _denoise(self, extras: Extras, latent: torch.Tensor) -> torch.Tensor:
        noise = self.head.layout.expand(latent).unsqueeze(1)
        chunks = self.base.denoise(self.base.unpack(part(extras, PREFIX)), noise)
        return chunks[:, 0, : self.base.spec.executed_steps]
