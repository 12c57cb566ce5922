"""What is kept of a decision beyond its noise: nothing, a bank of (noise, action) pairs, or the whole prefix.

A frozen base never changes its mind, so pairs asked for at the decision, behind the prefix that was computed
for it anyway, are true for ever. For a real π0 eight of them are some 50 kB; its KV cache is 15 MB.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import bad
from .head import HeadInputs, SteeringHead
from .inversion import invert
from .policy import Encoding, FrozenPolicy
from .replay import Extras

ACTION, BANK_LATENT, BANK_ACTION, PREFIX = "action", "bank_latent", "bank_action", "prefix."
REACH, IMITATED = "reach", "imitated"
"""How near a decision's noise comes to what was done, (B,) from 0 to 1, which the head's own has; and whether it was
somebody else's, to be imitated, (B,), 1 or 0."""


@dataclass(frozen=True, kw_only=True)
class Keeper:
    """Runs the sampler for a decision, and says what the replay is to keep beside its observation."""

    inverts: bool = False
    """Whether it looks for the noise behind actions that were not taken by noise (`dsrl_vla.inversion`)."""

    @property
    def learns_from_actions(self) -> bool:
        """Whether decisions whose noise nobody knows are of use (`label`)."""
        return self.inverts

    def observed(self, base: FrozenPolicy, encoding: Encoding) -> Extras:
        """What to keep of every observation, an episode's last one included."""
        return {}

    def denoise(
        self,
        base: FrozenPolicy,
        encoding: Encoding,
        head: SteeringHead,
        inputs: HeadInputs,
        latent: torch.Tensor,
        generators: list[torch.Generator],
    ) -> tuple[torch.Tensor, Extras]:
        """Chosen latents (B, n, d) to the chunks to execute (B, k, A), and what to keep of the decision."""
        noise = head.layout.expand(latent).unsqueeze(1)
        return base.denoise(encoding, noise)[:, 0, : base.spec.executed_steps], self._own(len(latent))

    def label(
        self,
        base: FrozenPolicy,
        encoding: Encoding,
        head: SteeringHead,
        inputs: HeadInputs,
        chunk: torch.Tensor,
        steps: torch.Tensor,
        generators: list[torch.Generator],
    ) -> tuple[torch.Tensor, Extras]:
        """Latents (B, n, d) of decisions whose noise nobody knows, blank unless it looks for them, and what to keep.

        Args:
            chunk: (B, k, A), of which the first `steps`, int64 (B,), were executed.

        Raises:
            DsrlError: this algorithm learns from noise, and does not look for it.
        """
        if not self.learns_from_actions:
            expected = "na or na-exact, which learn from actions, or sac.imitate above 0, with offline data"
            raise bad("algorithm", expected, "'sac', which needs noise")
        if not self.inverts:
            return torch.zeros(len(chunk), *head.layout.latent_shape), {}
        found = invert(base, encoding, head.layout, chunk, steps, generators)
        return found.latent, {REACH: found.reach, IMITATED: torch.ones(len(chunk))}

    def _own(self, batch: int) -> Extras:
        """What goes with decisions taken by noise, so that all have the same."""
        return {REACH: torch.ones(batch), IMITATED: torch.zeros(batch)} if self.inverts else {}


@dataclass(frozen=True)
class BankConfig:
    """How a noise bank is drawn."""

    size: int = 8
    """Extra (noise, action) pairs asked of the base at every decision."""
    actor_share: float = 0.5
    """Share of them drawn from the actor as it then is; the rest is uniform over the box the actor lives in."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise bad("na.bank.size", "1 or more", self.size)
        if not 0 <= self.actor_share <= 1:
            raise bad("na.bank.actor_share", "from 0 to 1", self.actor_share)


@dataclass(frozen=True, kw_only=True)
class ActionKeeper(Keeper):
    """Keeps the executed chunk."""

    @property
    def learns_from_actions(self) -> bool:
        return True

    def denoise(self, base, encoding, head, inputs, latent, generators):
        chunk, extras = super().denoise(base, encoding, head, inputs, latent, generators)
        return chunk, extras | {ACTION: chunk}

    def label(self, base, encoding, head, inputs, chunk, steps, generators):
        latent, extras = super().label(base, encoding, head, inputs, chunk, steps, generators)
        return latent, extras | {ACTION: chunk}


@dataclass(frozen=True)
class BankKeeper(ActionKeeper):
    """Keeps the executed chunk, and a bank whose first pair is the executed one."""

    config: BankConfig

    def draw(self, head: SteeringHead, inputs: HeadInputs, generators: list[torch.Generator]) -> torch.Tensor:
        """Latents (B, size, n, d) on the support of the actor: some of its own, the others uniform."""
        own = round(self.config.actor_share * self.config.size)
        latents = [head.latent(inputs, generators) for _ in range(own)]
        shape = head.layout.latent_shape
        for _ in range(self.config.size - own):
            latents.append(torch.stack([torch.rand(shape, generator=g) * 2 - 1 for g in generators]))
        return torch.stack(latents, 1)

    def denoise(self, base, encoding, head, inputs, latent, generators):
        latents = torch.cat([latent.unsqueeze(1), self.draw(head, inputs, generators)], 1)
        chunks = base.denoise(encoding, head.layout.expand(latents))[:, :, : base.spec.executed_steps]
        bank = {ACTION: chunks[:, 0], BANK_LATENT: latents, BANK_ACTION: chunks}
        return chunks[:, 0], bank | self._own(len(latent))

    def label(self, base, encoding, head, inputs, chunk, steps, generators):
        latent, extras = super().label(base, encoding, head, inputs, chunk, steps, generators)
        first = latent.unsqueeze(1) if self.inverts else head.layout.sample(generators)
        latents = torch.cat([first, self.draw(head, inputs, generators)], 1)
        chunks = base.denoise(encoding, head.layout.expand(latents))[:, :, : base.spec.executed_steps]
        return latent, extras | {BANK_LATENT: latents, BANK_ACTION: chunks}


class PrefixKeeper(ActionKeeper):
    """Keeps the executed chunk and the whole prefix, for updates that denoise."""

    def observed(self, base, encoding):
        return {PREFIX + name: tensor.cpu() for name, tensor in base.pack(encoding).items()}
