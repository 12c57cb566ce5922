"""``head_config.json``: everything needed to build a head again, and to know which base it belongs to."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .errors import DsrlError, bad
from .networks import NetworkConfig
from .noise import NoiseLayout
from .pairing import Fingerprint
from .plain import from_plain
from .policy import PolicySpec

WEIGHTS, CONFIG = "head.safetensors", "head_config.json"
_LIMITS = {
    "network.width": 4096,
    "network.layers": 64,
    "state_dim": 65_536,
    "feature_dim": 65_536,
    "image_size": 512,
    "executed_steps": 4096,
    "action_dim": 4096,
    "sampler_steps": 10_000,
    "layout.space.horizon": 4096,
    "layout.space.dim": 4096,
}
"""What a config read from a file may ask for at most: it comes from strangers, and is built before it is used."""


@dataclass(frozen=True)
class HeadConfig:
    """What a head is, and whose."""

    layout: NoiseLayout
    state_dim: int
    feature_dim: int
    executed_steps: int
    adapter: str
    base_model_name_or_path: str
    revision: str = ""
    """The base's resolved revision, a commit."""
    cameras: tuple[str, ...] = ()
    """Cameras the head itself looks at; usually none, for the feature already holds them."""
    image_size: int = 32
    network: NetworkConfig = field(default_factory=NetworkConfig)
    dsrl_vla_version: str = ""
    action_dim: int = 0
    """Of the base, in environment units; 0: a head that does not know yet."""
    base_cameras: tuple[str, ...] = ()
    sampler_steps: int = 0
    fingerprint: Fingerprint | None = None
    """Of the base; None: a head that does not know, which is paired by name."""
    furthest: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Largest deviation of every column of "state" and "feature" in training; see `dsrl_vla.failsafe`."""

    @classmethod
    def for_base(cls, spec: PolicySpec, layout: NoiseLayout, network: NetworkConfig, **more: Any) -> HeadConfig:
        """The config of a new head for a base; with its ``fingerprint=`` the head knows it by more than name."""
        from . import __version__

        return cls(
            layout=layout,
            state_dim=spec.observation.state_dim,
            feature_dim=spec.feature_dim,
            executed_steps=spec.executed_steps,
            adapter=spec.adapter,
            base_model_name_or_path=spec.repo_id or spec.uri,
            revision=spec.revision,
            network=network,
            dsrl_vla_version=__version__,
            action_dim=spec.action_dim,
            base_cameras=tuple(sorted(spec.observation.cameras)),
            sampler_steps=spec.sampler_steps,
            **more,
        )

    @property
    def base_uri(self) -> str:
        """The base's URI, as `load_base` takes it."""
        name = self.base_model_name_or_path
        if ":" in name:  # a URI already
            return name
        return f"{self.adapter}:{name}" + (f"@{self.revision}" if self.revision else "")

    def to_json(self) -> str:
        """As ``head_config.json``; lists of numbers and flags on one line each."""
        text = json.dumps(asdict(self), indent=2)
        flat = re.sub(r"\[[^\[\]{}\"]*\]", lambda found: " ".join(found.group().split()), text)
        return flat.replace("[ ", "[").replace(" ]", "]") + "\n"

    @classmethod
    def from_json(cls, text: str) -> HeadConfig:
        """Read ``head_config.json``.

        Raises:
            DsrlError: a key is missing or unknown, a value of the wrong type, out of range, or larger than any
                head needs.
        """
        try:
            raw = json.loads(text)
            if not isinstance(raw, dict):
                raise TypeError(type(raw).__name__)
            _refuse_the_absurd(raw)
            config: HeadConfig = from_plain(cls, raw, "", f"key of {CONFIG}")
        except DsrlError:
            raise
        except (KeyError, TypeError, ValueError, RecursionError, OverflowError) as error:
            raise bad(CONFIG, "the keys of this version's HeadConfig", f"{error}") from error
        return config


def _refuse_the_absurd(raw: dict[str, Any]) -> None:
    """Before anything of the size it names is built."""
    for path, most in _LIMITS.items():
        value: Any = raw
        for part in path.split("."):
            value = value.get(part, 0) if isinstance(value, dict) else 0
        if isinstance(value, (int, float)) and not 0 <= value <= most:
            raise bad(f"{CONFIG}: {path}", f"from 0 to {most}", value)
    cameras = raw.get("cameras", ())
    if len(cameras) > 16:
        raise bad(f"{CONFIG}: cameras", "16 or fewer", len(cameras))
    for name in cameras:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", str(name)):
            raise bad(f"{CONFIG}: camera", "a name of letters, digits, _ and -", f"'{name}'"[:80])
