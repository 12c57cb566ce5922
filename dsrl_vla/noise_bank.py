"""What is kept of a decision beyond its noise: nothing, a bank of (noise, action) pairs, or the whole prefix.

A frozen base never changes its mind, so pairs asked for at the decision, behind the prefix that was computed
for it anyway, are true for ever. For a real π0 eight of them are some 50 kB; its KV cache is 15 MB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .errors import bad
from .head import HeadInputs, SteeringHead
from .policy import Encoding, FrozenPolicy
from .replay import Extras

ACTION, BANK_LATENT, BANK_ACTION, PREFIX = "action", "bank_latent", "bank_action", "prefix."


class Keeper:
    """Runs the sampler for a decision, and says what the replay is to keep beside its observation."""

    learns_from_actions: ClassVar[bool] = False
    """Whether decisions whose noise nobody knows are of use (`label`)."""

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
        return base.denoise(encoding, noise)[:, 0, : base.spec.executed_steps], {}

    def label(
        self,
        base: FrozenPolicy,
        encoding: Encoding,
        head: SteeringHead,
        inputs: HeadInputs,
        chunk: torch.Tensor,
        generators: list[torch.Generator],
    ) -> Extras:
        """What to keep of decisions whose noise nobody knows; `chunk` (B, k, A) is what was executed.

        Raises:
            DsrlError: this algorithm learns from noise.
        """
        raise bad(
            "algorithm", "na or na-exact, which learn from actions, with offline data", "'sac', which needs noise"
        )


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


@dataclass(frozen=True)
class BankKeeper(Keeper):
    """Keeps the executed chunk, and a bank whose first pair is the executed one."""

    learns_from_actions: ClassVar[bool] = True
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
        return chunks[:, 0], {ACTION: chunks[:, 0], BANK_LATENT: latents, BANK_ACTION: chunks}

    def label(self, base, encoding, head, inputs, chunk, generators):
        latents = torch.cat([head.layout.sample(generators), self.draw(head, inputs, generators)], 1)
        chunks = base.denoise(encoding, head.layout.expand(latents))[:, :, : base.spec.executed_steps]
        return {ACTION: chunk, BANK_LATENT: latents, BANK_ACTION: chunks}


class PrefixKeeper(Keeper):
    """Keeps the executed chunk and the whole prefix, for updates that denoise."""

    learns_from_actions: ClassVar[bool] = True

    def observed(self, base, encoding):
        return {PREFIX + name: tensor.cpu() for name, tensor in base.pack(encoding).items()}

    def denoise(self, base, encoding, head, inputs, latent, generators):
        chunk, _ = super().denoise(base, encoding, head, inputs, latent, generators)
        return chunk, {ACTION: chunk}

    def label(self, base, encoding, head, inputs, chunk, generators):
        return {ACTION: chunk}
