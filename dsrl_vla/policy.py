"""The contract an adapter fulfils.

A decision is ``encode -> head -> denoise``: one pass over images and prompt, a look at it by the head, and the
sampler run from the noise the head picked. The base is frozen: nothing here or below changes a weight.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .errors import DsrlError, bad
from .noise import NoiseSpace, generators
from .observation import Observations, ObservationSpec, unsqueeze
from .pairing import Fingerprint, take_fingerprint
from .run_dir import digest

if TYPE_CHECKING:
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

    def __post_init__(self) -> None:
        if not 1 <= self.executed_steps <= self.noise.horizon:
            most = f"1 to the chunk's {self.noise.horizon} steps"
            raise bad(f"{self.uri}: executed_steps", most, self.executed_steps)
        if self.sampler_steps < 1:
            raise bad(f"{self.uri}: the sampler's steps", "1 or more", self.sampler_steps)

    @property
    def pinned_uri(self) -> str:
        """`uri`, or where that is a repository of the Hub's the very commit that was loaded."""
        return pinned(self.uri, self.adapter, self.repo_id, self.revision)


def pinned(uri: str, adapter: str, repo_id: str, revision: str) -> str:
    """A base's URI, at the commit of the Hub's repository that it is; where another machine serves it, or it is no
    repository's, as it is."""
    own = uri.partition(":")[0] == adapter
    return f"{adapter}:{repo_id}@{revision}" if own and repo_id and revision else uri


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

    @property
    def device(self) -> torch.device:
        """Where its features are, and a head is best placed."""
        return torch.device("cpu")

    def encode(self, observations: Observations) -> Encoding:
        """Run the prefix once over a batch.

        Args:
            observations: see `dsrl_vla.observation`; batched with a leading B.

        Raises:
            DsrlError: the batch is not as `spec.observation` declares; names the field.
        """
        batch = self.spec.observation.check(observations)
        with torch.no_grad():
            encoding = self._encode(observations, batch)
        self._check_encoding(encoding, batch)
        return encoding

    def denoise(self, encoding: Encoding, noise: torch.Tensor) -> torch.Tensor:
        """Run the sampler from K noises per observation, all behind the same prefix.

        Args:
            noise: float32 (B, K, H, D), in the base's own normalised space.

        Returns:
            float32 (B, K, H, A) on the CPU, in environment units.
        """
        self.spec.noise.check(noise, encoding.batch)
        with torch.no_grad():
            actions = self._denoise(encoding, noise)
        if not isinstance(actions, torch.Tensor):
            raise bad(f"{self.spec.uri}: _denoise", "a tensor of actions (B, K, H, A)", type(actions).__name__)
        return actions.float().cpu()

    def _check_encoding(self, encoding: Any, batch: int) -> None:
        named, wide = f"{self.spec.uri}: _encode", (batch, self.spec.feature_dim)
        if not isinstance(encoding, Encoding) or encoding.batch != batch:
            got = f"one of {encoding.batch}" if isinstance(encoding, Encoding) else type(encoding).__name__
            raise bad(named, f"an Encoding of {batch} rows", got)
        feature = encoding.feature
        if self.spec.feature_dim and (not isinstance(feature, torch.Tensor) or tuple(feature.shape) != wide):
            got = type(feature).__name__ if not isinstance(feature, torch.Tensor) else str(tuple(feature.shape))
            raise bad(named, f"a feature, a tensor of shape {wide}", got)

    def act(self, observation: Mapping[str, Any], *, seed: int) -> torch.Tensor:
        """The base's own behaviour for a single observation: noise from its prior, drawn from `seed`.

        Returns:
            float32 (executed_steps, A), in environment units.
        """
        noise = self.spec.noise.sample(generators([seed]))
        return self.denoise(self.encode(unsqueeze(observation)), noise)[0, 0, : self.spec.executed_steps]

    def pack(self, encoding: Encoding) -> dict[str, torch.Tensor]:
        """The encoding as named tensors (B, …), for a replay that keeps whole prefixes. Here: of a base that needs no
        more than its feature.

        Raises:
            DsrlError: this base does not offer it.
        """
        if encoding.feature is None or encoding.context is not None:
            raise self._keeps_no_prefix()
        return {"feature": encoding.feature}

    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> Encoding:
        """Undo `pack`, for rows in any order and number; raises as `pack` does."""
        if set(tensors) != {"feature"}:
            raise self._keeps_no_prefix()
        return Encoding(len(tensors["feature"]), tensors["feature"], None)

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
        return digest(self.state_dict())

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
