"""From a decoded message to a request that can be carried out: every value checked before the base sees it.

Two dialects: flat, which is openpi's with our reserved keys, and the envelope of the dsrl_pi0 forks,
``{"method": "infer" | "get_prefix_rep", "obs": {…, "noise": …}}``.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import DsrlError, bad, unknown
from ..observation import PROMPT, STATE, Observations, ObservationSpec, unsqueeze
from ..policy import PolicySpec
from . import protocol as p
from .keys import KeyMap, array, ours
from .wire import WireError

OPERATIONS = ("infer", "feature", "encode", "denoise", "sha256", "status")
_RETURNS = ("feature", "noise")
_METHODS = ("infer", "get_prefix_rep")


@dataclass(frozen=True)
class Infer:
    """One decision, or K chunks for one observation."""

    observations: Observations
    """A checked batch of one."""
    noise: torch.Tensor | None
    """float32 (1, K, H, D), finite; None: the head's, or the base's own."""
    seed: int
    samples: int = 1
    many: bool = False
    """Whether the reply's actions have an axis of K."""
    steer: bool = True
    deterministic: bool = True
    wants: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Feature:
    """The fork's ``get_prefix_rep``."""

    observations: Observations


@dataclass(frozen=True)
class Encode:
    """One prefix pass over a batch, kept under a handle."""

    observations: Observations
    batch: int


@dataclass(frozen=True)
class Denoise:
    """The sampler behind a kept prefix."""

    handle: int
    noise: torch.Tensor
    """float32 (B, K, H, D), finite; B is checked against the encoding."""


@dataclass(frozen=True)
class Sha256:
    """Hash the base's weights, now."""


@dataclass(frozen=True)
class Status:
    """What the server has done so far."""


Request = Infer | Feature | Encode | Denoise | Sha256 | Status


def speaks_dsrl(message: Any) -> bool:
    """Whether a peer knows our replies: it used a reserved key."""
    return isinstance(message, Mapping) and any(isinstance(key, str) and key.startswith("dsrl/") for key in message)


@dataclass(frozen=True)
class Reader:
    """Reads the requests that a service understands."""

    spec: PolicySpec
    seen: ObservationSpec
    """What an observation to act on must hold."""
    keys: KeyMap
    prompt: str = ""
    """For observations that come without one."""

    def read(self, message: Any) -> Request:
        """Read a decoded message.

        Raises:
            DsrlError: names what is wrong with it.
        """
        if not isinstance(message, dict) or not all(isinstance(key, str) for key in message):
            raise WireError("message: expected a dictionary with text for keys, got something else.")
        if "method" in message and "obs" in message:
            message = _open_envelope(message)
        for key in message:
            if key.startswith("dsrl/") and key not in p.REQUEST_KEYS:
                raise unknown("reserved key", key[:40], p.REQUEST_KEYS)
        operation = message.get(p.OP, "infer")
        if not isinstance(operation, str) or operation not in OPERATIONS:
            raise unknown("operation", f"{operation}"[:40], OPERATIONS)
        if operation in ("sha256", "status"):
            return Sha256() if operation == "sha256" else Status()
        if operation == "denoise":
            return _denoise(message, self.spec)
        if operation == "encode":
            return self._batch(message)
        observations = self._single(message)
        return Feature(observations) if operation == "feature" else _infer(message, self.spec, observations)

    def _batch(self, message: dict[str, Any]) -> Encode:
        """A batch of ours; what else is in the message is left alone."""
        seen = self.spec.observation
        observations = ours(message, seen)
        rows = len(observations[STATE]) if STATE in observations and observations[STATE].ndim else 0
        if rows > p.MAX_SAMPLES:
            raise bad("observation", f"at most {p.MAX_SAMPLES} rows in one request", rows)
        observations |= {PROMPT: message[PROMPT]} if PROMPT in message else {}
        batch = _check(seen, observations)
        return Encode({k: v if k == PROMPT else np.array(v) for k, v in observations.items()}, batch)

    def _single(self, message: dict[str, Any]) -> Observations:
        """A single observation as a checked batch of one."""
        observation = self.keys.translate(message, self.seen, self.prompt)
        if not isinstance(observation.get(PROMPT, ""), str):
            raise WireError(str(bad("prompt", "text", type(observation[PROMPT]).__name__)))
        observations = unsqueeze(observation)
        _check(self.seen, observations)
        return observations


def released(message: Any) -> list[int]:
    """The handles a request gives back."""
    found = message.get(p.RELEASE, []) if isinstance(message, dict) else []
    return [handle for handle in found if type(handle) is int] if isinstance(found, list) else []


