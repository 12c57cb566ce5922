"""A policy with a steering head on it: ``encode -> head -> denoise``, and the base alone where that fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .errors import BaseFailedError, DsrlError
from .failsafe import FailSafe, Guard, finite
from .noise import generators
from .observation import Observations, unsqueeze
from .pairing import check_pair
from .policy import Encoding, FrozenPolicy

if TYPE_CHECKING:
    from .head import SteeringHead

NOT_FINITE = "base: its actions under the head's noise hold NaN or infinity"


class SteeredPolicy:
    """A frozen base with a steering head that cannot make it fail; see `dsrl_vla.failsafe`.

    >>> policy = SteeredPolicy(base, head)
    >>> chunk = policy.act(observation, seed=0)          # (executed_steps, A)
    >>> with policy.disabled():
    ...     same_as_base = policy.act(observation, seed=0)   # bit for bit base.act(observation, seed=0)

    Args:
        head: one that was loaded, or what `SteeringHead.from_pretrained` takes. It is moved to where the base is.
        allow_mismatch: names of differences between `base` and the head's own base to put up with; see
            `dsrl_vla.pairing`.
        failsafe: when the base decides alone.

    Raises:
        MismatchError: the head was trained on another base; names every difference.
    """

    def __init__(
        self,
        base: FrozenPolicy,
        head: SteeringHead | Path | str,
        *,
        allow_mismatch: Sequence[str] = (),
        failsafe: FailSafe | None = None,
    ):
        if isinstance(head, (Path, str)):
            from .head import SteeringHead

            head = SteeringHead.from_pretrained(head)
        check_pair(head.config, base, allow_mismatch)
        self.base, self.head = base, head.eval().to(base.device)
        self.guard = Guard(self.head, base.spec.noise, failsafe or FailSafe())
        if self.guard.config.deadline_s is not None:  # a head's first run takes longest: on a GPU it is recorded
            with contextlib.suppress(Exception):
                self.head.warm_up()
        self.enabled = True
        self.last_fallback = ""
        """Why the newest decision was the base's own; empty when it was the head's."""

    def act(self, observation: Mapping[str, Any], *, seed: int = 0, deterministic: bool = True) -> torch.Tensor:
        """Act on a single observation.

        Args:
            seed: of the head's sample (when not deterministic) and of the base's own noise.

        Returns:
            float32 (executed_steps, A), in environment units.

        Raises:
            DsrlError: the observation is not as the base declares. BaseFailedError: the base itself failed.
                Nothing that the head does is raised.
        """
        return self.act_batch(unsqueeze(observation), [seed], deterministic=deterministic)[0]

    def act_batch(
        self, observations: Observations, seeds: Sequence[int], *, deterministic: bool = True
    ) -> torch.Tensor:
        """Act on a batch of observations, one seed each: float32 (B, executed_steps, A). Raises as `act` does."""
        with _base_errors(self.base):
            encoding = self.base.encode(observations)
        actions = self.decide(observations, encoding, seeds, deterministic=deterministic)
        return actions[:, 0, : self.base.spec.executed_steps]

    def decide(
        self, observations: Observations, encoding: Encoding, seeds: Sequence[int], *, deterministic: bool = True
    ) -> torch.Tensor:
        """The actions behind an encoding, float32 (B, 1, H, A), finite. Raises as `act` does."""
        noise, reasons = self._choose(observations, encoding, seeds, deterministic)
        with _base_errors(self.base):
            actions = self.base.denoise(encoding, noise)
        broken = ~finite(actions)
        if broken.any():
            actions, reasons = self._without_head(encoding, seeds, noise, broken, reasons)
        self._book(reasons)
        self.last_fallback = next(filter(None, reasons), "")
        return actions

    def noise(
        self, observations: Observations, encoding: Encoding, seeds: Sequence[int], *, deterministic: bool = True
    ) -> tuple[torch.Tensor, list[str]]:
        """The noise of a batch of decisions, float32 (B, 1, H, D), and why a row is the base's own ("": it is not)."""
        noise, reasons = self._choose(observations, encoding, seeds, deterministic)
        self._book(reasons)
        return noise, reasons

    def _choose(
        self, observations: Observations, encoding: Encoding, seeds: Sequence[int], deterministic: bool
    ) -> tuple[torch.Tensor, list[str]]:
        if not self.enabled:
            return self.base.spec.noise.sample(generators(list(seeds))), ["disabled"] * len(seeds)
        return self.guard.noise(observations, encoding, seeds, deterministic)

    def _book(self, reasons: Sequence[str]) -> None:
        if self.enabled:
            self.guard.book(reasons)

    def _without_head(
        self, encoding: Encoding, seeds: Sequence[int], noise: torch.Tensor, broken: torch.Tensor, reasons: list[str]
    ) -> tuple[torch.Tensor, list[str]]:
        """Once more, with the base's own noise in the rows where the head's led to actions that are not finite."""
        own = self.base.spec.noise.sample(generators(list(seeds)))
        with _base_errors(self.base):
            everywhere = torch.ones_like(broken)
            for back in (everywhere,) if broken.all() else (broken, everywhere):  # at the last the head has no part
                actions = self.base.denoise(encoding, torch.where(back.view(-1, 1, 1, 1), own, noise))
                if torch.isfinite(actions).all():
                    break
            else:
                raise ValueError("its actions hold NaN or infinity")
        turned = zip(back.tolist(), reasons, strict=True)
        return actions, [NOT_FINITE if row and not reason else reason for row, reason in turned]

    @property
    def steering(self) -> bool:
        """Whether the head decides: it is enabled, and not latched off."""
        return self.enabled and not self.guard.latched

    @property
    def fallbacks(self) -> dict[str, int]:
        """Decisions of the base alone while enabled, by kind: exception, non-finite, deadline, foreign, base."""
        return dict(self.guard.fallbacks)

    def enable(self) -> None:
        """Let the head decide, also after it was latched off."""
        self.enabled = True
        self.guard.reset()

    def disable(self) -> None:
        """Be the base, bit for bit."""
        self.enabled = False

    @contextlib.contextmanager
    def disabled(self) -> Iterator[SteeredPolicy]:
        """Within this context the policy is its base, bit for bit."""
        before, self.enabled = self.enabled, False
        try:
            yield self
        finally:
            self.enabled = before


@contextlib.contextmanager
def _base_errors(base: FrozenPolicy) -> Iterator[None]:
    """Say whose failure it is; refusals of bad input stay what they are."""
    try:
        yield
    except DsrlError:
        raise
    except Exception as error:
        raise BaseFailedError(
            f"{base.spec.uri}: expected actions, got a failure of the base itself: {type(error).__name__}: {error}"
        ) from error
