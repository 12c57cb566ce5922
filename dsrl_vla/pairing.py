"""Which base a head belongs to, and whether the one at hand is it.

A head is trained on one frozen base and means nothing on another. Its config carries that base's fingerprint: a
hash of the weights, hashes of the processors (normalisation statistics and the like), and what the base did on a
fixed probe. The weights are hashed in bfloat16, so that a base is itself in float32 and in bfloat16; the probe is
compared as numbers, within a tolerance, so that another CPU, GPU or dtype does not make it another base. Names and
revisions decide only where nothing can be measured: a copy in another folder is the same base.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .errors import MismatchError, bad, unknown
from .noise import generators
from .observation import IMAGE_PREFIX, PROMPT, STATE, Observations

if TYPE_CHECKING:
    from .head_config import HeadConfig
    from .policy import FrozenPolicy

log = logging.getLogger(__name__)

STRUCTURE = ("noise shape", "state width", "feature width")
"""Differences that nobody can put up with: the head's network would not fit."""
NAMES = (
    *STRUCTURE,
    "noise prior",
    "live noise columns",
    "executed steps",
    "action width",
    "sampler steps",
    "cameras",
    "weights",
    "processors",
    "behaviour",
    "base",
    "revision",
)
"""Every difference there is, by the name that `allow_mismatch` takes."""
TOLERANCE = 0.2
"""Root mean square difference of the probe's actions, in deviations of each action over the probe."""
_OBSERVATIONS, _NOISES, _PROMPT = 2, 4, "pick up the object"


@dataclass(frozen=True)
class Fingerprint:
    """What tells a base from others. Empty parts are unknown and are not compared."""

    weights: str = ""
    """SHA-256 over all weights in name order, floating ones rounded to bfloat16."""
    processors: Mapping[str, str] = field(default_factory=dict)
    """Hash of each processor's facts, by name."""
    behaviour: tuple[float, ...] = ()
    """Actions on the probe: observations x noises x (first and last executed step) x action width, flattened."""


def take_fingerprint(base: FrozenPolicy) -> Fingerprint:
    """Hash the weights (some seconds for three billion) and make the probe's two small batches of decisions."""
    processors = {name: _hash(value) for name, value in base.processors().items()}
    try:
        behaviour = tuple(float(f"{x:.5g}") for x in probe_actions(base).flatten())
    except Exception as error:
        log.warning("%s: its behaviour is not part of its fingerprint: %s", base.spec.uri, error)
        behaviour = ()
    return Fingerprint(hash_weights(base.state_dict()), processors, behaviour)