def _open_envelope(message: Mapping[str, Any]) -> dict[str, Any]:
    method, inner = message["method"], message["obs"]
    if not isinstance(inner, dict):
        raise WireError(str(bad("obs", "a dictionary", type(inner).__name__)))
    if not isinstance(method, str) or method not in _METHODS:
        raise unknown("method", f"{method}"[:40], _METHODS)
    flat = dict(inner)
    noise = flat.pop("noise", None)
    if method == "get_prefix_rep":
        return flat | {p.OP: "feature"}
    return flat if noise is None else flat | {p.NOISE: noise}


def _infer(message: Mapping[str, Any], spec: PolicySpec, observations: Observations) -> Infer:
    samples = _integer(message, p.SAMPLES, 1, 1, p.MAX_SAMPLES)
    noise = _noise(message[p.NOISE], spec) if p.NOISE in message else None
    if noise is not None:
        if p.SAMPLES in message and samples != noise.shape[1]:
            raise bad(p.SAMPLES, f"the {noise.shape[1]} noises given, or none of both", samples)
        samples = noise.shape[1]
    wants = message.get(p.RETURN, [])
    if not isinstance(wants, list) or not all(isinstance(name, str) for name in wants):
        raise bad(p.RETURN, f"a list of {' and '.join(_RETURNS)}", f"{wants!r}"[:80])
    for name in wants:
        if name not in _RETURNS:
            raise unknown("thing to return", name[:40], _RETURNS)
    return Infer(
        observations,
        noise,
        _integer(message, p.SEED, secrets.randbits(62), 0, 2**63 - 1),
        samples,
        p.SAMPLES in message or samples > 1,
        _flag(message, p.STEER),
        _flag(message, p.DETERMINISTIC),
        frozenset(wants),
    )


def _denoise(message: Mapping[str, Any], spec: PolicySpec) -> Denoise:
    handle = _integer(message, p.HANDLE, -1, 0, 2**63 - 1)
    noise = message.get(p.NOISE)
    if not isinstance(noise, np.ndarray) or noise.ndim != 4:
        raise bad(p.NOISE, "an array (B, K, H, D)", getattr(noise, "shape", type(noise).__name__))
    if noise.shape[0] * noise.shape[1] > p.MAX_SAMPLES:
        raise bad(p.NOISE, f"at most {p.MAX_SAMPLES} noises in one request", noise.shape[0] * noise.shape[1])
    return Denoise(handle, _tensor(noise, spec, noise.shape[0]))


def _noise(value: Any, spec: PolicySpec) -> torch.Tensor:
    """Noise of an infer request as (1, K, H, D)."""
    horizon, dim = spec.noise.shape
    noise = array(value, p.NOISE)
    if noise.shape == (1, dim):
        noise = np.repeat(noise, horizon, 0)
    if noise.ndim == 2:
        noise = noise[None]
    if noise.ndim != 3 or noise.shape[1:] != (horizon, dim) or not 1 <= noise.shape[0] <= p.MAX_SAMPLES:
        expected = f"shape ({horizon}, {dim}), (1, {dim}) or (K, {horizon}, {dim}) with K up to {p.MAX_SAMPLES}"
        raise bad(p.NOISE, expected, noise.shape)
    return _tensor(noise[None], spec, 1)


def _tensor(noise: np.ndarray, spec: PolicySpec, batch: int) -> torch.Tensor:
    if noise.dtype.kind not in "fiu":
        raise bad(p.NOISE, "numbers", f"dtype {noise.dtype}")
    with np.errstate(over="ignore"):
        tensor = torch.from_numpy(np.array(noise, dtype=np.float32, order="C"))
    spec.noise.check(tensor, batch)
    return tensor


def _check(spec: ObservationSpec, observations: Observations) -> int:
    try:
        return spec.check(observations)
    except (TypeError, ValueError) as error:  # what strangers put in lists and dictionaries
        raise error if isinstance(error, DsrlError) else bad("observation", "arrays and text", f"{error}") from error


def _integer(message: Mapping[str, Any], key: str, default: int, low: int, high: int) -> int:
    value = message.get(key, default)
    if isinstance(value, np.integer):
        value = int(value)
    if type(value) is not int or not low <= value <= high:
        raise bad(key, f"an integer from {low} to {high}", f"{value!r}"[:80])
    return value


def _flag(message: Mapping[str, Any], key: str) -> bool:
    value = message.get(key, True)
    if not isinstance(value, (bool, np.bool_)):
        raise bad(key, "true or false", f"{value!r}"[:80])
    return bool(value)
