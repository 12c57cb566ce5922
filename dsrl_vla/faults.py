"""What a run survives, and for how long: losses, rewards, observations and actions that are not finite.

Each is skipped, counted and said. Past a limit the run stops: then it is no accident, and going on would only bury
the last good checkpoint.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

import numpy as np
import torch

from .errors import DsrlError
from .failsafe import finite
from .latent_sac import LatentSAC
from .observation import STATE, Observations

log = logging.getLogger(__name__)


class TooManyFaultsError(DsrlError):
    """A run met more that is not finite than it is told to skip."""


class Faults:
    """Counts faults by kind."""

    def __init__(self, limit: int = 20):
        self.limit = limit
        self.counts: Counter[str] = Counter()

    @property
    def remedy(self) -> str:
        """What to do once there are too many."""
        return ""

    def add(self, kind: str, words: str) -> None:
        """Book a fault.

        Raises:
            TooManyFaultsError: it is the one too many.
        """
        self.counts[kind] += 1
        self.check(words)
        log.warning("fault %d, skipped; %d end the run: %s", self.counts.total(), self.limit, words)

    def set(self, counts: Mapping[str, int]) -> None:
        """As many as there were."""
        self.counts.clear()
        self.counts.update(counts)

    def check(self, words: str) -> None:
        """Raise TooManyFaultsError if there are; `words` tell of the last."""
        if self.counts.total() >= self.limit:
            found = ", ".join(f"{count} x {name}" for name, count in self.counts.items())
            raise TooManyFaultsError(
                f"expected finite losses, rewards, observations and actions, got {found}; the last: {words}."
                + (f" {self.remedy}" if self.remedy else "")
            )


class TrainingFaults(Faults):
    """Of a training run, which allows as many as ``train.max_faults``."""

    @property
    def remedy(self) -> str:
        return (
            f"train.max_faults is {self.limit}. The newest checkpoint, where there is one, is from before and sound: "
            "mend the cause and go on with --resume."
        )


class LastGood:
    """The learner as it was when all of it was last seen to be finite."""

    def __init__(self, learner: LatentSAC):
        self.learner = learner
        self.held: dict[str, torch.Tensor] = {}
        self.keep()

    def keep(self) -> bool:
        """Hold a copy of the present state, if it is finite; return whether it is."""
        state = self.learner.tensors()
        if not all_finite(state):
            return False
        self.held = {name: tensor.detach().clone() for name, tensor in state.items()}
        return True

    def restore(self) -> None:
        """Go back to the copy. The generator is left where it is, so that the same draws do not come again."""
        state = self.held | {"generator": self.learner.tensors()["generator"]}
        self.learner.load_tensors({k: v.clone() for k, v in state.items()}, self.learner.updates)


def all_finite(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether no floating tensor holds NaN or infinity; one look at the device for all of them."""
    floating = [t for t in tensors.values() if t.is_floating_point() and t.numel()]
    return not floating or bool(torch.stack([torch.isfinite(t).all() for t in floating]).all())


def finite_rows(tensors: Mapping[str, torch.Tensor], count: int) -> np.ndarray:
    """Which of `count` rows hold only finite numbers, bool (count,)."""
    sound = torch.ones(count, dtype=torch.bool)
    for tensor in tensors.values():
        if tensor.is_floating_point():
            sound &= finite(tensor).cpu()
    return sound.numpy()


def seen_rows(observations: Observations) -> np.ndarray:
    """Which rows of a batch of observations have a finite state, bool (B,)."""
    return np.asarray(np.isfinite(np.asarray(observations[STATE], dtype=np.float64)).all(1))