def hash_weights(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of named tensors in name order, floating ones as bfloat16; empty for none."""
    if not weights:
        return ""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        held = tensor.detach().to(torch.bfloat16) if tensor.is_floating_point() else tensor.detach()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(held.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _hash(value: Any) -> str:
    """A short hash of JSON-able facts, numbers to six digits."""

    def plain(x: Any) -> Any:
        if isinstance(x, Mapping):
            return {str(k): plain(v) for k, v in x.items()}
        if isinstance(x, (list, tuple, np.ndarray, torch.Tensor)):
            return [plain(v) for v in (x if isinstance(x, (list, tuple)) else x.tolist())]
        x = x.item() if isinstance(x, np.generic) else x
        return f"{x:.6g}" if isinstance(x, float) else x

    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()[:16]


def probe_observations(base: FrozenPolicy) -> Observations:
    """The observations of the probe, the same for ever: seeded states and soft random pictures."""
    rng, spec = np.random.default_rng(0), base.spec.observation
    made: Observations = {STATE: rng.normal(0, 0.5, (_OBSERVATIONS, spec.state_dim)).astype(np.float32)}
    for name, shape in sorted(spec.cameras.items()):
        height, width, _ = shape or (64, 64, 3)
        coarse = rng.integers(0, 256, (_OBSERVATIONS, 4, 4, 3), dtype=np.uint8)
        tiles = np.ones((1, -(-height // 4), -(-width // 4), 1), np.uint8)
        made[IMAGE_PREFIX + name] = np.ascontiguousarray(np.kron(coarse, tiles)[:, :height, :width])
    return made | ({PROMPT: [_PROMPT] * _OBSERVATIONS} if spec.prompt else {})


def probe_actions(base: FrozenPolicy) -> np.ndarray:
    """What a base does on the probe: float64 (observations, noises, 2, A), first and last executed step."""
    noise = base.spec.noise.sample(generators(list(range(_OBSERVATIONS))), _NOISES)
    actions = base.denoise(base.encode(probe_observations(base)), noise)[:, :, : base.spec.executed_steps]
    ends = actions[:, :, [0, -1]].double().numpy()
    if not np.isfinite(ends).all():
        raise bad("the probe's actions", "finite numbers", "NaN or infinity")
    return ends


def distance(mine: Sequence[float], theirs: Sequence[float], action_dim: int) -> float:
    """How far two behaviours on the probe are apart, in deviations of each action column over the probe."""
    if len(mine) != len(theirs) or len(mine) % action_dim:
        return float("inf")
    a, b = (np.asarray(x).reshape(-1, action_dim) for x in (mine, theirs))
    scale = np.maximum(a.std(0), 1e-3 * np.abs(a).max(0) + 1e-6)
    return float(np.sqrt((((a - b) / scale) ** 2).mean()))


def differences(config: HeadConfig, base: FrozenPolicy) -> dict[str, tuple[Any, Any]]:
    """What sets a base apart from the one a head was trained on: name -> (the head's, this base's)."""
    spec, space = base.spec, config.layout.space
    pairs: dict[str, tuple[Any, Any]] = {
        "noise shape": (space.shape, spec.noise.shape),
        "state width": (config.state_dim, spec.observation.state_dim),
        "feature width": (config.feature_dim, spec.feature_dim),
        "noise prior": (space.prior, spec.noise.prior),
        "live noise columns": (space.live, spec.noise.live),
        "executed steps": (config.executed_steps, spec.executed_steps),
    }
    if config.action_dim:  # heads of version 0.1.0 do not say
        pairs["action width"] = (config.action_dim, spec.action_dim)
        pairs["sampler steps"] = (config.sampler_steps, spec.sampler_steps)
        pairs["cameras"] = (config.base_cameras, tuple(sorted(spec.observation.cameras)))
    found = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    return found | (_identity(config, base) if not set(found) & set(STRUCTURE) else {})


def _identity(config: HeadConfig, base: FrozenPolicy) -> dict[str, tuple[Any, Any]]:
    """Differences of weights, processors and behaviour; of names, where none of these can be compared."""
    mine, found = config.fingerprint, {}
    theirs = base.fingerprint() if mine else None
    measured = False
    if mine and theirs:
        if mine.weights and theirs.weights:
            measured = True
            if mine.weights != theirs.weights:
                found["weights"] = (f"sha256 {mine.weights[:12]}", theirs.weights[:12])
        if mine.processors and theirs.processors:
            names = sorted(mine.processors.keys() | theirs.processors.keys())
            other = [n for n in names if mine.processors.get(n) != theirs.processors.get(n)]
            if other:
                found["processors"] = ("its own", f"other values of {', '.join(other)}")
        if mine.behaviour and theirs.behaviour:
            measured = True
            apart = distance(mine.behaviour, theirs.behaviour, base.spec.action_dim)
            if not apart <= TOLERANCE:
                words = f"others, {apart:.2g} deviations away (tolerance {TOLERANCE:g})"
                found["behaviour"] = ("its actions on the probe", words)
    if not measured:
        name = base.spec.repo_id or base.spec.uri
        if config.base_model_name_or_path != name:
            found["base"] = (config.base_model_name_or_path, name)
        elif config.revision and base.spec.revision and config.revision != base.spec.revision:
            found["revision"] = (config.revision, base.spec.revision)
    return found


def check_pair(config: HeadConfig, base: FrozenPolicy, allow_mismatch: Sequence[str] = ()) -> None:
    """Refuse a base that a head was not trained on.

    Args:
        allow_mismatch: names out of `NAMES` of differences to put up with.

    Raises:
        MismatchError: names every difference. UnknownNameError: `allow_mismatch` names no difference.
    """
    for name in allow_mismatch:
        if name not in NAMES:
            raise unknown("mismatch", name, NAMES)
    allowed = set(allow_mismatch) - set(STRUCTURE)
    found = {name: pair for name, pair in differences(config, base).items() if name not in allowed}
    if not found:
        return
    said = "; ".join(f"{name}: expected {mine}, got {theirs}" for name, (mine, theirs) in found.items())
    if set(found) & set(STRUCTURE):
        fix = "The head's network does not fit this base."
    else:
        fix = f"Load the base it was trained on, or say allow_mismatch={sorted(found)}."
    raise MismatchError(f"head for '{config.base_model_name_or_path}' on '{base.spec.uri}': {said}. {fix}")
