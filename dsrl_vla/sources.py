"""Who picks the noise of a decision: the base itself, a control, or a head.

Every source draws from one generator per row, seeded by that row's episode, so that an episode's noise does
not depend on which other episodes run beside it.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch

from .head import SteeringHead
from .noise import NoiseLayout, NoiseSpace, restarted
from .observation import Observations
from .policy import Encoding, FrozenPolicy
from .steered_policy import SteeredPolicy


class NoiseSource(abc.ABC):
    """Picks the noise float32 (B, 1, H, D) for a batch of decisions."""

    @abc.abstractmethod
    def __call__(
        self, observations: Observations, encoding: Encoding, generators: list[torch.Generator]
    ) -> torch.Tensor: ...

    def actions(
        self, base: FrozenPolicy, observations: Observations, encoding: Encoding, generators: list[torch.Generator]
    ) -> torch.Tensor:
        """What the base does under this noise, float32 (B, 1, H, A)."""
        return base.denoise(encoding, self(observations, encoding, generators))


@dataclass(frozen=True)
class PriorNoise(NoiseSource):
    """The base's own behaviour, as its authors ship it. With `clip`, cut to [-clip, clip]."""

    space: NoiseSpace
    clip: float | None = None

    def __call__(self, observations, encoding, generators):
        noise = self.space.sample(generators)
        return noise if self.clip is None else noise.clamp(-self.clip, self.clip)


@dataclass(frozen=True)
class ZeroNoise(NoiseSource):
    """The control that every gain must beat: a constant zero."""

    space: NoiseSpace

    def __call__(self, observations, encoding, generators):
        return torch.zeros(len(generators), 1, *self.space.shape)


@dataclass(frozen=True)
class ConstantNoise(NoiseSource):
    """One latent (n, d) for every decision."""

    layout: NoiseLayout
    latent: torch.Tensor

    def __call__(self, observations, encoding, generators):
        return self.layout.expand(self.latent.expand(len(generators), 1, *self.latent.shape))


@dataclass(frozen=True)
class LayoutNoise(NoiseSource):
    """The base's prior, truncated and squeezed through a layout: a head that has learnt nothing."""

    layout: NoiseLayout

    def __call__(self, observations, encoding, generators):
        return self.layout.expand(self.layout.sample(generators))


@dataclass(frozen=True)
class HeldNoise(NoiseSource):
    """Layout noise drawn once per episode and held: what it did shows in how the episode ends.

    The first draw of an episode's generator, whatever has been drawn from it since.
    """

    layout: NoiseLayout

    def __call__(self, observations, encoding, generators):
        return self.layout.expand(self.layout.sample(restarted(generators)))


@dataclass(frozen=True)
class HeadNoise(NoiseSource):
    """A head's choice: its mode, or a sample of it."""

    head: SteeringHead
    deterministic: bool = True

    def __call__(self, observations, encoding, generators):
        return self.head.noise(observations, encoding, None if self.deterministic else generators)


@dataclass(frozen=True)
class SteeredNoise(NoiseSource):
    """A steered policy's noise, with its fail-safe: where the head fails, the base decides, and it is counted."""

    policy: SteeredPolicy
    deterministic: bool = True

    def __call__(self, observations, encoding, generators):
        return self.policy.noise(observations, encoding, _seeds(generators), deterministic=self.deterministic)[0]

    def actions(self, base, observations, encoding, generators):
        """Those of `base`, the policy's own, where the head's noise leads to none that are finite."""
        return self.policy.decide(observations, encoding, _seeds(generators), deterministic=self.deterministic)


def _seeds(generators: list[torch.Generator]) -> list[int]:
    return [int(torch.randint(2**31, (1,), generator=g)) for g in generators]
