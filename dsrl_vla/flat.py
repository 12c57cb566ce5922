"""A module's parameters as one vector.

A steering network has some thirty parameters of a few thousand numbers each. Clipping, stepping and averaging them
one by one costs more than the arithmetic does; as one vector each of the three is one operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn


class Flat:
    """Parameters tied to one vector: they become views of it, so each sees the other's changes.

    Their module may be moved to another device or dtype until the first step.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.parameters = list(parameters)
        self.vector = nn.Parameter(torch.empty(0))
        """What an optimiser is given; float32 (number of weights,)."""
        self.mean: Callable[[torch.Tensor], torch.Tensor] = lambda gradient: gradient
        """The mean of a gradient over those who share the batch."""
        self._tie()

    def adam(self, learning_rate: float) -> torch.optim.Optimizer:
        """Its optimiser."""
        return torch.optim.Adam([self.vector], learning_rate, fused=True, capturable=self.vector.is_cuda)

    @torch.no_grad()
    def _tie(self) -> None:
        self.vector.data = torch.cat([p.reshape(-1) for p in self.parameters])
        parts = self.vector.data.split([p.numel() for p in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.data = part.view_as(parameter)

    def tied(self) -> torch.Tensor:
        """The vector; tied again if the module has been moved."""
        if self.parameters[0].data_ptr() != self.vector.data_ptr():
            self._tie()
        return self.vector

    def descend(self, loss: torch.Tensor, optimizer: torch.optim.Optimizer, max_norm: float) -> None:
        """One step of an optimiser of `vector` down the gradient of `loss`, its norm clipped at `max_norm`.

        Only these parameters' gradients are computed, and none is left behind.
        """
        vector = self.tied()
        gradient = self.mean(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, self.parameters)]))
        gradient *= (max_norm / (torch.linalg.vector_norm(gradient) + 1e-6)).clamp(max=1.0)
        vector.grad = gradient
        optimizer.step()

    @torch.no_grad()
    def follow(self, leader: Flat, weight: float) -> None:
        """Every weight moves towards its leader's: self += weight (leader - self), in place."""
        self.tied().lerp_(leader.tied(), weight)
