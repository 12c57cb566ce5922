"""n-step returns: what joins the decisions of an episode into transitions.

One decision bootstraps the next. Where an observation does not tell a robot that is stuck from one about to
succeed (a drawer that only the image shows, a slipping grasp), one-step targets pay for the success of the one
in the state of the other, over and over: the value of being stuck never falls. Returns over n decisions
contain what really followed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Decision:
    """One executed decision of one environment."""

    number: int
    """Of its observation in the replay."""
    latent: torch.Tensor
    """(n, d)."""
    reward: float
    """Discounted inside the chunk."""
    discount: float
    """gamma^k; 0 where the episode terminated."""


Add = Callable[[np.ndarray, torch.Tensor, np.ndarray, np.ndarray, np.ndarray], None]


class NStepWindows:
    """The newest decisions of every environment that have not yet become a transition.

    Args:
        n: decisions per return. 1 is the plain transition.
        add: where transitions go, `Replay.add`.
    """

    def __init__(self, n: int, num_envs: int, add: Add):
        self.n, self.add = n, add
        self.windows: list[deque[Decision]] = [deque() for _ in range(num_envs)]

    def push(self, row: int, decision: Decision) -> None:
        """Append the decision that environment `row` has just executed."""
        self.windows[row].append(decision)

    def observed(self, rows: np.ndarray, numbers: np.ndarray) -> None:
        """The observations that follow the newest decisions: windows of full length become transitions."""
        full = [i for i, row in enumerate(rows) if len(self.windows[row]) == self.n]
        self._emit([list(self.windows[rows[i]]) for i in full], [int(numbers[i]) for i in full])
        for i in full:
            self.windows[rows[i]].popleft()

    def terminated(self, row: int) -> None:
        """The episode ended for good: every start left has its whole return. Nothing is bootstrapped."""
        window = self._take(row)
        self._emit([window[i:] for i in range(len(window))], [d.number for d in window])

    def truncated(self, row: int, number: int) -> None:
        """The episode was cut off at observation `number`: the starts left bootstrap from there, sooner than others.

        Leaving them out would show late states only in episodes that succeed, and so overrate them.
        """
        window = self._take(row)
        self._emit([window[i:] for i in range(len(window))], [number] * len(window))

    def drop(self, row: int) -> None:
        """Forget what has not become a transition yet: something in the episode cannot be learnt from."""
        self.windows[row].clear()

    def _take(self, row: int) -> list[Decision]:
        window = list(self.windows[row])
        self.windows[row].clear()
        return window

    def _emit(self, windows: list[list[Decision]], then: list[int]) -> None:
        if not windows:
            return
        starts = [window[0] for window in windows]
        returns = [total(window) for window in windows]
        self.add(
            np.array([d.number for d in starts]),
            torch.stack([d.latent for d in starts]),
            np.array([r for r, _ in returns]),
            np.array([d for _, d in returns]),
            np.array(then),
        )


def total(window: list[Decision]) -> tuple[float, float]:
    """(R, discount) of a window: R = r_0 + d_0 r_1 + d_0 d_1 r_2 + …, discount = d_0 d_1 …"""
    reward, discount = 0.0, 1.0
    for decision in window:
        reward += discount * decision.reward
        discount *= decision.discount
    return reward, discount
