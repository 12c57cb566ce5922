"""The updates a run makes: on batches of its data, and undone where they are not finite."""

from __future__ import annotations

import numpy as np
import torch

from .errors import bad
from .faults import Faults, LastGood, all_finite
from .latent_sac import LatentSAC
from .mixed_replay import MixedReplay
from .replay import Replay
from .team import Team

_SAMPLED_AHEAD = 32
"""Minibatches gathered from the replay at a time."""
_KEEP_EVERY = 200  # updates


class Updates:
    """Owns the order of batches, and a copy of the learner as it was when it was last seen to be sound.

    Args:
        batch: rows of a batch, over all of the team.
    """

    def __init__(
        self, learner: LatentSAC, data: Replay | MixedReplay, batch: int, seed: int, faults: Faults, team: Team
    ):
        self.learner, self.data, self.batch, self.faults, self.team = learner, data, batch, faults, team
        self.rng = np.random.default_rng(seed)
        self.info: dict[str, torch.Tensor] = {}
        """What the newest update said of itself."""
        self.good, self.good_at = LastGood(learner), 0
        team.agree(learner)
        self._agreed = False

    def until(self, count: int) -> None:
        """Update until the learner has made `count` updates.

        Raises:
            TooManyFaultsError: too many were not finite.
        """
        if self.learner.updates >= count:
            return
        if self.learner.updates == 0:
            self.learner.fit_normaliser(self.data)
            if not self.good.keep():  # or undoing the first updates would undo this too, and nothing is fitted twice
                raise bad("training data", "finite observations and actions", "some that are not")
        if not self._agreed:
            self.team.agree(self.learner)
            self._agreed = True
        while self.learner.updates < count:
            ahead = min(count - self.learner.updates, _SAMPLED_AHEAD)
            for batch in self.data.batches(ahead, self.batch, self.rng, self.learner.device):
                self.info = self.team.update(self.learner, batch)
        self.look()

    def look(self, closely: bool = False) -> None:
        """Undo updates whose losses are not finite; now and then look at all weights, and hold on to sound ones."""
        due = closely or self.learner.updates - self.good_at >= _KEEP_EVERY
        if all_finite(self.info) and (not due or self.good.keep()):
            self.good_at = self.learner.updates if due else self.good_at
            return
        self.good.restore()
        self._agreed = False
        self.info = {}
        undone = self.learner.updates - self.good_at
        self.faults.add("loss", f"a loss or weight that is not finite; the last {undone} updates are undone")

    def resumed(self) -> None:
        """The learner has just been loaded."""
        self.good.keep()
        self.good_at, self._agreed = self.learner.updates, False
