"""An update as one CUDA graph.

An update of networks as small as a steering head is some hundreds of kernels of a few microseconds each, and a GPU
would wait for Python to launch every one of them. Recorded once, all are launched by a single call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .replay import Batch

Info = dict[str, torch.Tensor]
"""What an update says of itself: figures by name, each of no dimensions."""
_WARM_UP = 3
"""Calls that run as they are first, as torch asks for: libraries and optimisers set themselves up in them."""


class Recorded:
    """A function of a batch on a GPU, called for its effects and figures; from the fourth call on replayed.

    It has to be the same work every time, but for the numbers in the batch and those it draws from `generator`: a
    branch or a Python number is as it was when it was recorded. All else that it reads and writes is found where it
    was in memory: after that has been replaced, and not just written over, call `forget`. Batches of another shape
    are recorded anew.
    """

    def __init__(self, function: Callable[[Batch], Info], generator: torch.Generator):
        self.function, self.generator = function, generator
        self.forget()

    def forget(self) -> None:
        """Record anew."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._left = _WARM_UP
        self._shapes: list[torch.Size] = []
        self._inputs: list[torch.Tensor] = []
        self._names: list[str] = []
        self._figures = torch.empty(0)

    def __call__(self, batch: Batch) -> Info:
        tensors = batch.tensors()
        shapes = [value.shape for value in tensors.values()]
        if shapes != self._shapes:
            self.forget()
            self._shapes = shapes
        if self._left:
            self._left -= 1
            return self._aside(batch)
        if self._graph is None:
            self._record(tensors)
        assert self._graph is not None
        torch._foreach_copy_(self._inputs, list(tensors.values()))
        self._graph.replay()
        return dict(zip(self._names, self._figures.clone().unbind(), strict=True))

    def _aside(self, batch: Batch) -> Info:
        """The function itself, on a stream of its own, as it will be recorded."""
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            info = self.function(batch)
        here.wait_stream(aside)
        return info

    def _record(self, tensors: dict[str, torch.Tensor]) -> None:
        held = {name: value.clone() for name, value in tensors.items()}
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph):
            info = self.function(Batch.of(held))
            self._figures = torch.stack(list(info.values()))
        self._graph, self._inputs, self._names = graph, list(held.values()), list(info)
