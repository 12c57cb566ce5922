"""Noise: the base's noise space, the layouts that fill it, and who draws it.

This is the only place where a head's latent becomes a base's noise. A head emits u in [-1, 1]^(n, d). A layout
turns it into the sampler's initial noise w in R^(H, D):

    w[:, columns] = bound * weights @ u        weights: (H, n)

and every column that is not steered is fixed at zero, never left random. Layouts are matrices: `repeat` (one
vector for the whole chunk; n = 1), `chunk` (every step its own; n = H), `knots:n` (n vectors, linearly
interpolated over the chunk).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from .errors import bad, unknown

Prior = Literal["normal", "uniform"]
LAYOUTS = ("repeat", "chunk", "knots:<n>")


@dataclass(frozen=True)
class NoiseSpace:
    """The initial noise of a base's sampler: float32 (horizon, dim), drawn from `prior`.

    `live` marks the columns that carry real actions; the others are padding. Padding moves the real actions
    too, which is why it is steered or fixed.
    """

    horizon: int
    dim: int
    prior: Prior = "normal"
    live: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        if self.horizon < 1 or self.dim < 1:
            raise bad("noise shape", "positive (horizon, dim)", (self.horizon, self.dim))
        if self.prior not in ("normal", "uniform"):
            raise bad("noise prior", "normal or uniform", self.prior)
        if not self.live:
            object.__setattr__(self, "live", (True,) * self.dim)
        if len(self.live) != self.dim or not any(self.live):
            raise bad("noise live mask", f"{self.dim} flags, at least one set", self.live)

    @property
    def shape(self) -> tuple[int, int]:
        """(horizon, dim)."""
        return self.horizon, self.dim

    @property
    def limit(self) -> float:
        """The greatest bound that a layout may have."""
        return 1.0 if self.prior == "uniform" else 10.0

    def sample(self, generators: list[torch.Generator], count: int = 1) -> torch.Tensor:
        """Draw from the prior, one generator per row: float32 (B, count, H, D) on the CPU."""
        draw = torch.randn if self.prior == "normal" else torch.rand
        rows = [draw((count, *self.shape), generator=g) for g in generators]
        noise = torch.stack(rows)
        return noise if self.prior == "normal" else noise * 2 - 1

    def check(self, noise: torch.Tensor, batch: int) -> None:
        """Refuse noise that is not float32 (batch, K, H, D) and finite."""
        if noise.ndim != 4 or noise.shape[0] != batch or tuple(noise.shape[2:]) != self.shape:
            raise bad("noise", f"shape ({batch}, K, {self.horizon}, {self.dim})", tuple(noise.shape))
        if noise.dtype != torch.float32:
            raise bad("noise", "float32", noise.dtype)
        if not torch.isfinite(noise).all():
            raise bad("noise", "finite values", "NaN or infinity")


def _weights(name: str, horizon: int) -> torch.Tensor:
    """The (H, n) matrix of a layout."""
    kind, _, argument = name.partition(":")
    if kind == "repeat" and not argument:
        return torch.ones(horizon, 1)
    if kind == "chunk" and not argument:
        return torch.eye(horizon)
    if kind == "knots":
        if not argument.isdigit() or not 2 <= int(argument) <= horizon:
            raise bad("noise.layout", f"knots:<n> with n from 2 to the horizon {horizon}", f"'{name}'")
        position = torch.linspace(0, int(argument) - 1, horizon)
        return (1 - (position[:, None] - torch.arange(int(argument))).abs()).clamp(min=0)
    raise unknown("noise layout", name, LAYOUTS)


@dataclass(frozen=True)
class NoiseLayout:
    """How u in [-1, 1]^(n, d) fills a noise space, and how far: |w| <= bound, enforced here in code."""

    space: NoiseSpace
    name: str = "repeat"
    bound: float = 1.5
    columns: Literal["live", "all"] = "live"

    def __post_init__(self) -> None:
        if self.columns not in ("live", "all"):
            raise bad("noise.columns", "live or all", self.columns)
        limit = self.space.limit
        if not 0 < self.bound <= limit:
            raise bad("noise.bound", f"above 0 and at most {limit} for a {self.space.prior} prior", self.bound)
        _weights(self.name, self.space.horizon)

    @cached_property
    def weights(self) -> torch.Tensor:
        """(H, n), float32."""
        return _weights(self.name, self.space.horizon)

    @cached_property
    def steered(self) -> torch.Tensor:
        """Indices of the steered columns, int64 (d,)."""
        live = torch.tensor(self.space.live)
        return torch.arange(self.space.dim) if self.columns == "all" else live.nonzero()[:, 0]

    @cached_property
    def _columns(self) -> slice | torch.Tensor:
        """`steered` as an index; a slice, which is several times faster, where they lie side by side."""
        first, last = int(self.steered[0]), int(self.steered[-1])
        return slice(first, last + 1) if last - first + 1 == len(self.steered) else self.steered

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(n, d): vectors, and steered columns of each."""
        return self.weights.shape[1], len(self.steered)

    def expand(self, latent: torch.Tensor) -> torch.Tensor:
        """(…, n, d) in [-1, 1] -> noise float32 (…, H, D) with |noise| <= bound, whatever the latent."""
        latent = torch.nan_to_num(latent.float(), 0.0, 1.0, -1.0).clamp(-1, 1)
        noise = latent.new_zeros(*latent.shape[:-2], *self.space.shape)
        noise[..., self._columns] = self.bound * (self.weights.to(latent.device) @ latent)
        return noise.clamp(-self.bound, self.bound)

    def sample(self, generators: list[torch.Generator], count: int = 1) -> torch.Tensor:
        """Latents from the base's prior, truncated to where a head can go: (B, count, n, d) in [-1, 1]."""
        uniform = torch.stack([torch.rand((count, *self.latent_shape), generator=g) for g in generators])
        if self.space.prior == "uniform":
            return uniform * 2 - 1
        inside = torch.erf(torch.tensor(self.bound) / 2**0.5)
        normal = torch.erfinv((uniform * 2 - 1) * inside) * 2**0.5
        return (normal / self.bound).clamp(-1, 1)


def generators(seeds: list[int]) -> list[torch.Generator]:
    """One CPU generator per seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def restarted(drawn: list[torch.Generator]) -> list[torch.Generator]:
    """Generators as these were when they were seeded."""
    return generators([g.initial_seed() for g in drawn])
