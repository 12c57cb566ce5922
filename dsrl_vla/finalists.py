"""The best heads of a run, as they come, and which of them is kept in the end.

A validation of 100 episodes errs by some percent, so the best of many validations is partly the luckiest one. The best
few heads may therefore play again, on fresh episodes, before one is handed out.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .head import SteeringHead
from .run_dir import disk_errors
from .writing import Writing

FOLDER, BEST = "finalists", "best"


@dataclass(frozen=True)
class Finalist:
    """A head of the run and what its validations found, pooled."""

    env_steps: int
    """When it was validated first: what it is known by."""
    mean: float
    """Success, or return."""
    steps: float
    """Mean length of an episode; of two that succeed equally often the quicker is better."""
    episodes: int

    @property
    def rank(self) -> tuple[float, float]:
        """Higher is better."""
        return self.mean, -self.steps

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
        return len(self.ranked) < self.count or found.rank > self.ranked[-1].rank

    def add(self, found: Finalist, head: SteeringHead, write: Callable[[Path], None]) -> None:
        """Take in a head that `takes` lets in; `write` writes it, and what belongs to it, into a folder."""
        self.ranked = [each for each in self.ranked if each.env_steps != found.env_steps]  # a robot's run, resumed
        place = sum(each.rank >= found.rank for each in self.ranked)
        self.ranked.insert(place, found)
        if place == 0:
            self.head = head
            self.writing.attempt("best head", lambda: write(self.out / BEST))
        if self.count > 1:
            folder = self._folder(found)
            self.writing.attempt(f"finalist of step {found.env_steps}", lambda: write(folder))
        for worst in self.ranked[self.count :]:
            shutil.rmtree(self._folder(worst), ignore_errors=True)
            self.writing.lost.pop(f"finalist of step {worst.env_steps}", None)
        del self.ranked[self.count :]

    def settle(self, play: Callable[[SteeringHead], tuple[float, float, int]]) -> None:
        """Let the finalists play again, and move the best of them to ``best/``.

        Args:
            play: a head to the mean, the mean length and the number of its further episodes.
        """
        there = [each for each in self.ranked if self._folder(each).is_dir()]
        if len(there) < 2:
            return
        heads = {each.env_steps: SteeringHead.from_pretrained(self._folder(each)) for each in there}
        played = [each.and_again(*play(heads[each.env_steps])) for each in there]
        self.ranked = sorted(played, key=lambda each: each.rank, reverse=True)
        winner = self.ranked[0]
        self.head = heads[winner.env_steps]
        self.writing.attempt("best head", lambda: _replace(self.out / BEST, self._folder(winner)))

    def best_head(self) -> SteeringHead | None:
        """The best head; None when none has been validated."""
        folder = self.out / BEST
        if self.head is None and folder.is_dir():
            self.head = SteeringHead.from_pretrained(folder)
        return self.head

    def _folder(self, found: Finalist) -> Path:
        return self.out / FOLDER / str(found.env_steps)

    def to_json(self) -> list[dict[str, Any]]:
        """Best first."""
        return [asdict(each) for each in self.ranked]

    def from_json(self, rows: Sequence[dict[str, Any]]) -> None:
        """Undo `to_json`."""
        self.ranked = [Finalist(**row) for row in rows]


def _replace(folder: Path, source: Path) -> None:
    """Put a copy of a folder in the place of another."""
    with disk_errors(folder):
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(source, temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
