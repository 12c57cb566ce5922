"""How the learner reaches a worker: a process of this machine, or an actor of Ray's. Either answers in turn."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, wait
from typing import Any, Protocol

from ..errors import WorkerLostError, missing_extra
from ..interrupts import ignore_terminal
from .worker import RolloutWorker, WorkerSpec

log = logging.getLogger(__name__)
_GRACE_S = 10.0
_here = RolloutWorker()
"""The worker of a worker process."""


class Link(Protocol):
    """One worker. Orders are carried out, and harvests taken, in the order they were posted in."""

    def post(self, order: bytes) -> None:
        """Give an order; returns at once."""

    def take(self) -> bytes:
        """Wait for the harvest of the oldest order that has not been taken.

        Raises:
            WorkerLostError: the worker has died. Whatever the worker itself raises.
        """

    def close(self) -> None:
        """End the worker."""


class ProcessLink:
    """A worker in a spawned process of this machine; it ends with its parent, however that ends."""

    def __init__(self, spec: WorkerSpec, number: int, past: bytes):
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_settle)
        self.pid: Future[int] = self.pool.submit(os.getpid)
        self.begun: Future[int] = self.pool.submit(_begin, spec, number, past)
        self.pending: deque[Future[bytes]] = deque()

    def post(self, order: bytes) -> None:
        """As `Link.post`."""
        with contextlib.suppress(BrokenExecutor):  # `take` says it
            self.pending.append(self.pool.submit(_round, order))

    def take(self) -> bytes:
        """As `Link.take`."""
        try:
            self.begun.result()
            if not self.pending:
                raise BrokenExecutor("its process was gone when it was given an order")
            return self.pending.popleft().result()
        except BrokenExecutor as error:
            words = str(error).rstrip(".")
            if not self.pid.done() or self.pid.exception():
                words += "; before it had begun: a script that trains with workers needs `if __name__ == '__main__':`"
            elif not self.begun.done() or self.begun.exception():
                words += f"; while it loaded base and environments (memory?): {error.__cause__ or 'no word from it'}"
            raise WorkerLostError(words) from error

    def close(self) -> None:
        """As `Link.close`; a worker that does not come to the end of its round is killed."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        posted: list[Future[Any]] = [self.begun, *self.pending]
        asked = [future for future in posted if not future.cancel()]  # `wait` does not take them for done
        if wait(asked, _GRACE_S).not_done:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid.result(), signal.SIGKILL)


def _settle() -> None:
    """Leave signals to the learner, which ends its workers when it is ready, and do not outlive it."""
    ignore_terminal()
    # Not SIG_IGN, which processes that are started from here would inherit.
    signal.signal(signal.SIGTERM, lambda *_: None)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _begin(spec: WorkerSpec, number: int, past: bytes) -> int:
    return _here.begin(spec, number, past)


def _round(order: bytes) -> bytes:
    return _here.round(order)


class RayLink:
    """A worker that is an actor of Ray's, on whichever machine Ray puts it."""

    def __init__(self, spec: WorkerSpec, number: int, past: bytes):
        self.ray = _ray()
        processors = self.ray.cluster_resources().get("CPU", 0)
        if number == processors:
            log.warning("Ray has %d processors for %d workers: the run waits until it has more.", number, spec.workers)
        if spec.gpus * spec.workers > (gpus := self.ray.cluster_resources().get("GPU", 0)) and number == 0:
            log.warning("Ray has %g GPUs for %d workers of %g: the run waits.", gpus, spec.workers, spec.gpus)
        self.actor = self.ray.remote(RolloutWorker).options(num_cpus=1, num_gpus=spec.gpus, max_restarts=0).remote()
        self.begun = self.actor.begin.remote(spec, number, past)
        self.pending: deque[Any] = deque()

    def post(self, order: bytes) -> None:
        """As `Link.post`."""
        self.pending.append(self.actor.round.remote(order))

    def take(self) -> bytes:
        """As `Link.take`."""
        errors = self.ray.exceptions
        try:
            self.ray.get(self.begun)
            return self.ray.get(self.pending.popleft())
        except errors.RayTaskError as error:  # what the worker itself raised
            raise error.cause from error
        except errors.RayError as error:  # it died, its node did, Ray's memory monitor killed it
            raise WorkerLostError(" ".join(str(error).split("\n\n")[0].split())) from error

    def close(self) -> None:
        """As `Link.close`."""
        self.ray.kill(self.actor)


def _ray() -> Any:
    """Ray, connected: to the cluster that RAY_ADDRESS names, or to one of its own on this machine."""
    try:
        import ray
    except ImportError as error:
        raise missing_extra("ray", "ray", "rollout.backend ray") from error
    if not ray.is_initialized():
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        ray.init(include_dashboard=False, log_to_driver=True)
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():  # Ray takes SIGTERM, which is the run's to save its state on
                signal.signal(number, handler)
    return ray


LINKS: dict[str, type[ProcessLink] | type[RayLink]] = {"process": ProcessLink, "ray": RayLink}
