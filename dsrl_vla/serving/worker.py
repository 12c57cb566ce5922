"""The one thread that runs the base, so that the network never waits for it; decisions that queue up share a pass."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

from ..errors import DsrlError
from .requests import Infer, Request
from .service import Reply, Service, Session, batch_key

log = logging.getLogger(__name__)
_GRACE_S = 10.0
"""For what is running when the server stops."""


@dataclass
class _Job:
    request: Request
    session: Session
    future: Future[Reply] = field(default_factory=Future)


class Worker:
    """Carries out requests one after the other, up to `max_batch` decisions at a time.

    Whatever has queued up while the base was busy goes together; nothing waits for company. The sizes of batches are
    powers of two, so that a base that compiles for each size compiles few, all of them while warming up.
    """

    def __init__(self, service: Service, max_batch: int):
        self.service, self.sizes = service, batch_sizes(max_batch)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._waiting: deque[_Job] = deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="policy-worker", daemon=True)
        self._thread.start()

    def submit(self, request: Request, session: Session) -> Future[Reply]:
        """Queue a request; the future holds its reply, or what the service raised."""
        job = _Job(request, session)
        self._jobs.put(job)
        return job.future

    def close(self) -> None:
        """Finish what is running, and drop what is queued. A base that hangs is left behind."""
        self._stopping = True
        self._jobs.put(None)
        self._thread.join(_GRACE_S)
        if self._thread.is_alive():
            log.warning("the base is still busy after %g s, and is left behind", _GRACE_S)

    def _work(self) -> None:
        while not self._stopping:
            self._fetch()
            running = [job for job in self._next() if job.future.set_running_or_notify_cancel()]
            while running:  # in one go, unless one has been called off just now
                size = max(size for size in self.sizes if size <= len(running))
                self._run(running[:size])
                running = running[size:]

    def _fetch(self) -> None:
        """Take over what has queued up; when there is nothing to do at all, wait."""
        while not self._stopping:
            try:
                job = self._jobs.get(block=not self._waiting)
            except queue.Empty:
                return
            if job is None:
                self._stopping = True
            else:
                self._waiting.append(job)

    def _next(self) -> list[_Job]:
        """The jobs whose turn it is: the first, and those behind it that can share its prefix pass."""
        self._waiting = deque(job for job in self._waiting if not job.future.cancelled())
        if self._stopping or not self._waiting:
            return []
        key = batch_key(self._waiting[0].request)
        if key is None:
            return [self._waiting.popleft()]
        same = itertools.takewhile(lambda job: batch_key(job.request) == key, self._waiting)
        count = len(list(itertools.islice(same, self.sizes[-1])))
        return [self._waiting.popleft() for _ in range(max(size for size in self.sizes if size <= count))]

    def _run(self, jobs: list[_Job]) -> None:
        if len(jobs) > 1 and self._run_together(jobs):
            return
        for job in jobs:
            try:
                job.future.set_result(self.service.run(job.request, job.session))
            except Exception as error:
                job.future.set_exception(error)

    def _run_together(self, jobs: list[_Job]) -> bool:
        """False when that failed: then each goes alone, so that one client's trouble is not everybody's."""
        try:
            requests = [job.request for job in jobs if isinstance(job.request, Infer)]
            replies = self.service.infer(requests, [job.session for job in jobs])
        except Exception:
            log.exception("a batch of %d decisions failed; each is run alone", len(jobs))
            return False
        for job, reply in zip(jobs, replies, strict=True):
            if isinstance(reply, DsrlError):
                job.future.set_exception(reply)
            else:
                job.future.set_result(reply)
        return True


def batch_sizes(greatest: int) -> list[int]:
    """1, 2, 4 … up to `greatest`."""
    return [2**power for power in range(greatest.bit_length()) if 2**power <= greatest]
