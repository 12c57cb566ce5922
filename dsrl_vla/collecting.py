"""What collection has brought so far, whoever collects: counters, the newest episodes, faults."""

from __future__ import annotations

import abc
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from .faults import Faults
from .run_dir import part
from .watch import Finished

_COUNTERS = ("episodes", "env_steps", "decisions")


class AnyCollector(abc.ABC):
    """What the training loop asks of a collector.

    Args:
        num_envs: environments that take turns in `recent`.
    """

    live = False
    """Whether a robot moves while it collects: it is stopped at once."""
    whole = False
    """Whether an interrupt, now, leaves nothing half booked."""

    def __init__(self, num_envs: int, faults: Faults | None = None):
        self.num_envs, self.faults = num_envs, faults or Faults()
        self.episodes = self.env_steps = self.decisions = 0
        self.recent: deque[bool] = deque(maxlen=max(50, 2 * num_envs))
        self.finished: deque[Finished] = deque(maxlen=20)

    @abc.abstractmethod
    def step(self, warm_up: bool) -> None:
        """Collect some decisions (of random noise in the layout, to warm up) into the replay, and count them."""

    @abc.abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """With `state`, all that is needed to go on where it is between two steps."""

    @abc.abstractmethod
    def state(self) -> dict[str, Any]:
        """The rest of it; JSON-able."""

    @abc.abstractmethod
    def resume(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Undo `tensors` and `state`, in a collector that has just been made."""

    def restore(self) -> int:
        """Take in episodes that are on the disk and in no checkpoint; return how many. A simulator has none."""
        return 0

    def close(self) -> None:  # noqa: B027
        """End what it started; what it collected stays."""

    @property
    def success(self) -> float:
        """Share of successes among the last 50 finished episodes, or two of every environment if these are more.

        NaN until every environment has finished about two: the first to finish are the successes.
        """
        enough = len(self.recent) >= 2 * self.num_envs
        return float(np.mean(self.recent)) if enough else float("nan")

    def _past_tensors(self) -> dict[str, torch.Tensor]:
        """Of the newest episodes that are over."""
        return {f"finished.{i}.{k}": v for i, e in enumerate(self.finished) for k, v in e.tensors().items()}

    def _past_state(self) -> dict[str, Any]:
        """What has been counted so far; JSON-able."""
        return {
            **{name: getattr(self, name) for name in _COUNTERS},
            "recent": list(self.recent),
            "finished": len(self.finished),
            "faults": dict(self.faults.counts),
        }

    def _resume_past(self, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """Undo `_past_tensors` and `_past_state`."""
        for name in _COUNTERS:
            setattr(self, name, state[name])
        self.recent.extend(state["recent"])
        self.faults.set(state["faults"])  # and not those of the start that is undone
        self.finished.extend(Finished.from_tensors(part(tensors, f"finished.{i}.")) for i in range(state["finished"]))
