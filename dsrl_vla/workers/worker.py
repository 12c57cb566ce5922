"""A rollout worker: what runs in the other process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..collect import Collector
from ..faults import TrainingFaults
from ..head import HeadConfig, SteeringHead
from ..latent_sac import SACConfig
from ..noise_bank import Keeper
from ..pairing import check_pair
from ..rollout import TaskConfig, VectorTask
from .parcels import Outbox, arrays, pack, tensors, unpack

if TYPE_CHECKING:
    from ..recipe import BaseConfig

_COUNTED = ("episodes", "env_steps", "decisions")


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker has to know once; plain data that any process can be sent."""

    base: BaseConfig
    task: TaskConfig
    head: HeadConfig
    keeper: Keeper
    sac: SACConfig
    first_seed: int
    workers: int
    threads: int
    max_faults: int
    gpus: float = 0.0


class _Noted(TrainingFaults):
    """Faults to be sent: the learner counts them all, says them, and says when there are too many."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.new: list[list[str]] = []

    def add(self, kind: str, words: str) -> None:
        """Note a fault. Raises TooManyFaultsError when one round has too many: it might never come to its end."""
        self.new.append([kind, words])
        self.counts[kind] += 1
        self.check(words)

    def set(self, counts: Mapping[str, int]) -> None:
        """As `Faults.set`: what a start that is undone has met is not sent."""
        super().set(counts)
        self.new.clear()

    def take(self) -> list[list[str]]:
        """The faults since this was last asked."""
        new, self.new = self.new, []
        self.counts.clear()
        return new


class RolloutWorker:
    """A base, environments, a copy of the head, and the collector that uses them.

    Worker w of W plays the episodes w, w + W, w + 2 W, … of the run.
    """

    def begin(self, spec: WorkerSpec, number: int, past: bytes) -> int:
        """Load and build everything; return the process's id.

        Args:
            number: of this worker, from 0.
            past: where to go on, from an earlier `round`; empty to begin.

        Raises:
            MismatchError: the base that the URI loads here is not the learner's. What `load_base` raises.
        """
        torch.set_num_threads(spec.threads)
        base = spec.base.load()
        check_pair(spec.head, base)
        self.head, self.outbox, self.faults = SteeringHead(spec.head), Outbox(), _Noted(spec.max_faults)
        self.collector = Collector(
            base,
            self.head,
            VectorTask(spec.task, base.spec.executed_steps),
            self.outbox,
            sac=spec.sac,
            first_seed=spec.first_seed + number,
            seed_step=spec.workers,
            keeper=spec.keeper,
            faults=self.faults,
        )
        self.sent = dict.fromkeys(_COUNTED, 0)
        if past:
            held = unpack(past)
            self.sent = {name: held["state"][name] for name in _COUNTED}
            self.outbox.observed = held["observed"]
            self.collector.resume(tensors(held["tensors"]), held["state"])
        return os.getpid()

    def round(self, order: bytes) -> bytes:
        """One decision in every environment, as ordered; what came of it."""
        asked, collector = unpack(order), self.collector
        self.head.load_state_dict(tensors(asked["head"]))
        collector.step(asked["warm_up"])
        counts = {name: getattr(collector, name) for name in _COUNTED}
        harvest: dict[str, Any] = {
            "counts": {name: count - self.sent[name] for name, count in counts.items()},
            "recent": list(collector.recent),
            "finished": [arrays(episode.tensors()) for episode in collector.finished],
            "writes": self.outbox.take(),
            "faults": self.faults.take(),
        }
        self.sent = counts
        collector.recent.clear()
        collector.finished.clear()
        return pack(harvest | {"past": self._past()})

    def _past(self) -> bytes:
        """All that another worker needs to go on in this one's place."""
        held = {"tensors": arrays(self.collector.tensors()), "state": self.collector.state()}
        return pack(held | {"observed": self.outbox.observed})
