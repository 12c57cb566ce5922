"""What counts on a task: the share of episodes that succeed or, where nothing is a success, their return.

A measure is written as ``{<its name>: mean, "ci95": [low, high], "mean_steps"}``, and read by that name.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .episodes import Episode

_Z = NormalDist().inv_cdf(0.975)


def wilson(successes: int, episodes: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a success rate."""
    if episodes == 0:
        return 0.0, 1.0
    p, z2 = successes / episodes, _Z**2 / episodes
    centre, half = p + z2 / 2, _Z * math.sqrt(p * (1 - p) / episodes + z2 / (4 * episodes))
    return max(0.0, (centre - half) / (1 + z2)), min(1.0, (centre + half) / (1 + z2))


def newcombe(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """Newcombe's 95 % interval of the paired difference of two success rates, of (N,) scores of 0 and 1.

    Unlike a bootstrap's it has a width also where all pairs agree. Source: Newcombe, Statistics in Medicine 17 (1998)
    2635, method 10: Wilson's intervals, squared and added, less what the pairs share.
    """
    n, both, one, other = len(before), (before * after).sum(), before.sum(), after.sum()
    product = one * (n - one) * other * (n - other)
    shared = both * (n - one - other + both) - (other - both) * (one - both)
    shared = max(shared - n / 2, 0.0) if shared > 0 else shared
    phi = shared / math.sqrt(product) if product else 0.0
    (low1, high1), (low2, high2) = wilson(int(one), n), wilson(int(other), n)
    p1, p2 = one / n, other / n
    width = lambda a, b: math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))
    return float(p2 - p1 - width(p2 - low2, high1 - p1)), float(p2 - p1 + width(high2 - p2, p1 - low1))


def bootstrap(scores: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of (N,) scores."""
    rng = np.random.default_rng(0)
    draw = lambda: scores[rng.integers(0, len(scores), (100, len(scores)))].mean(1)  # in portions, for long runs
    low, high = np.quantile(np.concatenate([draw() for _ in range(100)]), (0.025, 0.975))
    return float(low), float(high)


class Yardstick(abc.ABC):
    """One way of measuring."""

    name: str
    interval_name: str
    search: str
    """How to find a layout and bound that can be steered."""
    overrated: str
    """What a critic promises too much of."""

    @abc.abstractmethod
    def digits(self, about: float) -> int:
        """Behind the point, to write numbers of about this size with."""

    @abc.abstractmethod
    def kept(self, end: float) -> float:
        """An interval's end, rounded to be written down."""

    @abc.abstractmethod
    def score(self, episode: Episode) -> float:
        """Of one episode; more is better."""

    @abc.abstractmethod
    def interval(self, scores: np.ndarray) -> tuple[float, float]:
        """95 % interval of the mean of (N,) scores."""

    def gain(self, before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
        """95 % interval of the mean of `after` less `before`, (N,) scores of the same episodes."""
        return bootstrap(after - before)

    @abc.abstractmethod
    def slack(self, best: float, episodes: int) -> float:
        """How far below `best` a validation of so many episodes may lie without being news."""

    @abc.abstractmethod
    def risen(self, best: float, first: float) -> bool:
        """Whether the best validation says that something was learnt since the first."""


class Success(Yardstick):
    """The share of episodes that succeed."""

    name, interval_name = "success", "Wilson"
    search = "Run `dsrl-vla preflight`: another layout or bound may be steerable where this one is not."
    overrated = "states the robot is stuck in"

    def digits(self, about):
        return 2

    def kept(self, end):
        return round(end, 4)

    def score(self, episode):
        return float(episode.success)

    def interval(self, scores):
        return wilson(int(scores.sum()), len(scores))

    def gain(self, before, after):
        return newcombe(before, after)

    def slack(self, best, episodes):
        return max(0.15, 2 * math.sqrt(2 * max(best * (1 - best), 0.5 / episodes) / episodes))

    def risen(self, best, first):
        return best > first + 0.05 or best >= 0.9


def _magnitude(number: float) -> int:
    """Which power of ten a number begins with; 2 for zero and what is not finite."""
    return math.floor(math.log10(abs(number))) if number and math.isfinite(number) else 2


class Return(Yardstick):
    """The sum of an episode's rewards."""

    name, interval_name = "return", "bootstrap"
    search = "Set noise.layout and noise.bound in the recipe, and compare their runs."
    overrated = "what is still to come"

    def digits(self, about):
        return max(0, 2 - _magnitude(about))

    def kept(self, end):
        return round(end, max(1, 5 - _magnitude(end)))

    def score(self, episode):
        return episode.reward

    def interval(self, scores):
        return bootstrap(scores)

    def slack(self, best, episodes):
        return 0.25 * abs(best)

    def risen(self, best, first):
        return best > first + 0.05 * abs(first)


YARDSTICKS: Mapping[str, Yardstick] = {y.name: y for y in (Success(), Return())}


def yardstick(measure: Mapping[str, Any]) -> Yardstick:
    """The one that a written measure was made with."""
    return next(y for name, y in YARDSTICKS.items() if name in measure)


def value(measure: Mapping[str, Any]) -> float:
    """The mean of a written measure."""
    return measure[yardstick(measure).name]


def shown(measure: Mapping[str, Any]) -> tuple[str, str]:
    """A written measure's mean and interval, in words."""
    low, high = measure["ci95"]
    digits = yardstick(measure).digits(max(abs(low), abs(high)))
    return f"{value(measure):.{digits}f}", f"[{low:.{digits}f}, {high:.{digits}f}]"


def shown_gain(result: Mapping[str, Any]) -> tuple[str, str]:
    """The paired difference of a written evaluation and its interval, in words."""
    gain = result["difference"]
    low, high = gain["ci95"]
    digits = yardstick(result["base"]).digits(max(abs(low), abs(high)))
    return f"{gain['mean']:+.{digits}f}", f"[{low:+.{digits}f}, {high:+.{digits}f}]"
