"""What a recipe says about who collects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import at_least, bad


@dataclass(frozen=True)
class RolloutConfig:
    """Who collects, and how far ahead of the learner.

    A round is one decision in every environment of every worker. Round t is collected by the head as it is after the
    updates that rounds 0 to t - 1 - `ahead` are owed, never by an older or a newer one: what a run does is a function
    of its seed and not of who was faster.
    """

    backend: Literal["inline", "process", "ray"] = "inline"
    """inline: the learner's process, between its updates; process: processes of this machine; ray: Ray's workers."""
    workers: int = 1
    """Each has its own base, from the recipe's URI, and its own `task.num_envs` environments."""
    ahead: int = 1
    """Rounds that workers collect ahead: the bound on a head's staleness. With 0 they wait for the learner, and one
    worker does what inline does, bit for bit. Inline knows no other."""
    max_restarts: int = 3
    """Workers that may die, in a whole run; each is replaced, and its episodes are brought back."""
    gpus: float = 0.0
    """Of Ray's, for each worker: 0.25 lets four share one. A base on the CPU, or a remote one, needs none."""

    def __post_init__(self) -> None:
        at_least(1, self, "rollout", "workers")
        if self.workers > 1 and self.backend == "inline":
            raise bad("rollout.workers", "1 with rollout.backend inline", self.workers, "Choose process or ray.")
        at_least(0, self, "rollout", "ahead", "max_restarts", "gpus")
