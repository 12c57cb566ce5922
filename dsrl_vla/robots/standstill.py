"""Who lets go of the wheel: a velocity stays in force while a base is thinking, or a server does not answer."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)


class Standstill:
    """Calls `stop`, from a thread of its own, once nobody has called `moving` for so many seconds.

    `stop` is called again only after the next `moving`, or if it fails, which is logged.

    Args:
        lock: held by whoever commands the robot, and while `stop` is called: so that no fresh command is cancelled.
    """

    def __init__(self, seconds: float, stop: Callable[[], None], lock: threading.RLock):
        self.seconds, self.stop = seconds, stop
        self._due: float | None = None
        self._closed = False
        self._changed = threading.Condition(lock)
        threading.Thread(target=self._watch, name="standstill", daemon=True).start()

    def moving(self) -> None:
        """A command has been sent; the next is expected in time."""
        with self._changed:
            if self._due is None:
                self._changed.notify()
            self._due = time.monotonic() + self.seconds

    def resting(self) -> None:
        """The robot stands still: nothing is expected."""
        with self._changed:
            self._due = None

    def close(self) -> None:
        """End the thread: `stop` is not called any more."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                left = None if self._due is None else self._due - time.monotonic()
                if left is None or left > 0:
                    self._changed.wait(left)
                    continue
                log.warning("no command for %g s: the robot is told to stand still until the next", self.seconds)
                try:
                    self.stop()
                    self._due = None
                except Exception:
                    log.exception("the robot could not be told to stand still; it is tried again")
                    self._due = time.monotonic() + self.seconds
