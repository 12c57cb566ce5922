"""Writing what a run leaves behind: a disk that is full does not end the run, and is not forgotten."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from .errors import DsrlError

log = logging.getLogger(__name__)
Write = Callable[[], Any]


class Writing:
    """Tries to write things, and remembers those that could not be written."""

    def __init__(self) -> None:
        self.lost: dict[str, tuple[Write, str]] = {}
        """What could not be written when it was last tried: how to, and why not."""

    def attempt(self, what: str, write: Write) -> None:
        """Write something, in place of what `what` named before; a failure is said, and kept in mind."""
        try:
            write()
            self.lost.pop(what, None)
        except (DsrlError, OSError) as error:
            self.lost[what] = write, str(error)
            log.warning("%s not written, going on without: %s", what, error)

    def again(self) -> dict[str, str]:
        """Try once more to write what could not be written; return what still cannot be, and why."""
        for what, (write, _) in list(self.lost.items()):
            self.attempt(what, write)
        return {what: why for what, (_, why) in self.lost.items()}
