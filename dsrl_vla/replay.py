"""The transition store: each observation once, transitions as pairs of indices into it.

Rows are what the head looks at (state, feature, small images), never the base's KV cache, which for a real
π0 is 15 MB per decision. A vector environment's successor observation is the next decision's observation, so
storing it once halves the memory; an episode's last observation is stored for its bootstrap alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from .errors import bad
from .head import HeadInputs
from .run_dir import disk_errors, part

Extras = dict[str, torch.Tensor]
"""What a learner wants kept beside an observation, by name: rows of one shape and dtype each."""


def reserve(path: Path, size: int) -> None:
    """Make a file of so many bytes that the disk really has room for; a sparse one would kill the process when it
    is written through memory and the disk is full."""
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)


@dataclass(frozen=True)
class Batch:
    """Transitions, N rows each."""

    inputs: HeadInputs
    latent: torch.Tensor  # (N, n, d) in [-1, 1]
    reward: torch.Tensor  # (N,), discounted inside the chunk
    discount: torch.Tensor  # (N,), gamma^k, and 0 where the episode terminated
    next_inputs: HeadInputs
    extras: Extras = field(default_factory=dict)
    next_extras: Extras = field(default_factory=dict)

    def rows(self, some: slice) -> Batch:
        """A view of some of the rows."""
        cut = lambda value: {k: v[some] for k, v in value.items()} if isinstance(value, dict) else value[some]
        values: dict[str, Any] = {f.name: cut(getattr(self, f.name)) for f in fields(self)}
        return Batch(**values)

    def to(self, device: torch.device | None) -> Batch:
        """On another device, by way of pinned memory, so that nobody waits for the copy; None: where it is."""
        if device is None or device == self.reward.device:
            return self
        return Batch.of({k: v.pin_memory().to(device, non_blocking=True) for k, v in self.tensors().items()})

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its tensors under flat names, always in the same order."""
        found: dict[str, torch.Tensor] = {}
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            found |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
        return found

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> Batch:
        """Undo `tensors`."""
        values: dict[str, Any] = {f.name: tensors.get(f.name, part(tensors, f"{f.name}.")) for f in fields(cls)}
        return cls(**values)


class Held(Protocol):
    """What statistics are taken from."""

    def observations(self) -> HeadInputs: ...

    def held(self, name: str) -> torch.Tensor: ...


class Store(Protocol):
    """What a collector fills; see `Replay`."""

    def observe(self, inputs: HeadInputs) -> np.ndarray: ...

    def attach(self, numbers: np.ndarray, extras: Extras) -> None: ...

    def add(
        self, now: np.ndarray, latent: torch.Tensor, reward: np.ndarray, discount: np.ndarray, then: np.ndarray
    ) -> None: ...


