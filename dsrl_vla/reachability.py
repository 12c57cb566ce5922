"""Can this base do what these episodes show? Asked of data alone: nothing moves, and nothing is learnt.

Of every decision in them the noise that comes nearest is looked for (`dsrl_vla.inversion`), in every layout and bound.
Where it comes no nearer than chance, there is nothing for ``sac.imitate`` to imitate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .errors import bad
from .inversion import FAR, FAR_WORDS, check_layout, invert
from .noise import NoiseLayout
from .offline import (
    AT_A_TIME,
    OfflineEpisode,
    check_episode,
    decision_streams,
    demonstrations,
    episode_chunks,
    episode_rows,
)
from .policy import FrozenPolicy

_QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class Reachability:
    """What was found in a layout."""

    layout: NoiseLayout
    reach: np.ndarray
    """(decisions,), from 0 to 1: see `dsrl_vla.inversion.Inverted`."""

    @property
    def mean(self) -> float:
        """Over all decisions."""
        return float(self.reach.mean())

    def to_json(self) -> dict[str, Any]:
        """What reach.json holds of it."""
        quantiles = np.quantile(self.reach, _QUANTILES).round(4).tolist()
        named = dict(zip((f"{q:g}" for q in _QUANTILES), quantiles, strict=True))
        layout = self.layout
        return {"layout": layout.name, "bound": layout.bound, "reach": round(self.mean, 4), "quantiles": named}


def reachability(
    base: FrozenPolicy,
    layouts: list[NoiseLayout],
    episodes: Iterable[OfflineEpisode],
    on_episode: Callable[[], None] = lambda: None,
) -> list[Reachability]:
    """How near noise in each layout comes to what was done in the episodes; their rewards play no part.

    Raises:
        DsrlError: a layout of more numbers than are searched; no episode; one that does not fit the base.
    """
    for layout in layouts:
        check_layout(layout)
    found: list[list[torch.Tensor]] = [[] for _ in layouts]
    for number, episode in enumerate(map(demonstrations, episodes)):
        length = check_episode(episode, number, base)
        decisions = np.arange(0, length, base.spec.executed_steps)
        for at in range(0, len(decisions), AT_A_TIME):
            starts = decisions[at : at + AT_A_TIME]
            chunk, steps = episode_chunks(episode, starts, base.spec.executed_steps)
            encoding = base.encode(episode_rows(episode, starts))
            for reach, layout in zip(found, layouts, strict=True):
                streams = decision_streams(number, starts)
                reach.append(invert(base, encoding, layout, chunk, torch.from_numpy(steps), streams).reach)
        on_episode()
    if not found[0]:
        raise bad("reach", "data with episodes", "none")
    return [Reachability(layout, torch.cat(each).numpy()) for layout, each in zip(layouts, found, strict=True)]


def verdict(found: list[Reachability]) -> str:
    """In words."""
    best = max(found, key=lambda each: each.mean)
    how = (
        f"'{best.layout.name}' within {best.layout.bound:g} takes away {best.mean:.0%} of what separates random noise"
    )
    if best.mean < FAR:
        return f"{how} from what was done: {FAR_WORDS}, and there is little to imitate."
    return f"{how} from what was done. What more numbers win is partly the demonstrator's unsteadiness."
