"""The processes that share the learner's updates: one, unless `accelerate launch` started more.

The first process leads: it collects, samples, validates and writes, as a lone one does. Of every batch each process
takes an equal part of the rows, and gradients are averaged before they are clipped. All have the same weights,
optimisers and generator, so all take the same step, which is the one that a lone process takes but for rounding.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch

from .draws import Share
from .errors import TeamLostError, bad, first_line
from .head import HeadConfig, SteeringHead
from .interrupts import ignore_terminal
from .latent_sac import Info, LatentSAC
from .replay import Batch
from .run_dir import part

_UPDATE, _STATE, _STOP = range(3)
_PATIENCE = timedelta(days=30)
"""A follower waits while its leader collects, validates or talks to an operator."""
Tensors = dict[str, torch.Tensor]


class Team:
    """A process on its own."""

    size = 1
    leads = True
    """Whether this is the process that collects and writes."""

    def agree(self, learner: LatentSAC) -> None:
        """Tell the others what the learner is: it has been made, fitted, loaded or set back."""

    def update(self, learner: LatentSAC, batch: Batch) -> Info:
        """One update on a batch; the means over all of it."""
        return learner.update(batch)

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing more will be updated."""


class LaunchedTeam(Team):
    """The processes of `accelerate launch`, or of torchrun."""

    def __init__(self) -> None:
        # Functions in it have the group there is at their import for a default, which would hold it beyond its end.
        importlib.import_module("torch.distributed.nn.functional")
        from accelerate import PartialState

        state = PartialState(cpu=True, timeout=_PATIENCE)
        self.rank, self.size = state.process_index, state.num_processes
        self.leads = self.rank == 0
        self._midway = False
        """Whether an exchange was left before its end: the others wait in it, and hear only that we are gone."""
        atexit.register(state.destroy_process_group)  # gloo aborts a process that ends while its threads run

    def agree(self, learner: LatentSAC) -> None:
        """As `Team.agree`.

        Raises:
            DsrlError: a batch that cannot be shared equally.
        """
        if learner.config.batch % self.size:
            raise bad("sac.batch", f"a multiple of the {self.size} processes", learner.config.batch)
        self._join(learner)
        about = f"{learner.updates} {learner.bounds[0]!r} {learner.bounds[1]!r}\n{learner.head.config.to_json()}"
        text = torch.frombuffer(bytearray(about.encode()), dtype=torch.uint8)
        self._midway = True
        self._tell(_STATE, {"about": text} | {f"learner.{k}": v for k, v in learner.tensors().items()})
        self._midway = False

    def update(self, learner: LatentSAC, batch: Batch) -> Info:
        """As `Team.update`."""
        self._midway = True
        self._tell(_UPDATE, batch.tensors())
        info = self._update(learner, batch)
        self._midway = False
        return info

    def __exit__(self, *_: object) -> None:
        if self.leads and not self._midway:
            self._tell(_STOP, {})

    def follow(self, build: Callable[[HeadConfig, tuple[float, float]], LatentSAC]) -> SteeringHead:
        """Take part in the leader's updates to their end; return the averaged head.

        Args:
            build: makes the run's learner for a head's config and value bounds.

        Raises:
            TeamLostError: the leader is gone.
        """
        if threading.current_thread() is threading.main_thread():
            ignore_terminal()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher tells the leader too
        learner: Any = None
        while True:
            what, held = self._hear()
            if what == _STOP:
                return learner.average.eval()
            if what == _UPDATE:
                self._update(learner, Batch.of(held))
                continue
            updates, bounds, config = _about(held)
            if learner is None:
                learner = build(config, bounds)
                self._join(learner)
            learner.load_tensors(part(held, "learner."), updates)

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        """Say whose absence it is that ends an exchange."""
        try:
            yield
        except RuntimeError as error:
            who, remedy = "the first process", "What it said last tells why."
            if self.leads:
                who = "every other process"
                remedy += " The run goes on from its last checkpoint, with --resume."
            raise TeamLostError(
                f"process {self.rank} of {self.size}: expected {who} to go on, got no word from it "
                f"({first_line(error)}). {remedy}"
            ) from error

    def _join(self, learner: LatentSAC) -> None:
        """Let the learner draw its part of what a whole batch is dealt, and average its gradients."""
        learner.draws = Share(learner.generator, self.rank, self.size)
        for flat in learner.flat.values():
            flat.mean = self._mean

    def _update(self, learner: LatentSAC, batch: Batch) -> Info:
        rows = len(batch.reward) // self.size
        info = learner.update(batch.rows(slice(self.rank * rows, (self.rank + 1) * rows)))
        return dict(zip(info, self._mean(torch.stack(list(info.values()))).unbind(), strict=True))

    def _mean(self, tensor: torch.Tensor) -> torch.Tensor:
        from accelerate.utils import reduce

        with self._exchange():
            return reduce(tensor, "mean")

    def _tell(self, what: int, held: Tensors) -> None:
        import safetensors.torch
        from accelerate.utils import broadcast

        data = safetensors.torch.save({k: v.detach().contiguous() for k, v in held.items()})
        with self._exchange():
            broadcast(torch.tensor([what, len(data)]))
            broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def _hear(self) -> tuple[int, Tensors]:
        import safetensors.torch
        from accelerate.utils import broadcast

        with self._exchange():
            what, length = broadcast(torch.zeros(2, dtype=torch.int64)).tolist()
            data = broadcast(torch.zeros(length, dtype=torch.uint8))
        return what, safetensors.torch.load(data.numpy().tobytes())


def join_team() -> Team:
    """The team of this process, as the launcher that started it says."""
    return LaunchedTeam() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Team()


def _about(held: Tensors) -> tuple[int, tuple[float, float], HeadConfig]:
    """Updates, value bounds and head config of a learner."""
    line, config = bytes(held["about"].tolist()).decode().split("\n", 1)
    updates, low, high = line.split()
    return int(updates), (float(low), float(high)), HeadConfig.from_json(config)
