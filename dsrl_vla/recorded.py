"""A function of tensors as CUDA graphs.

What a steering head learns by, and what a sampler does, are hundreds to thousands of kernels of a few microseconds
each, and a GPU waits for Python to launch every one of them. Recorded once, all are launched by a single call.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import sys
import threading
from collections.abc import Callable, Iterator
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
_ONE_AT_A_TIME = threading.RLock()
"""CUDA records one graph at a time in a process; and a graph's inputs and outputs are where they are."""


@dataclass
class _Take:
    """One shape of inputs, and its graph once there is one."""

    left: int = _WARM_UP
    fits: bool = True
    """Whether there was memory for it."""
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
    recording fails it is said, and the function goes on being called. Threads take turns.

    Args:
        what: names it in words.
        repeatable: whether it changes nothing: then even the first call is a replay, and equal calls are equal bit for
            bit. Otherwise those of a shape are from the third on.
        weight: gives one of the weights it reads, by whose place in memory it is noticed that they have been moved.
            Like `function` a bound method, or a `partial` over what it belongs to, so that a copy has its own.
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
        self.fails = False
        """Whether it cannot be recorded."""
        self.takes: dict[tuple, _Take] = {}
        self._seen: torch.Tensor | None = None
        """The weight as it was last looked at; held, so that nothing else can come to lie in its place."""
        self._pool: Any = None
        self._stream: Any = None

    def __deepcopy__(self, memo: dict) -> Recorded:
        """Of the copies of what it belongs to, without its graphs."""
        function, weight = copy.deepcopy(self.function, memo), copy.deepcopy(self.weight, memo)
        generator = copy.deepcopy(self.generator, memo)
        return Recorded(function, self.what, weight, repeatable=self.repeatable, generator=generator)

    def forget(self) -> None:
        """Record anew."""
        self.takes.clear()
        self._pool = None  # the memory of graphs that are gone is no pool any more

    def __call__(self, tensors: Tensors) -> Tensors:
        weight = self.weight()
        if self.fails or not weight.is_cuda or torch.cuda.is_current_stream_capturing():
            return self.function(tensors)
        with _ONE_AT_A_TIME, torch.cuda.device(weight.device):
            return self._call(tensors, weight)

    def _call(self, tensors: Tensors, weight: torch.Tensor) -> Tensors:
        if self._seen is None or weight.data_ptr() != self._seen.data_ptr():
            self.forget()
            self._seen, self._stream = weight.detach(), torch.cuda.Stream()
        key = _key(tensors)
        if key not in self.takes and len(self.takes) >= _MOST:
            return self.function(tensors)
        take = self.takes.setdefault(key, _Take())
        while take.left:
            take.left -= 1
            found = self._aside(tensors)
            if not self.repeatable:
                return found
        if take.graph is None and take.fits:
            self._try_to_record(take, tensors)
        return take.replay(tensors) if take.graph is not None else self.function(tensors)

    def _aside(self, tensors: Tensors) -> Tensors:
        """The function itself, on the stream on which it will be recorded."""
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            found = self.function(tensors)
        here.wait_stream(self._stream)
        for value in found.values():
            value.record_stream(here)
        return found

    def _try_to_record(self, take: _Take, tensors: Tensors) -> None:
        """Give the take its graph; say so where that fails, and if only memory was short go on with other shapes."""
        around, before = torch.cuda.current_stream(), sys.exception()
        try:
            with torch.cuda.stream(around):  # to which a recording that fails does not come back by itself
                self._record(take, tensors)
        except Exception as error:
            why, short_of_memory = _told(error, before)
        else:
            return
        log.warning("%s is not recorded as a CUDA graph, and slower for it: %s", self.what, why)
        self._clean_up()
        take.fits, self.fails = False, not short_of_memory
        if short_of_memory:
            self.takes[_key(tensors)] = take

    def _clean_up(self) -> None:
        """After a recording that failed; torch before 2.13 leaves pool and generators as if it still went on."""
        index = torch.cuda.current_device()
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(index, self._pool)
        for generator in (self.generator, torch.cuda.default_generators[index]):
            if generator is not None:
                generator.graphsafe_set_state(generator.clone_state())
        self.forget()

    def _record(self, take: _Take, tensors: Tensors) -> None:
        self._pool = self._pool or torch.cuda.graph_pool_handle()  # one for all: no two are replayed at once
        graph = torch.cuda.CUDAGraph()
        if self.generator is not None:
            graph.register_generator_state(self.generator)
        with _ordinary_tensors(), _undisturbed():
            held = {name: value.clone() for name, value in tensors.items()}
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                outputs = self.function(held)
                flat = torch.cat([value.reshape(-1) for value in outputs.values()])
        take.graph, take.inputs, take.outputs, take.flat = graph, list(held.values()), outputs, flat


def _key(tensors: Tensors) -> tuple:
    """What one graph is good for."""
    return tuple((name, value.shape, value.dtype) for name, value in tensors.items())


@contextlib.contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """Tensors made within it may be written over later, whatever mode is on now."""
    with_gradients = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(with_gradients):
        yield


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage is collected within it, for a graph in it would end a recording; and cuBLAS takes its workspace from
    the graph's own memory, which no other graph's end can take away."""
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()
        if collects:
            gc.enable()


def _told(error: BaseException, before: BaseException | None) -> tuple[str, bool]:
    """What went wrong first, in words, and whether memory was short; `before` had gone wrong before.

    Raises:
        BaseException: that of a person who wants to stop.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link is not before:
        chain.append(link)
        link = link.__context__
    for each in chain:
        if not isinstance(each, Exception):
            raise each
    words, short = first_line(chain[-1]), any(isinstance(each, torch.OutOfMemoryError) for each in chain)
    chain.clear()  # or a traceback would hold it, and it the traceback, with all the tensors there
    return words, short
