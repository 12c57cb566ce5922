"""The best heads of a run, as they come, and which of them is kept in the end.

A validation of 100 episodes errs by some percent, so the best of many validations is partly the luckiest one. The best
few heads may therefore play again, on fresh episodes, before one is handed out.

What is on the disk is always whole: a head is written before ``finalists.json`` names it, and removed after.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import DsrlError
from .head import SteeringHead
from .plain import from_plain, read_object
from .run_dir import copy_files, write_json
from .writing import Writing

log = logging.getLogger(__name__)
HEADS, BEST, LIST = "finalists", "best", "finalists.json"


@dataclass(frozen=True)
class Finalist:
    """A head of the run and what its validations found, pooled."""

    env_steps: int
    """When it was validated first: what it is known by."""
    mean: float
    """Success, or return."""
    steps: float
    """Mean length of an episode; of two that succeed equally often the quicker is better, and then the earlier."""
    episodes: int

    @property
    def rank(self) -> tuple[float, float, int]:
        """Higher is better."""
        return self.mean, -self.steps, -self.env_steps

    def and_again(self, mean: float, steps: float, episodes: int) -> Finalist:
        """With the outcome of further episodes."""
        total = self.episodes + episodes
        pool = lambda old, new: (old * self.episodes + new * episodes) / total
        return Finalist(self.env_steps, pool(self.mean, mean), pool(self.steps, steps), total)


class Finalists:
    """Keeps the best head in ``best/``, and the best `count`, if more than one, in ``finalists/<env_steps>/``."""

    def __init__(self, out: Path, count: int, writing: Writing):
        self.out, self.count, self.writing = out, count, writing
        self.ranked: list[Finalist] = []
        """Best first."""
        self.head: SteeringHead | None = None
        """The best one, when this process has seen it."""

    @property
    def best(self) -> float:
        """What the best head so far did; -inf before the first validation."""
        return self.ranked[0].mean if self.ranked else -math.inf

    def takes(self, found: Finalist) -> bool:
        """Whether a validated head is among the best."""
        among = len(self.ranked) < self.count or found.rank > self.ranked[-1].rank
        return math.isfinite(found.mean) and among

    def add(self, found: Finalist, head: SteeringHead, write: Callable[[Path], None]) -> None:
        """Take in a head that `takes` lets in; `write` writes it, and what belongs to it, into a folder."""
        others = [each for each in self.ranked if each.env_steps != found.env_steps]
        ranked = sorted([*others, found], key=lambda each: each.rank, reverse=True)
        self.ranked, gone = ranked[: self.count], ranked[self.count :]
        if self.ranked[0] is found:
            self.head = head
        self.writing.attempt(_named(found), lambda: self._write(found, write))
        for each in gone:
            self.writing.lost.pop(_named(each), None)
            shutil.rmtree(self._folder(each), ignore_errors=True)

    def _write(self, found: Finalist, write: Callable[[Path], None]) -> None:
        if self.count > 1:
            write(self._folder(found))
        if self.ranked[0] is found:
            write(self.out / BEST)
        write_json(self.out / LIST, {"finalists": self.to_json()})

    def load(self) -> None:
        """The heads that a run which is resumed has found so far."""
        if (self.out / LIST).exists():
            rows = read_object(self.out / LIST).get("finalists", [])
            ranked = [from_plain(Finalist, row, LIST, "field") for row in rows]
            self.ranked = [each for each in ranked if self.count == 1 or self._folder(each).is_dir()]

    def settle(self, play: Callable[[SteeringHead], tuple[float, float, int]]) -> None:
        """Let the finalists play again, and move the best of them to ``best/``. One that cannot be read does not play.

        Args:
            play: a head to the mean, the mean length and the number of its further episodes.
        """
        heads: dict[int, SteeringHead] = {}
        for each in self.ranked:
            try:
                heads[each.env_steps] = SteeringHead.from_pretrained(self._folder(each))
            except DsrlError as error:
                log.warning("the head of step %d does not play again: %s", each.env_steps, error)
        there = [each for each in self.ranked if each.env_steps in heads]
        if len(there) < 2:
            return
        played = [each.and_again(*play(heads[each.env_steps])) for each in there]
        self.ranked = sorted(played, key=lambda each: each.rank, reverse=True)
        winner = self.ranked[0]
        self.head = heads[winner.env_steps]
        self.writing.attempt("best head", lambda: copy_files(self._folder(winner), self.out / BEST))

    def best_head(self) -> SteeringHead | None:
        """The best head; None when none has been validated."""
        folder = self.out / BEST
        if self.head is None and folder.is_dir():
            self.head = SteeringHead.from_pretrained(folder)
        return self.head

    def _folder(self, found: Finalist) -> Path:
        return self.out / HEADS / str(found.env_steps)

    def to_json(self) -> list[dict[str, Any]]:
        """Best first."""
        return [asdict(each) for each in self.ranked]


def _named(found: Finalist) -> str:
    return f"head of step {found.env_steps}"
