"""Random numbers for a batch that several processes may share.

What a row is dealt must not depend on how many processes there are. So each draws for the whole batch, from a
generator that is in the same state everywhere, and takes the rows that are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Share:
    """A generator, and which part of every batch is drawn from it."""

    generator: torch.Generator
    rank: int
    processes: int


Source = torch.Generator | Share | None


def normal(shape: Sequence[int], source: Source, device: torch.device | None = None) -> torch.Tensor:
    """Standard normal numbers; the first dimension counts rows of the batch."""
    return _draw(torch.randn, shape, source, device)


def uniform(shape: Sequence[int], source: Source, device: torch.device | None = None) -> torch.Tensor:
    """Numbers in [0, 1); the first dimension counts rows of the batch."""
    return _draw(torch.rand, shape, source, device)


def _draw(
    draw: Callable[..., torch.Tensor], shape: Sequence[int], source: Source, device: torch.device | None
) -> torch.Tensor:
    if not isinstance(source, Share):
        return draw(shape, generator=source, device=device)
    rows, *rest = shape
    everything = draw((rows * source.processes, *rest), generator=source.generator, device=device)
    return everything[source.rank * rows : (source.rank + 1) * rows]
