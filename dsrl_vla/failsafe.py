"""The guard between a head and a base: whatever the head does, there is noise for the decision, in time.

A head that raises, answers NaN, is late, or looks at something far from all it was trained on, is passed over:
the base decides alone, from its own noise, drawn from the request's seed. That is the unsteered base bit for bit.
Every such decision is counted and logged with its reason, and a head that needs it too often is switched off.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .errors import bad
from .noise import NoiseSpace, generators
from .observation import Observations

if TYPE_CHECKING:
    from .head import HeadInputs, SteeringHead
    from .policy import Encoding

log = logging.getLogger(__name__)
LATCHED = "latched"
_MARGIN, _LEAST = 1.5, 5.0  # of the furthest deviation seen in training, which counts as 5 where it was less


def finite(rows: torch.Tensor) -> torch.Tensor:
    """Which rows of a tensor (B, …) hold neither NaN nor infinity, bool (B,)."""
    return torch.isfinite(rows).unsqueeze(-1).flatten(1).all(1)


@dataclass(frozen=True)
class FailSafe:
    """When the base decides alone."""

    deadline_s: float | None = None
    """Seconds the head may take, its own part of a decision alone; None: any. The decision goes on at the deadline."""
    max_z: float | None = None
    """Deviations from the training mean beyond which any column makes an observation foreign. None: 1.5 times the
    furthest that column went in training (5 at least), which heads know of themselves; infinity: never."""
    latch_after: int = 10
    """Switch the head off once so many …"""
    window: int = 100
    """… of the last decisions fell back."""

    def __post_init__(self) -> None:
        for name in ("deadline_s", "max_z"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise bad(f"failsafe.{name}", "above 0, or None", value)
        if not 1 <= self.latch_after <= self.window:
            raise bad("failsafe.latch_after", f"from 1 to failsafe.window = {self.window}", self.latch_after)


class _Late(Exception):
    """The head did not answer in time."""


_Calls = queue.SimpleQueue[Callable[[], torch.Tensor] | None]
_Answers = queue.SimpleQueue[torch.Tensor | Exception]


def _work(calls: _Calls, answers: _Answers) -> None:
    """Until there is a None among the calls."""
    while (call := calls.get()) is not None:
        try:
            answers.put(call())
        except Exception as error:
            answers.put(error)
        del call  # which holds a head


class _Worker:
    """A thread that runs one call at a time, so that the caller need not wait longer than it wants to. It ends when
    nobody has this any more."""

    def __init__(self) -> None:
        self._calls: _Calls = queue.SimpleQueue()
        self._answers: _Answers = queue.SimpleQueue()
        self._owed = 0
        threading.Thread(target=_work, args=(self._calls, self._answers), name="steering-head", daemon=True).start()
        weakref.finalize(self, self._calls.put, None)

    def run(self, call: Callable[[], torch.Tensor], seconds: float) -> torch.Tensor:
        """The call's answer; what it raises; or `_Late`."""
        while self._owed and not self._answers.empty():  # answers nobody waited for
            self._answers.get()
            self._owed -= 1
        if self._owed:
            raise _Late("still busy with an earlier decision")
        self._calls.put(call)
        self._owed = 1
        try:
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            raise _Late(f"no answer within {seconds:g} s") from None
        self._owed = 0
        if isinstance(answer, Exception):
            raise answer
        return answer


