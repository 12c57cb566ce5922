"""A fixed control rate, and an account of the steps that missed it."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..errors import bad


class Pacer:
    """Ticks every 1 / fps seconds. A tick that comes late is counted, and the next is timed from it."""

    def __init__(
        self,
        fps: float,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ):
        if not fps > 0:
            raise bad("fps", "a positive rate", fps)
        self.period, self.clock, self.sleep = 1.0 / fps, clock, sleep
        self.ticks = self.late = 0
        self.pauses = 0
        self.paused = self.longest = 0.0
        self._due: float | None = None
        self._last: float | None = None

    def start(self) -> None:
        """Begin anew from now. The time since the last tick was a pause (the base was thinking), not a late step."""
        now = self.clock()
        if self._last is not None:
            self.pauses += 1
            self.paused += now - self._last
            self.longest = max(self.longest, now - self._last)
        self._due = now + self.period

    def idle(self) -> None:
        """What follows, until `start`, is no pause: an episode is over."""
        self._last = None

    def wait(self) -> None:
        """Sleep until the next tick."""
        now = self.clock()
        due = self._due if self._due is not None else now + self.period
        self.ticks += 1
        if now > due:
            self.late += 1
            due = now
        else:
            self.sleep(due - now)
        self._due, self._last = due + self.period, self.clock()

    def report(self) -> dict[str, float]:
        """``ticks``, ``late`` and the ``pauses`` between chunks: count, mean and greatest, in seconds."""
        mean = self.paused / self.pauses if self.pauses else 0.0
        return {
            "ticks": self.ticks,
            "late": self.late,
            "pauses": self.pauses,
            "mean_pause_s": round(mean, 4),
            "longest_pause_s": round(self.longest, 4),
        }
