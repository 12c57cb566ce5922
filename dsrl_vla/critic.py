"""The critic: an ensemble of Q(observation, latent) over the same tokens as the head, and the noise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from .errors import bad
from .head import Eyes, HeadConfig, HeadInputs
from .networks import NetworkConfig, build

Reduction = Literal["min", "mean"]


@dataclass(frozen=True)
class CriticConfig:
    """The critic ensemble."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    members: int = 2
    reduction: Reduction = "min"
    """How the ensemble speaks with one voice: min (2 members in the reference) or mean (10)."""

    def __post_init__(self) -> None:
        if self.members < 1:
            raise bad("critic.members", "1 or more", self.members)
        if self.reduction not in ("min", "mean"):
            raise bad("critic.reduction", "min or mean", f"'{self.reduction}'")


class CriticEnsemble(nn.Module):
    """Q_i(observation, u) for i in 1..E."""

    def __init__(self, config: CriticConfig, head: HeadConfig, vectors: tuple[int, int] | None = None):
        """`vectors`: shape (n, d) of what is judged; by default the latent of the head's layout."""
        super().__init__()
        self.config = config
        self.eyes = Eyes(head)
        vectors = vectors or head.layout.latent_shape
        self.network = build(config.network, config.members, self.eyes.sizes, vectors, 1, 1)

    def forward(self, inputs: HeadInputs, latent: torch.Tensor) -> torch.Tensor:
        """inputs (B, …), latent (B, n, d) in [-1, 1] -> (E, B)."""
        return self.network(self.eyes(inputs), latent)[..., 0, 0]

    def value(self, inputs: HeadInputs, latent: torch.Tensor) -> torch.Tensor:
        """The ensemble's one voice, (B,)."""
        q = self(inputs, latent)
        return q.amin(0) if self.config.reduction == "min" else q.mean(0)
