"""Ctrl-C, SIGTERM and a terminal that is gone as a request: the decision under way is finished, and saved whole."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterable, Iterator

log = logging.getLogger(__name__)
_PATIENCE = 3
_TERMINAL = (signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
"""What a terminal sends to all processes that were started from it."""
_SIGNALS = (*_TERMINAL, signal.SIGTERM)


def ignore_terminal() -> None:
    """In a process that helps another: the other hears the terminal too, and says when to stop."""
    _ignore(_TERMINAL)


def ignore_requests() -> None:
    """The same of SIGTERM, too, which a scheduler sends to all processes of a job: this one is killed, if need be."""
    _ignore(_SIGNALS)


def _ignore(numbers: Iterable[int]) -> None:
    if threading.current_thread() is threading.main_thread():  # outside it Python sets none
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def stop_requests(at_once: bool = False) -> Iterator[threading.Event]:
    """Within this context the first signal sets the event; a second Ctrl-C interrupts at once.

    With `at_once` so does the first: a robot is not to move until its episode is over.

    Outside the main thread, where Python takes no signals, the event is never set.
    """
    asked = threading.Event()

    def ask(number: int, _: object) -> None:
        if at_once or (asked.is_set() and number == signal.SIGINT):
            raise KeyboardInterrupt
        asked.set()
        log.warning("stopping after this decision; Ctrl-C again stops at once, without saving.")

    with _heard_by(ask):
        yield asked


@contextlib.contextmanager
def undisturbed(what: str) -> Iterator[threading.Event]:
    """Within this context signals are told `what` is going on, and set the event; each from the third on interrupts,
    for what hangs is to end some time."""
    count, told = 0, threading.Event()

    def tell(*_: object) -> None:
        nonlocal count
        count += 1
        told.set()
        log.warning("%s.", what)
        if count >= _PATIENCE:
            raise KeyboardInterrupt

    with _heard_by(tell):
        yield told


@contextlib.contextmanager
def _heard_by(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Signals go to `handler`, in the main thread: outside it Python takes none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup asks
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
