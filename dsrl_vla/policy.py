"""The contract an adapter fulfils, and a policy with a steering head on it.

A decision is ``encode -> head -> denoise``: one pass over images and prompt, a look at it by the head, and the
sampler run from the noise the head picked. The base is frozen: nothing here or below changes a weight.
"""

from __future__ import annotations

import abc
import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .errors import BaseFailedError, DsrlError, bad
from .failsafe import FailSafe, Guard
from .noise import NoiseSpace, generators
from .observation import Observations, ObservationSpec, unsqueeze
from .pairing import Fingerprint, check_pair, take_fingerprint

if TYPE_CHECKING:
    from .head import SteeringHead
    from .tasks.base import TaskInfo


@dataclass(frozen=True)
class PolicySpec:
    """What a base is, as far as steering is concerned."""

    uri: str
    """How to load it again."""
    adapter: str
    noise: NoiseSpace
    observation: ObservationSpec
    action_dim: int
    executed_steps: int
    """Steps of a chunk executed before the next decision; at most the noise's horizon."""
    sampler_steps: int
    feature_dim: int
    """Width of the pooled prefix feature; 0 for a black box."""
    dtype: str
    repo_id: str = ""
    revision: str = ""


@dataclass(frozen=True)
class Encoding:
    """What one prefix pass leaves behind. Owned by the base that made it; opaque but for the feature."""

    batch: int
    feature: torch.Tensor | None
    """Pooled hidden state of the prefix, float32 (B, F); None for a black box."""
    context: Any
    """KV cache and whatever else `denoise` needs."""


