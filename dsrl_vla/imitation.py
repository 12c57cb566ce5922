"""Behaviour cloning in the space of noise: the actor is held to the noise found behind what somebody else did.

What is cloned is a choice among the things that the base does anyway, a few numbers for each decision, and not the
actions themselves: tens of demonstrations are enough, and what the head then does is still the base's.
"""

from __future__ import annotations

import torch

from .head import SteeringHead
from .noise_bank import IMITATED, REACH
from .replay import Batch


def imitation_loss(head: SteeringHead, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """E[reach |mode pi(s) - u|^2 / (n d)], u the noise that was found, reach how near it comes to what was done.

    Only what somebody else did counts, in an episode that is not known to have failed (a person's on a robot: that is
    known to have succeeded); the mean is over the whole batch, of which it is a part once there are online data.
    """
    mode = head.distribution(batch.inputs)[0].tanh()
    weight = batch.extras[REACH] * batch.extras[IMITATED]
    loss = (weight * (mode - batch.latent).square().flatten(1).mean(1)).mean()
    return loss, {"imitation_loss": loss.detach()}
