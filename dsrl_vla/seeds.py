"""Where seeds come from: disjoint ranges, so that nothing is tuned or trained on what is measured.

One seed is one episode: its initial state, and the noise drawn in it.
"""

from __future__ import annotations

from .errors import bad

DEMONSTRATIONS = 100_000
VALIDATION = 200_000
"""Episodes that choose the best head during training."""
EVALUATION = 300_000
"""Episodes behind every published number."""
PREFLIGHT = 400_000
SEARCH = 500_000
"""Episodes on which constant noises are compared."""
RECORDING = 600_000
"""Episodes recorded as offline data."""
TRAINING = 1_000_000
"""Training run s uses TRAINING * (1 + s) and on."""


def block(first: int, count: int) -> list[int]:
    """`count` seeds from `first` on. Raises DsrlError when that is none."""
    if count < 1:
        raise bad("episodes", "1 or more", count)
    return list(range(first, first + count))
