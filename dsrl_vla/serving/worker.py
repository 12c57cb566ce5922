"""The one thread that runs the base, so that the network never waits for it; decisions that queue up share a pass."""

from __future__ import annotations

import logging
import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field

from .requests import Infer, Request
from .service import Handles, Reply, Service, batch_key

log = logging.getLogger(__name__)


@dataclass
class _Job:
    request: Request
    handles: Handles
    future: Future[Reply] = field(default_factory=Future)


class Worker:
    """Carries out requests one after the other, `max_batch` decisions at most at a time.

    Whatever has queued up while the base was busy goes together; nothing waits for company.
    """

    def __init__(self, service: Service, max_batch: int):
        self.service, self.max_batch = service, max_batch
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._aside: _Job | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="policy-worker", daemon=True)
        self._thread.start()

    def submit(self, request: Request, handles: Handles) -> Future[Reply]:
        """Queue a request; the future holds its reply, or what the service raised."""
        job = _Job(request, handles)
        self._jobs.put(job)
        return job.future

    def close(self) -> None:
        """Finish what is running, and drop what is queued."""
        self._stopping = True
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while not self._stopping:
            job = self._aside or self._jobs.get()
            self._aside = None
            if job is None:
                break
            together = [job, *self._company(job)]
            running = [each for each in together if each.future.set_running_or_notify_cancel()]
            if running:
                self._run(running)

    def _company(self, job: _Job) -> list[_Job]:
        """Queued jobs that can share a prefix pass with this one; the first that cannot is next."""
        found: list[_Job] = []
        key = batch_key(job.request)
        while key is not None and len(found) + 1 < self.max_batch:
            try:
                other = self._jobs.get_nowait()
            except queue.Empty:
                break
            if other is None or batch_key(other.request) != key:
                self._aside, self._stopping = other, self._stopping or other is None
                break
            found.append(other)
        return found

    def _run(self, jobs: list[_Job]) -> None:
        if len(jobs) > 1 and self._run_together(jobs):
            return
        for job in jobs:
            try:
                job.future.set_result(self.service.run(job.request, job.handles))
            except Exception as error:
                job.future.set_exception(error)

    def _run_together(self, jobs: list[_Job]) -> bool:
        """False when that failed: then each goes alone, so that one client's trouble is not everybody's."""
        try:
            replies = self.service.infer([job.request for job in jobs if isinstance(job.request, Infer)])
        except Exception:
            log.exception("a batch of %d decisions failed; each is run alone", len(jobs))
            return False
        for job, reply in zip(jobs, replies, strict=True):
            job.future.set_result(reply)
        return True
