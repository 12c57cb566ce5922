"""What learner and workers send each other: bytes of the wire codec, so that nothing is a pickle.

A worker's collector writes into an `Outbox` as if it were the replay. The learner's `Inbox` for that worker repeats
the same calls on the replay, whose numbers are others.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..head import HeadInputs
from ..replay import Extras, Replay
from ..serving.wire import OUR_OWN, pack
from ..serving.wire import unpack as unpack_within

__all__ = ["Inbox", "Outbox", "arrays", "from_bytes", "pack", "tensors", "to_bytes", "unpack"]


def unpack(data: bytes) -> Any:
    """Undo `pack`. No stranger has written it: the limits are memory's."""
    return unpack_within(data, OUR_OWN)


def arrays(held: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Tensors as the codec takes them."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in held.items()}


def tensors(held: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Undo `arrays`."""
    return {name: torch.from_numpy(np.array(values)) for name, values in held.items()}


def to_bytes(tensor: torch.Tensor) -> bytes:
    """Undo `from_bytes`."""
    return tensor.numpy().tobytes()


def from_bytes(data: bytes) -> torch.Tensor:
    """Bytes as a checkpoint holds them, uint8 (N,)."""
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


class Outbox:
    """A `Store` that numbers observations and keeps what is written until it is sent."""

    def __init__(self) -> None:
        self.observed = 0
        self.writes: list[list[Any]] = []

    def observe(self, inputs: HeadInputs) -> np.ndarray:
        """As `Replay.observe`."""
        count = next(iter(inputs.values())).shape[0]
        self.observed += count
        self.writes.append(["observe", arrays(inputs)])
        return np.arange(self.observed - count, self.observed)

    def attach(self, numbers: np.ndarray, extras: Extras) -> None:
        """As `Replay.attach`."""
        if extras:
            self.writes.append(["attach", numbers, arrays(extras)])

    def add(
        self, now: np.ndarray, latent: torch.Tensor, reward: np.ndarray, discount: np.ndarray, then: np.ndarray
    ) -> None:
        """As `Replay.add`."""
        self.writes.append(["add", now, latent.numpy(), reward, discount, then])

    def take(self) -> list[list[Any]]:
        """What has been written since this was last asked."""
        writes, self.writes = self.writes, []
        return writes


class Inbox:
    """Puts into the replay what one worker has written."""

    def __init__(self, replay: Replay):
        self.replay = replay
        self.numbers = array("q")
        """The replay's number of every observation of the worker's."""

    def play(self, writes: list[list[Any]]) -> None:
        """Repeat the writes, in their order."""
        for kind, *values in writes:
            getattr(self, f"_{kind}")(*values)

    def _observe(self, inputs: dict[str, np.ndarray]) -> None:
        self.numbers.extend(self.replay.observe(tensors(inputs)).tolist())

    def _attach(self, numbers: np.ndarray, extras: dict[str, np.ndarray]) -> None:
        self.replay.attach(self.translate(numbers), tensors(extras))

    def _add(self, *values: np.ndarray) -> None:
        now, latent, reward, discount, then = map(np.array, values)
        self.replay.add(self.translate(now), torch.from_numpy(latent), reward, discount, self.translate(then))

    def translate(self, numbers: np.ndarray) -> np.ndarray:
        """The worker's observation numbers to the replay's."""
        return np.frombuffer(self.numbers, np.int64)[numbers]
