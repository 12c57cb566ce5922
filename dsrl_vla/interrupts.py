"""Ctrl-C, SIGTERM and a terminal that is gone as a request: the decision under way is finished, and saved whole."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator

log = logging.getLogger(__name__)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


@contextlib.contextmanager
def stop_requests(at_once: bool = False) -> Iterator[threading.Event]:
    """Within this context the first signal sets the event; a second Ctrl-C interrupts at once.

    With `at_once` so does the first: a robot is not to move until its episode is over.

    Outside the main thread, where Python takes no signals, the event is never set.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, _: object) -> None:
        if at_once or (asked.is_set() and number == signal.SIGINT):
            raise KeyboardInterrupt
        asked.set()
        log.warning("stopping after this decision; Ctrl-C again stops at once, without saving.")

    heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup asks
    before = {number: signal.signal(number, ask) for number in heard}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
