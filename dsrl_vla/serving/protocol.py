"""The extension to openpi's protocol: reserved keys, and what a server says about its base when a client connects.

openpi's protocol is a websocket: the server opens with its metadata, then answers every observation with a
dictionary that holds ``actions``. Ours is that, with keys under ``dsrl/`` which an unaware peer does not look at:

===================== ==============================================================================================
in a request          meaning
===================== ==============================================================================================
``dsrl/op``           infer (default), feature, encode, denoise, sha256, status
``dsrl/noise``        infer: float (H, D), (1, D) for every step alike, or (K, H, D); denoise: float32 (B, K, H, D)
``dsrl/seed``         integer: of the base's own noise, or of the head's sample
``dsrl/num_samples``  K: that many chunks behind one prefix, actions (K, H, A)
``dsrl/steer``        false: the base's own noise, whatever head is served
``dsrl/deterministic`` false: a sample of the head, not its mode
``dsrl/return``       list of feature, noise: also send float32 (F,), (K, H, D)
``dsrl/handle``       denoise: the encoding to start from
``dsrl/release``      list of handles that are no longer needed
===================== ==============================================================================================

A reply says where its noise came from in ``dsrl/source``: request, head or prior (the base's own). A client that sent
noise and does not read "request" there has been ignored. Refusals come as ``dsrl/error``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..errors import bad
from .wire import WireError

if TYPE_CHECKING:
    from ..policy import PolicySpec

PROTOCOL = 1
MAX_SAMPLES = 256
"""In one request: rows to encode; noises of a row; and all noises to denoise."""
META = "dsrl"
OP, NOISE, SEED, SAMPLES, STEER = "dsrl/op", "dsrl/noise", "dsrl/seed", "dsrl/num_samples", "dsrl/steer"
DETERMINISTIC, RETURN, HANDLE, RELEASE = "dsrl/deterministic", "dsrl/return", "dsrl/handle", "dsrl/release"
SOURCE, FEATURE, ERROR, FALLBACK, ACTIONS = "dsrl/source", "dsrl/feature", "dsrl/error", "dsrl/fallback", "actions"
REQUEST_KEYS = (OP, NOISE, SEED, SAMPLES, STEER, DETERMINISTIC, RETURN, HANDLE, RELEASE)
API_KEY_VARIABLE = "DSRL_VLA_API_KEY"

Kind = str
"""Of an error: invalid (the request), gone (its handle), internal (the server; see its log)."""


def metadata(spec: PolicySpec, *, handles: bool, **more: Any) -> dict[str, Any]:
    """What a server opens with.

    Args:
        handles: whether it keeps encodings (ops encode and denoise); without, a client sends each observation again
            for every noise.
        more: ``layout``, ``head``, ``sha256``, ``fingerprint``; for people and for checks.
    """
    space = spec.noise
    return {
        META: {
            "protocol": PROTOCOL,
            "handles": handles,
            "noise_shape": list(space.shape),
            "num_steps": spec.sampler_steps,
            "spec": spec_to_plain(spec),
            **more,
        }
    }


def spec_to_plain(spec: PolicySpec) -> dict[str, Any]:
    """A `PolicySpec` as plain data."""
    tree = asdict(spec)
    tree["noise"]["live"] = list(spec.noise.live)
    tree["observation"]["cameras"] = {name: shape and list(shape) for name, shape in spec.observation.cameras.items()}
    return tree


def spec_from_plain(tree: Any) -> PolicySpec:
    """Undo `spec_to_plain`, trusting nothing.

    Raises:
        DsrlError: a key is missing or unknown, or a value is of another type or out of range.
    """
    from ..noise import NoiseSpace
    from ..observation import ObservationSpec
    from ..policy import PolicySpec

    whole = dict(_mapping(tree, "spec"))
    noise = dict(_mapping(whole.pop("noise", None), "spec.noise"))
    seen = dict(_mapping(whole.pop("observation", None), "spec.observation"))
    cameras = _mapping(seen.pop("cameras", None), "spec.observation.cameras")
    counts = ("action_dim", "executed_steps", "sampler_steps", "feature_dim")
    for fields, names in ((whole, counts), (noise, ("horizon", "dim")), (seen, ("state_dim",))):
        for name in names:
            value = fields.get(name)
            if type(value) is not int or not 0 <= value <= 100_000:
                raise _refuse(f"spec.{name}", "a count", value)
    for name in ("uri", "adapter", "dtype", "repo_id", "revision"):
        if not isinstance(whole.get(name), str):
            raise _refuse(f"spec.{name}", "text", whole.get(name))
    live = noise.pop("live", None)
    if not isinstance(live, list) or len(live) != noise["dim"] or not all(isinstance(flag, bool) for flag in live):
        raise _refuse("spec.noise.live", "a list of flags", live)
    try:
        return PolicySpec(
            noise=NoiseSpace(**noise, live=tuple(live)),
            observation=ObservationSpec(cameras={str(k): _size(v) for k, v in cameras.items()}, **seen),
            **whole,
        )
    except TypeError as error:
        raise _refuse("spec", "the fields of a PolicySpec", error) from error


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise _refuse(name, "a mapping", value)
    return value


def _size(value: Any) -> tuple[int, int, int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 3 or any(type(n) is not int or n < 1 for n in value):
        raise _refuse("spec.observation.cameras", "sizes (H, W, 3) or none", value)
    return value[0], value[1], value[2]


def _refuse(field: str, expected: str, got: object) -> WireError:
    return WireError(str(bad(f"server metadata, {field}", expected, f"{got!r}"[:80])))