class Guard:
    """Asks a head for noise and vouches for the answer: float32, finite, |w| <= bound, in time.

    Owns the counters and the latch. Not to be shared between threads.
    """

    def __init__(self, head: SteeringHead, space: NoiseSpace, config: FailSafe, worker: _Worker | None = None):
        self.head, self.space, self.config = head, space, config
        self.decisions = 0
        self.fallbacks: Counter[str] = Counter()
        """How often the base decided alone, by kind of reason."""
        self.latched = False
        self._worker = _Worker() if worker is None and config.deadline_s is not None else worker
        self._normalise = head.eyes.normalise.here()  # or every decision would copy it from a GPU, and wait for that
        self._allowed: dict[str, torch.Tensor] = {}
        self._recent: deque[bool] = deque(maxlen=config.window)

    def another(self) -> Guard:
        """A guard over the same head with counters and a latch of its own. Only one of them may ask at a time."""
        return Guard(self.head, self.space, self.config, self._worker)

    def reset(self) -> None:
        """Trust the head again. Counters are kept."""
        self.latched = False
        self._recent.clear()

    def noise(
        self, observations: Observations, encoding: Encoding, seeds: Sequence[int], deterministic: bool
    ) -> tuple[torch.Tensor, list[str]]:
        """Noise float32 (B, 1, H, D), and why a row is the base's own noise ("" where it is the head's).

        Nothing is counted: whoever acts on it then calls `book` with what it came to.
        """
        own = self.space.sample(generators(list(seeds)))
        if self.latched:
            return own, [LATCHED] * len(seeds)
        try:
            chosen, reasons = self._ask(observations, encoding, seeds, deterministic)
        except _Late as late:
            reasons = [f"deadline: {late}"] * len(seeds)
        except Exception as error:
            reasons = [f"exception: {type(error).__name__}: {error}"] * len(seeds)
        if not any(reasons):
            return chosen, reasons
        if not all(reasons):
            foreign = torch.tensor([bool(r) for r in reasons])
            own = torch.where(foreign.view(-1, 1, 1, 1), own, chosen)
        return own, reasons

    def book(self, reasons: Sequence[str]) -> None:
        """Count decisions, and why each was the base's own ("": it was not); latch when too many of the last were."""
        for reason in reasons:
            self.decisions += 1
            if reason == LATCHED:
                self.fallbacks[LATCHED] += 1
                continue
            self._recent.append(bool(reason))
            if reason:
                self._fall_back(reason)

    def _fall_back(self, reason: str) -> None:
        self.fallbacks[reason.partition(":")[0]] += 1
        log.warning("decision %d is the base's own: %s", self.decisions, reason)
        if sum(self._recent) >= self.config.latch_after and not self.latched:
            self.latched = True
            log.error(
                "the steering head is switched off: %d of the last %d decisions fell back to the base. "
                "enable() switches it on again.",
                sum(self._recent),
                len(self._recent),
            )

    def _ask(
        self, observations: Observations, encoding: Encoding, seeds: Sequence[int], deterministic: bool
    ) -> tuple[torch.Tensor, list[str]]:
        """The head's noise (B, 1, H, D), and for each row why it cannot be used ("" where it can)."""
        streams = None if deterministic else generators(list(seeds))
        inputs: HeadInputs = {}

        def call() -> torch.Tensor:
            inputs.update(self.head.read(observations, encoding))
            with torch.no_grad():
                return self.head.latent(inputs, streams)

        limit = self.config.deadline_s
        start = time.perf_counter()
        if limit is None:
            latent = call()
        else:
            assert self._worker is not None
            latent = self._worker.run(call, limit)
        wanted = (len(seeds), *self.head.layout.latent_shape)
        if tuple(latent.shape) != wanted:
            raise ValueError(f"latents of shape {tuple(latent.shape)} in place of {wanted}")
        reasons = self._foreign(inputs)
        if not torch.isfinite(latent).all():
            for row in (~finite(latent)).nonzero()[:, 0].tolist():
                reasons[row] = "non-finite: the head's output holds NaN or infinity"
        if limit is not None and (taken := time.perf_counter() - start) > limit:
            raise _Late(f"{taken:.4f} s of {limit:g} s")
        return self.head.layout.expand(latent).unsqueeze(1), reasons

    def _limits(self, name: str, like: torch.Tensor) -> torch.Tensor | None:
        """Deviations that each column of an input may lie off; None: any."""
        if self.config.max_z is not None:
            return torch.full_like(like[0], self.config.max_z) if math.isfinite(self.config.max_z) else None
        if name not in self.head.config.furthest:
            return None
        if name not in self._allowed:
            furthest = torch.tensor(self.head.config.furthest[name])
            self._allowed[name] = _MARGIN * furthest.clamp(min=_LEAST)
        return self._allowed[name]

    def _foreign(self, inputs: HeadInputs) -> list[str]:
        """For each row, what is further from the training data than allowed."""
        reasons = [""] * len(next(iter(inputs.values())))
        for name, z in self._normalise.deviations(inputs).items():
            limits = self._limits(name, z)
            if limits is None:
                continue
            beyond = ~(z <= limits)  # a NaN is, too
            for row in beyond.any(1).nonzero()[:, 0].tolist() if beyond.any() else ():
                column = int((z[row] / limits).nan_to_num(math.inf).argmax())
                off = f"lies {float(z[row, column]):.1f} deviations off, limit {float(limits[column]):.1f}"
                reasons[row] = f"foreign: {name}[{column}] {off}"
        return reasons