class Replay:
    """A ring of `capacity` transitions.

    The caller owns the order of calls: `observe` returns an index, `add` joins two of them. An observation
    is dropped when `capacity` + 8 % newer ones have been stored; transitions that refer to it go with it.

    Args:
        folder: where observations and extras live, as files that the system pages in and out; in memory by default.
            It belongs to this store, which writes over what it finds there.
    """

    def __init__(self, capacity: int, latent_shape: tuple[int, int], folder: Path | None = None):
        if capacity < 1:
            raise bad("replay.capacity", "1 or more", capacity)
        self.capacity, self.folder = capacity, folder
        self.rows = capacity + capacity // 12 + 64
        self.inputs: HeadInputs = {}
        self.extras: Extras = {}
        self.latent = torch.zeros(capacity, *latent_shape)
        self.reward = torch.zeros(capacity)
        self.discount = torch.zeros(capacity)
        self.index = torch.zeros(capacity, 2, dtype=torch.int64)  # observation numbers, counted from the start
        self.observed = 0
        self.added = 0
        self._known = (0, 0, 0)
        """The first transition that can be drawn, and how much had been stored when that was found."""

    def observe(self, inputs: HeadInputs) -> np.ndarray:
        """Store a batch of observations; return their numbers, int64 (B,)."""
        count = next(iter(inputs.values())).shape[0]
        numbers = np.arange(self.observed, self.observed + count)
        self._write(self.inputs, inputs, numbers)
        self.observed += count
        return numbers

    def attach(self, numbers: np.ndarray, extras: Extras) -> None:
        """Keep `extras` (B, …) beside the observations of these numbers."""
        self._write(self.extras, extras, numbers)

    def _write(self, store: dict[str, torch.Tensor], values: dict[str, torch.Tensor], numbers: np.ndarray) -> None:
        for name, rows in values.items():
            if name not in store:
                store[name] = self._allocate(name, rows)
            store[name][torch.from_numpy(numbers) % self.rows] = rows

    def _allocate(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Room for all rows of this shape and dtype."""
        shape = (self.rows, *like.shape[1:])
        if self.folder is None:
            return torch.zeros(shape, dtype=like.dtype)
        size, path = math.prod(shape), self.folder / name
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            reserve(path, size * like.element_size())
        return torch.from_file(str(path), shared=True, size=size, dtype=like.dtype).view(shape)

    def add(
        self, now: np.ndarray, latent: torch.Tensor, reward: np.ndarray, discount: np.ndarray, then: np.ndarray
    ) -> None:
        """Store transitions between observation numbers `now` and `then`.

        Args:
            latent: (B, n, d) in [-1, 1]. reward: (B,) discounted within the chunk.
            discount: (B,) gamma^k, 0 where the episode terminated.

        Raises:
            DsrlError: a reward that is not finite.
        """
        if not np.isfinite(reward).all():
            raise bad("reward", "a finite number", reward[~np.isfinite(reward)][0])
        slots = torch.arange(self.added, self.added + len(now)) % self.capacity
        self.latent[slots] = latent
        self.reward[slots] = torch.as_tensor(reward, dtype=torch.float32)
        self.discount[slots] = torch.as_tensor(discount, dtype=torch.float32)
        self.index[slots] = torch.as_tensor(np.stack([now, then], 1))
        self.added += len(now)

    def __len__(self) -> int:
        return self.added - self._first()

    def _first(self) -> int:
        """Number of the oldest transition from which on all observations are still held.

        Returns over several decisions are added when they are complete, so a transition may be from before the one
        that was added before it.
        """
        if self._known[:2] != (self.observed, self.added):
            first, filled = max(0, self.added - self.capacity), min(self.added, self.capacity)
            gone = (self.index[:filled, 0] < self.observed - self.rows).nonzero()[:, 0]
            if len(gone):
                first += int(((gone - first) % self.capacity).max()) + 1
            self._known = (self.observed, self.added, first)
        return self._known[2]

    def sample(self, size: int, rng: np.random.Generator) -> Batch:
        """Draw `size` transitions uniformly, with replacement.

        Raises:
            DsrlError: the store is empty.
        """
        first = self._first()
        if first == self.added:
            raise bad("replay", "at least one transition", "none")
        slots = torch.from_numpy(rng.integers(first, self.added, size)) % self.capacity
        rows = self.index.index_select(0, slots) % self.rows
        now, then = rows.unbind(1)
        # index_select copies whole rows; indexing goes number by number, at a tenth of the speed for images.
        gather = lambda store, numbers: {k: v.index_select(0, numbers) for k, v in store.items()}
        return Batch(
            inputs=gather(self.inputs, now),
            latent=self.latent.index_select(0, slots),
            reward=self.reward.index_select(0, slots),
            discount=self.discount.index_select(0, slots),
            next_inputs=gather(self.inputs, then),
            extras=gather(self.extras, now),
            next_extras=gather(self.extras, then),
        )

    def batches(
        self, count: int, size: int, rng: np.random.Generator, device: torch.device | None = None
    ) -> Iterator[Batch]:
        """What `sample` would give `count` times, drawn, gathered and moved to a device at once."""
        drawn = self.sample(count * size, rng).to(device)
        return (drawn.rows(slice(first, first + size)) for first in range(0, count * size, size))

    def observations(self) -> HeadInputs:
        """All observations held, (N, …)."""
        return {k: v[: min(self.observed, self.rows)] for k, v in self.inputs.items()}

    def held(self, name: str) -> torch.Tensor:
        """One of the extras, of all observations that a transition begins at, (N, …): others need not have it."""
        begun = self.index[: min(self.added, self.capacity), 0].unique() % self.rows
        return self.extras[name][begun]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The store as named tensors, cut to what is filled."""
        filled, rows = min(self.added, self.capacity), min(self.observed, self.rows)
        own = {name: getattr(self, name)[:filled] for name in ("latent", "reward", "discount", "index")}
        own |= {f"inputs.{k}": v[:rows] for k, v in self.inputs.items()}
        return own | {f"extras.{k}": v[:rows] for k, v in self.extras.items()}

    def load_tensors(self, tensors: dict[str, torch.Tensor], observed: int, added: int) -> None:
        """Undo `tensors`."""
        for name in ("latent", "reward", "discount", "index"):
            getattr(self, name)[: len(tensors[name])] = tensors[name]
        for prefix, store in (("inputs.", self.inputs), ("extras.", self.extras)):
            self._write(store, part(tensors, prefix), np.arange(min(observed, self.rows)))
        self.observed, self.added, self._known = observed, added, (-1, -1, 0)
