"""A function of tensors as CUDA graphs.

What a steering head learns by, and what a sampler does, are hundreds to thousands of kernels of a few microseconds
each, and a GPU waits for Python to launch every one of them. Recorded once, all are launched by a single call.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import first_line

log = logging.getLogger(__name__)
Tensors = dict[str, torch.Tensor]
_MOST = 16
"""Shapes that are recorded; others, of batches that change all the time, run as they are."""
_WARM_UP = 2
"""Calls of a shape that run as they are first, in which libraries and optimisers set themselves up."""


@dataclass
class _Take:
    """One shape of inputs, and its graph once there is one."""

    left: int = _WARM_UP
    graph: torch.cuda.CUDAGraph | None = None
    inputs: list[torch.Tensor] = field(default_factory=list)
    outputs: Tensors = field(default_factory=dict)
    flat: torch.Tensor | None = None
    """All outputs after one another: one copy hands them out."""

    def replay(self, tensors: Tensors) -> Tensors:
        assert self.graph is not None and self.flat is not None
        torch._foreach_copy_(self.inputs, list(tensors.values()))
        self.graph.replay()
        parts = self.flat.clone().split([value.numel() for value in self.outputs.values()])
        return {k: part.view(v.shape) for (k, v), part in zip(self.outputs.items(), parts, strict=True)}


class Recorded:
    """A function from named tensors to named tensors of one dtype, all on one GPU, replayed. On a CPU just called.

    It has to be the same work every time for inputs of the same shapes, but for the numbers in them and those it draws
    from `generator`: a branch or a Python number is as it was when it was recorded. All else that it reads and writes
    is found where it was in memory: after that has been replaced, and not just written over, call `forget`. Where
    recording fails it is said once, and the function goes on being called.

    Args:
        what: names it in words.
        repeatable: whether it changes nothing: then even the first call is a replay, and equal calls are equal bit for
            bit. Otherwise those of a shape are from the third on.
        weight: gives one of the weights it reads, by whose place in memory it is noticed that they have been moved.
    """

    def __init__(
        self,
        function: Callable[[Tensors], Tensors],
        what: str,
        weight: Callable[[], torch.Tensor],
        *,
        repeatable: bool = True,
        generator: torch.Generator | None = None,
    ):
        self.function, self.what, self.weight = function, what, weight
        self.repeatable, self.generator = repeatable, generator
        self._takes: dict[tuple, _Take] = {}
        self._pool: Any = None
        self._failed, self._read_at = False, 0

    def __deepcopy__(self, memo: dict) -> Recorded:
        """Of the copies of what it belongs to, without its graphs. Function and weight have to be bound methods."""
        function, weight = copy.deepcopy(self.function, memo), copy.deepcopy(self.weight, memo)
        return Recorded(function, self.what, weight, repeatable=self.repeatable, generator=self.generator)

    def forget(self) -> None:
        """Record anew."""
        self._takes.clear()

    def __call__(self, tensors: Tensors) -> Tensors:
        weight = self.weight()
        if self._failed or not weight.is_cuda:
            return self.function(tensors)
        if weight.data_ptr() != self._read_at:
            self.forget()
            self._read_at = weight.data_ptr()
        key = tuple((name, value.shape, value.dtype) for name, value in tensors.items())
        if key not in self._takes and len(self._takes) >= _MOST:
            return self.function(tensors)
        take = self._takes.setdefault(key, _Take())
        while take.left:
            take.left -= 1
            found = self._aside(tensors)
            if not self.repeatable:
                return found
        if take.graph is None and not self._record(take, tensors):
            return self.function(tensors)
        return take.replay(tensors)

    def _aside(self, tensors: Tensors) -> Tensors:
        """The function itself, on a stream of its own, as it will be recorded."""
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            found = self.function(tensors)
        here.wait_stream(aside)
        for value in found.values():
            value.record_stream(here)
        return found

    def _record(self, take: _Take, tensors: Tensors) -> bool:
        """Whether it could be recorded."""
        held = {name: value.clone() for name, value in tensors.items()}
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()  # one for all: no two are replayed at once
        if self.generator is not None:
            graph.register_generator_state(self.generator)
        try:
            with torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"):
                take.outputs = self.function(held)
                take.flat = torch.cat([value.reshape(-1) for value in take.outputs.values()])
        except RuntimeError as error:
            while error.__context__ is not None:  # what comes last says only that something came before
                error = error.__context__  # type: ignore[assignment]
            why = first_line(error)
            log.warning("%s is not recorded as a CUDA graph, and slower for it: %s", self.what, why)
            self._failed = True
            return False
        take.graph, take.inputs = graph, list(held.values())
        return True
