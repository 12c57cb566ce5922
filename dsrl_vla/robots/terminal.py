"""An operator at a terminal: single keys, also over ssh, with no display needed.

=====  ===================================================
s      success: the episode ends
f      failure: the episode ends, and nothing more is to be had
a      call it off, keep it as far as it went
d      call it off, discard it
r      call it off, play it again
t      take over, and give back
=====  ===================================================
"""

from __future__ import annotations

import os
import select
import sys
from typing import TextIO

from ..errors import bad
from ..tasks.live import Ending
from .operators import Operator, Said

KEYS = {"s": Ending.SUCCESS, "f": Ending.FAILURE, "a": Ending.CUT, "d": Ending.DISCARD, "r": Ending.REDO}
TAKE_OVER_KEY = "t"
HELP = "s success, f failure, a call off and keep, d discard, r redo, t take over / give back, Ctrl-C stop"


class TerminalOperator(Operator):
    """Reads keys from a terminal as they are pressed.

    Raises:
        DsrlError: standard input is no terminal.
    """

    def __init__(self, stream: TextIO | None = None):
        stream = stream or sys.stdin
        try:
            import termios
            import tty

            self.number = stream.fileno()
            self.before = termios.tcgetattr(self.number)
            tty.setcbreak(self.number)  # keys at once, and Ctrl-C still interrupts
        except Exception as error:
            raise bad(
                "operator: terminal",
                "a terminal to read keys from",
                f"{type(error).__name__}: {error}",
                "Run in a terminal (ssh -t, docker -it), or set operator: none, with a reward and a reset of code.",
            ) from error
        self.human = False

    def _keys(self, wait: float | None = 0.0) -> str:
        """What has been typed; waits as long for the first key, for ever with None."""
        if not select.select([self.number], [], [], wait)[0]:
            return ""
        return os.read(self.number, 1024).decode(errors="ignore")

    def hear(self) -> Said:
        ending = None
        for key in self._keys():
            if key == TAKE_OVER_KEY:
                self.human = not self.human
            ending = KEYS.get(key, ending)
        return Said(ending, self.human)

    def ready(self, message: str) -> None:
        self._keys()
        print(f"{message} Then press Enter. ({HELP})", flush=True)
        while not set(self._keys(None)) & {"\n", "\r"}:
            pass
        self.human = False

    def close(self) -> None:
        import termios

        termios.tcsetattr(self.number, termios.TCSADRAIN, self.before)