class FrozenPolicy(abc.ABC):
    """A pretrained policy whose sampler's initial noise can be chosen.

    Subclasses implement `_encode` and `_denoise`; the checks around them are here, so that no adapter can
    forget one. Same observation and same noise give the same action.
    """

    spec: PolicySpec
    _fingerprint: Fingerprint | None = None

    def encode(self, observations: Observations) -> Encoding:
        """Run the prefix once over a batch.

        Args:
            observations: see `dsrl_vla.observation`; batched with a leading B.

        Raises:
            DsrlError: the batch is not as `spec.observation` declares; names the field.
        """
        batch = self.spec.observation.check(observations)
        with torch.no_grad():
            return self._encode(observations, batch)

    def denoise(self, encoding: Encoding, noise: torch.Tensor) -> torch.Tensor:
        """Run the sampler from K noises per observation, all behind the same prefix.

        Args:
            noise: float32 (B, K, H, D), in the base's own normalised space.

        Returns:
            float32 (B, K, H, A) on the CPU, in environment units.
        """
        self.spec.noise.check(noise, encoding.batch)
        with torch.no_grad():
            return self._denoise(encoding, noise).float().cpu()

    def act(self, observation: Mapping[str, Any], *, seed: int) -> torch.Tensor:
        """The base's own behaviour for a single observation: noise from its prior, drawn from `seed`.

        Returns:
            float32 (executed_steps, A), in environment units.
        """
        noise = self.spec.noise.sample(generators([seed]))
        return self.denoise(self.encode(unsqueeze(observation)), noise)[0, 0, : self.spec.executed_steps]

    def pack(self, encoding: Encoding) -> dict[str, torch.Tensor]:
        """The encoding as named tensors (B, …), for a replay that keeps whole prefixes.

        Raises:
            DsrlError: this base does not offer it.
        """
        raise self._keeps_no_prefix()

    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> Encoding:
        """Undo `pack`, for rows in any order and number; raises as `pack` does."""
        raise self._keeps_no_prefix()

    def _keeps_no_prefix(self) -> DsrlError:
        expected = "one that does without the base in its update (sac, na)"
        return bad("algorithm", expected, f"one that keeps the prefix of '{self.spec.uri}'")

    @abc.abstractmethod
    def _encode(self, observations: Observations, batch: int) -> Encoding: ...

    @abc.abstractmethod
    def _denoise(self, encoding: Encoding, noise: torch.Tensor) -> torch.Tensor: ...

    @abc.abstractmethod
    def state_dict(self) -> Mapping[str, torch.Tensor]:
        """The frozen weights; empty for a black box."""

    def sha256(self) -> str:
        """Hash of every weight, in name order: the proof that training left the base alone."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def processors(self) -> Mapping[str, Any]:
        """What turns observations into the model's inputs and its outputs into actions, by name and JSON-able:
        normalisation statistics, image size, tokenizer. Part of the fingerprint; empty where nobody knows."""
        return {}

    def fingerprint(self) -> Fingerprint | None:
        """What tells this base from others; taken once. An adapter that cannot afford it returns None."""
        if self._fingerprint is None:
            self._fingerprint = take_fingerprint(self)
        return self._fingerprint

    def check_task(self, task: TaskInfo) -> None:
        """Refuse a task this base does not fit.

        Raises:
            DsrlError: action width, state width or cameras differ.
        """
        if task.action_dim != self.spec.action_dim:
            raise bad(f"task {task.uri}", f"actions of width {self.spec.action_dim}", task.action_dim)
        if task.state_dim != self.spec.observation.state_dim:
            raise bad(f"task {task.uri}", f"a state of width {self.spec.observation.state_dim}", task.state_dim)
        for name, shape in self.spec.observation.cameras.items():
            if name not in task.cameras:
                raise bad(f"task {task.uri}", f"a camera '{name}'", ", ".join(task.cameras) or "no camera")
            if shape is not None and tuple(task.cameras[name]) != tuple(shape):
                raise bad(f"task {task.uri}, camera '{name}'", f"{shape}", task.cameras[name])


NOT_FINITE = "base: its actions under the head's noise hold NaN or infinity"


class SteeredPolicy:
    """A frozen base with a steering head that cannot make it fail; see `dsrl_vla.failsafe`.

    >>> policy = SteeredPolicy(base, head)
    >>> chunk = policy.act(observation, seed=0)          # (executed_steps, A)
    >>> with policy.disabled():
    ...     same_as_base = policy.act(observation, seed=0)   # bit for bit base.act(observation, seed=0)

    Args:
        allow_mismatch: names of differences between `base` and the head's own base to put up with; see
            `dsrl_vla.pairing`.
        failsafe: when the base decides alone.

    Raises:
        MismatchError: the head was trained on another base; names every difference.
    """

    def __init__(
        self,
        base: FrozenPolicy,
        head: SteeringHead,
        *,
        allow_mismatch: Sequence[str] = (),
        failsafe: FailSafe | None = None,
    ):
        check_pair(head.config, base, allow_mismatch)
        self.base, self.head = base, head.eval()
        self.guard = Guard(self.head, base.spec.noise, failsafe or FailSafe())
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
        noise, reasons = self.noise(observations, encoding, seeds, deterministic=deterministic)
        with _base_errors(self.base):
            actions = self.base.denoise(encoding, noise)
        if not torch.isfinite(actions).all():
            actions, reasons = self._without_head(encoding, seeds, reasons)
        self.last_fallback = next(filter(None, reasons), "")
        return actions

    def noise(
        self, observations: Observations, encoding: Encoding, seeds: Sequence[int], *, deterministic: bool = True
    ) -> tuple[torch.Tensor, list[str]]:
        """The noise of a batch of decisions, float32 (B, 1, H, D), and why a row is the base's own ("": it is not)."""
        if not self.enabled:
            return self.base.spec.noise.sample(generators(list(seeds))), ["disabled"] * len(seeds)
        return self.guard.noise(observations, encoding, seeds, deterministic)

    def _without_head(
        self, encoding: Encoding, seeds: Sequence[int], reasons: list[str]
    ) -> tuple[torch.Tensor, list[str]]:
        """Once more from the base's own noise, where the head's led to actions that are not finite."""
        with _base_errors(self.base):
            actions = self.base.denoise(encoding, self.base.spec.noise.sample(generators(list(seeds))))
            if not torch.isfinite(actions).all():
                raise ValueError("its actions hold NaN or infinity")
        self.guard.recount([not reason for reason in reasons], NOT_FINITE)
        return actions, [reason or NOT_FINITE for reason in reasons]

    @contextlib.contextmanager
    def rehearsing(self) -> Iterator[SteeredPolicy]:
        """Within this context observations may be made up: nothing is foreign, and nothing is counted."""
        before = self.guard
        self.guard = Guard(self.head, self.base.spec.noise, FailSafe(max_z=math.inf))
        try:
            yield self
        finally:
            self.guard = before

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
