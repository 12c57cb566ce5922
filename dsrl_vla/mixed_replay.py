"""Online and offline data as one store."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from .head import HeadInputs
from .noise_bank import ACTION, REACH
from .replay import Batch, Replay
from .run_dir import digest


class MixedReplay:
    """Online and offline data as one store: every batch holds a fixed share of each (symmetric sampling).

    With nothing online yet, batches are offline.
    """

    def __init__(self, online: Replay, offline: Replay, share: float, actions: str = ""):
        """`actions`: a hash of the recorded ones."""
        self.online, self.offline, self.share, self.actions = online, offline, share, actions

    def __len__(self) -> int:
        return len(self.online) + len(self.offline)

    def sample(self, size: int, rng: np.random.Generator) -> Batch:
        """As `Replay.sample`."""
        if not len(self.online):
            return self.offline.sample(size, rng)
        count = round(size * self.share)
        return _join(self.online.sample(size - count, rng), self.offline.sample(count, rng))

    def batches(
        self, count: int, size: int, rng: np.random.Generator, device: torch.device | None = None
    ) -> Iterator[Batch]:
        """As `Replay.batches`."""
        return (self.sample(size, rng).to(device) for _ in range(count))

    @functools.cached_property
    def sha256(self) -> str:
        """Of the offline transitions, which never change; of what came from the data, and not from the base, whose
        numbers another machine may round otherwise."""
        held = self.offline.tensors()
        own = ("reward", "discount", "index", "inputs.state", f"extras.{ACTION}")
        found = {name: held[name] for name in own if name in held}
        if f"extras.{REACH}" not in held:
            return digest({"latent": held["latent"]} | found)  # blank
        return digest(found) + self.actions

    def observations(self) -> HeadInputs:
        """As `Replay.observations`, both stores after one another."""
        return _cat([r.observations() for r in self._filled()])

    def held(self, name: str) -> torch.Tensor:
        """As `Replay.held`."""
        return torch.cat([r.held(name) for r in self._filled() if len(r)])

    def _filled(self) -> Iterator[Replay]:
        return (r for r in (self.online, self.offline) if r.observed)


def _cat(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _join(a: Batch, b: Batch) -> Batch:
    values: dict[str, Any] = {}
    for field in fields(Batch):
        pair = [getattr(a, field.name), getattr(b, field.name)]
        values[field.name] = torch.cat(pair) if torch.is_tensor(pair[0]) else _cat(pair)
    return Batch(**values)
