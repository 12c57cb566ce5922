"""openpi's observation keys and ours, one declaration per family of openpi configs.

openpi names a robot's inputs after the dataset; here an observation is LeRobot's dictionary. Camera names are those
of LeRobot's environments and datasets for the same robot, so that a task and a base meet without renaming.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from dsrl_vla.errors import bad
from dsrl_vla.observation import IMAGE_PREFIX, PROMPT, STATE, Observations, ObservationSpec

Path = tuple[str, ...]
"""Where a value lies in openpi's nested dictionary. A slash inside a key is part of the key."""


@dataclass(frozen=True)
class KeyMap:
    """How one family of openpi configs names what our observation holds."""

    cameras: Mapping[str, Path]
    """Our camera -> openpi's place for it."""
    state: Mapping[Path, int]
    """openpi's place -> its width; together, in this order, our state."""
    executed_steps: int
    """Steps of a chunk that openpi's own example for this robot executes before it asks again."""
    channels_first: bool = False
    """Whether openpi wants these images as (3, H, W)."""

    @property
    def spec(self) -> ObservationSpec:
        """What an observation must hold."""
        return ObservationSpec(sum(self.state.values()), dict.fromkeys(self.cameras), prompt=True)

    def translate(self, observations: Observations, batch: int) -> list[dict[str, Any]]:
        """A checked batch as `batch` dictionaries with openpi's keys, of its own but for the pictures."""
        rows = []
        for index in range(batch):
            row: dict[str, Any] = {"prompt": observations[PROMPT][index]}
            for camera, path in self.cameras.items():
                image = np.asarray(observations[IMAGE_PREFIX + camera][index])
                _put(row, path, image.transpose(2, 0, 1) if self.channels_first else image)
            state, start = np.asarray(observations[STATE][index]), 0
            for path, width in self.state.items():
                _put(row, path, state[start : start + width].copy())
                start += width
            rows.append(row)
        return rows


def _put(row: dict[str, Any], path: Path, value: Any) -> None:
    for key in path[:-1]:
        row = row.setdefault(key, {})
    row[path[-1]] = value


LIBERO = KeyMap(
    cameras={"image": ("observation/image",), "image2": ("observation/wrist_image",)},
    state={("observation/state",): 8},
    executed_steps=5,
)
DROID = KeyMap(
    cameras={
        "exterior_1_left": ("observation/exterior_image_1_left",),
        "wrist_left": ("observation/wrist_image_left",),
    },
    state={("observation/joint_position",): 7, ("observation/gripper_position",): 1},
    executed_steps=8,
)
ALOHA = KeyMap(
    cameras={name: ("images", name) for name in ("cam_high", "cam_left_wrist", "cam_right_wrist")},
    state={("state",): 14},
    executed_steps=25,
    channels_first=True,
)
ALOHA_SIM = KeyMap(
    cameras={"top": ("images", "cam_high")}, state={("state",): 14}, executed_steps=10, channels_first=True
)

FAMILIES = (LIBERO, DROID, ALOHA, ALOHA_SIM)
_BY_CONFIG = {"pi0_aloha_sim": ALOHA_SIM}
_BY_TRANSFORM = {"LiberoInputs": LIBERO, "DroidInputs": DROID, "AlohaInputs": ALOHA}


def keys_for(config: str, transforms: Iterable[Any]) -> KeyMap:
    """The keys of a config, by its name where a family has two forms, else by the input transform it uses.

    Args:
        config: openpi's name of the config; empty for a policy that came without one.

    Raises:
        DsrlError: none of its transforms belongs to a family known here; says how to declare the keys.
    """
    if config in _BY_CONFIG:
        return _BY_CONFIG[config]
    names = [type(transform).__name__ for transform in transforms]
    found = [_BY_TRANSFORM[name] for name in names if name in _BY_TRANSFORM]
    if not found:
        raise bad(
            f"openpi policy '{config}'" if config else "openpi policy",
            f"an input transform among {', '.join(_BY_TRANSFORM)}",
            ", ".join(names) or "none",
            "Declare the keys of your own: OpenPi(policy, keys=KeyMap(...)), see dsrl_vla.adapters.openpi.",
        )
    return found[0]
