"""An episode under way, and how it outlives its process.

A simulator's state is not saved: an episode is a function of its seed and of what was executed in it, so a resumed
run resets the environment with the seed and executes the same chunks again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from .episodes import episode_generators
from .n_step import Decision

Tensors = dict[str, torch.Tensor]


@dataclass
class UnderWay:
    """One environment's present episode."""

    seed: int
    stream: torch.Generator
    """Draws this episode's noise."""
    decisions: list[Decision] = field(default_factory=list)
    chunks: list[np.ndarray] = field(default_factory=list)
    """Executed so far, float32 (k, A) each."""

    @classmethod
    def begin(cls, seed: int) -> UnderWay:
        """The episode that `seed` names, before its first decision."""
        return cls(seed, episode_generators([seed])[0])

    def add(self, decision: Decision, chunk: np.ndarray) -> None:
        """Book a decision that has been executed."""
        self.decisions.append(decision)
        self.chunks.append(chunk)

    def tensors(self) -> Tensors:
        """Everything but the seed."""
        found = {"stream": self.stream.get_state()}
        if self.decisions:
            rows = [(d.number, d.reward, d.discount) for d in self.decisions]
            found |= {
                "decisions": torch.tensor(rows, dtype=torch.float64),
                "latents": torch.stack([d.latent for d in self.decisions]),
                "chunks": torch.from_numpy(np.stack(self.chunks)),
            }
        return found

    @classmethod
    def from_tensors(cls, seed: int, tensors: Mapping[str, torch.Tensor]) -> UnderWay:
        """Undo `tensors`."""
        made = cls.begin(seed)
        made.stream.set_state(tensors["stream"])
        if "decisions" in tensors:
            rows = zip(tensors["decisions"].tolist(), tensors["latents"], strict=True)
            made.decisions = [Decision(int(n), latent.clone(), r, d) for (n, r, d), latent in rows]
            made.chunks = list(tensors["chunks"].numpy())
        return made
