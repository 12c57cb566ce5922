"""Episodes of a Robomimic hdf5 file (``low_dim.hdf5``, ``image.hdf5``), one per ``data/demo_<i>``, by number.

``observation.state`` is made of these keys of ``obs``, in this order, which is the one of DPPO's bases and of the
``robosuite:`` tasks:

===========================  =======  ==================================================================
``robot0_eef_pos``           3        metres
``robot0_eef_quat``          4        xyzw
``robot0_gripper_qpos``      2
``robot1_…``                 3, 4, 2  where the file has a second robot (Transport)
``object``                   10-41    Lift 10, Can 14, Square 14, Transport 41; left out where the file has none
===========================  =======  ==================================================================

``obs/<camera>_image`` becomes ``observation.images.<camera>``. `success` is a reward of 1 or more. An episode counts
as terminated if its last step is marked done and is a success: Robomimic marks the end of a recording as done too.
Rewards are the file's, 1 on success and 0 before; ``--offline.relabel sparse_success`` gives the tasks' -1 and 0.
Layout by reading robomimic and irom-princeton/dppo.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .errors import bad, missing_extra
from .observation import IMAGE_PREFIX, PROMPT, STATE
from .offline import OfflineEpisode

_ARM = {"eef_pos": 3, "eef_quat": 4, "gripper_qpos": 2}
OBJECT_WIDTHS = {"Lift": 10, "PickPlaceCan": 14, "NutAssemblySquare": 14, "TwoArmTransport": 41}
"""Width of `object` by robosuite's name of the environment."""
_IMAGE = "_image"


def read_robomimic(path: Path) -> Iterator[OfflineEpisode]:
    """The episodes of a file.

    Raises:
        MissingExtraError: `h5py` is not installed.
        DsrlError: no such file format; a key is missing, or its width or length is not what it should be.
    """
    try:
        import h5py
    except ImportError as error:
        raise missing_extra("h5py", "robomimic", f"reading '{path}'") from error
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise bad(f"offline data '{path}'", "an hdf5 file", f"one that h5py cannot open ({error})") from error
    with file:
        demos = [name for name in file.get("data", ()) if name.startswith("demo_") and name[5:].isdigit()]
        if not demos:
            raise bad(f"offline data '{path}'", "groups data/demo_0, data/demo_1, …", ", ".join(file) or "nothing")
        environment = _environment(file["data"])
        for name in sorted(demos, key=lambda demo: int(demo[5:])):
            yield _episode(file["data"][name], f"{path}: data/{name}", environment)


def _environment(data: Any) -> str:
    """robosuite's name of the environment; empty where the file does not tell."""
    try:
        return str(json.loads(data.attrs["env_args"])["env_name"])
    except (KeyError, TypeError, ValueError):
        return ""


def _episode(demo: Any, where: str, environment: str) -> OfflineEpisode:
    from .tasks.robosuite import PROMPTS  # loads no robosuite

    for key in ("obs", "actions", "rewards", "dones"):
        if key not in demo:
            raise bad(where, f"a field '{key}'", ", ".join(sorted(demo)) or "nothing")
    action = np.asarray(demo["actions"], dtype=np.float32)
    if action.ndim != 2 or not len(action):
        raise bad(f"{where}/actions", "shape (T, A) with T > 0", action.shape)
    success = np.asarray(demo["rewards"]) >= 1
    episode: OfflineEpisode = {
        STATE: _state(demo["obs"], f"{where}/obs", environment),
        "action": action,
        "reward": np.asarray(demo["rewards"], dtype=np.float64),
        "success": success,
    }
    for key in demo["obs"]:
        if key.endswith(_IMAGE):
            episode[IMAGE_PREFIX + key.removesuffix(_IMAGE)] = _image(demo["obs"][key], f"{where}/obs/{key}")
    done = np.asarray(demo["dones"])
    for key, values in [*episode.items(), ("dones", done)]:
        if len(values) != len(action):
            raise bad(f"{where}: {key}", f"{len(action)} rows, as actions has", len(values))
    episode["terminated"] = bool(done[-1]) and bool(success[-1])
    if environment in PROMPTS:
        episode[PROMPT] = PROMPTS[environment]
    return episode


def _image(values: Any, where: str) -> np.ndarray:
    if values.dtype != np.uint8 or values.ndim != 4 or values.shape[3] != 3:
        raise bad(where, "uint8 (T, H, W, 3)", f"{values.dtype} {values.shape}")
    return np.asarray(values)


def _state(obs: Any, where: str, environment: str) -> np.ndarray:
    """float32 (T, S)."""
    robots = ["robot0", "robot1"] if "robot1_eef_pos" in obs else ["robot0"]
    widths: dict[str, int | None] = {f"{robot}_{key}": width for robot in robots for key, width in _ARM.items()}
    if "object" in obs:
        widths["object"] = OBJECT_WIDTHS.get(environment)
    order = ", ".join(key if width is None else f"{key} ({width})" for key, width in widths.items())
    for key, width in widths.items():
        if key not in obs:
            raise bad(where, f"the keys {order}", ", ".join(sorted(obs)) or "nothing")
        shape = obs[key].shape
        if len(shape) != 2 or width not in (None, shape[1]):
            raise bad(f"{where}/{key}", f"shape (T, {width or 'width'}), of {order}", shape)
    lengths = {len(obs[key]) for key in widths}
    if len(lengths) > 1:
        raise bad(where, "as many rows in every key of the state", sorted(lengths))
    return np.concatenate([np.asarray(obs[key], dtype=np.float32) for key in widths], axis=1)
