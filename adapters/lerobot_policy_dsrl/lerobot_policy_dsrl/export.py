"""Write a steered policy's folder: the head, and which base it belongs to. No weight of the base is copied."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsrl_vla import SteeringHead
from dsrl_vla.adapters.lerobot.policy import camera_of
from dsrl_vla.errors import bad
from dsrl_vla.observation import IMAGE_PREFIX
from dsrl_vla.pairing import check_pair
from dsrl_vla.policy import FrozenPolicy
from lerobot.configs import FeatureType, PolicyFeature

from .configuration_dsrl import DsrlConfig
from .processor_dsrl import make_dsrl_pre_post_processors

ANY_SIZE = (3, 224, 224)  # of a camera whose images the base resizes anyway


def features_of(base: FrozenPolicy, head: SteeringHead) -> dict[str, PolicyFeature]:
    """What base and head look at, under LeRobot's names: the base's own, if it is a policy of LeRobot's."""
    spec = base.spec.observation
    own: Any = getattr(base, "image_features", None)
    if own is None:
        own = {
            f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, *shape[:2]) if shape else ANY_SIZE)
            for name, shape in spec.cameras.items()
        }
    cameras = dict(own)
    seen = set(map(camera_of, cameras))
    own_of_head = [IMAGE_PREFIX + name for name in head.config.cameras if name not in seen]
    cameras |= dict.fromkeys(own_of_head, PolicyFeature(FeatureType.VISUAL, ANY_SIZE))
    return {**cameras, "observation.state": PolicyFeature(FeatureType.STATE, (spec.state_dim,))}


def write_policy(
    out: Path,
    head: SteeringHead,
    base: FrozenPolicy,
    dtype: str = "float32",
    options: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that LeRobot's ``--policy.path`` takes; `dsrl_vla.SteeringHead.from_pretrained` takes it too.

    Args:
        options: what `load_base` was given beside dtype and device.

    Raises:
        DsrlError: the head is not for this base; `out` exists.
    """
    check_pair(head.config, base)
    if out.exists():
        raise bad("--out", "a folder that does not exist yet", f"'{out}'")
    out.mkdir(parents=True)
    steps = base.spec.executed_steps
    config = DsrlConfig(
        base=base.spec.pinned_uri,
        base_dtype=dtype,
        base_options=dict(options or {}),
        chunk_size=steps,
        n_action_steps=steps,
        input_features=features_of(base, head),
        output_features={"action": PolicyFeature(FeatureType.ACTION, (base.spec.action_dim,))},
        device="cpu",
    )
    config._save_pretrained(out)
    head.save_pretrained(out)
    for pipeline in make_dsrl_pre_post_processors(config):
        pipeline.save_pretrained(out)
