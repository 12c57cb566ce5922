"""Episodes as a LeRobotDataset, through LeRobot's own writer; `dsrl_vla.offline_sources` reads them back.

=============================  ====================  =======================================================
``observation.state``          float32 (S,)          before the action
``observation.images.<cam>``   image or video        before the action
``action``                     float32 (A,)          environment units
``next.reward``                float32 (1,)          of the action
``next.success``               bool (1,)
``next.done``                  bool (1,)             the last step of an episode
``next.terminated``            bool (1,)             … that ended there, and was not cut off
``noise``                      float32 (H, D)        what the base was given; 0 where a person drove
``decision``                   int64 (1,)            the decision of its episode that a step belongs to
``human``                      bool (1,)             whether a person drove
=============================  ====================  =======================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DsrlError, bad, missing_extra
from .journal import Journal
from .observation import IMAGE_PREFIX, PROMPT
from .offline import OfflineEpisode

_NAMES = {"reward": "next.reward", "success": "next.success"}
_KINDS = {"f": "float32", "b": "bool", "i": "int64", "u": "int64"}


def journalled(journal: Journal) -> Iterator[OfflineEpisode]:
    """Episodes of a run on a robot, every step of them."""
    for record in journal:
        noise = np.nan_to_num(record.noise.numpy())[record.steps["decision"]]
        yield {**record.steps, "noise": noise, "terminated": record.terminated, PROMPT: record.prompt}


def write_lerobot_dataset(
    folder: Path, episodes: Iterable[OfflineEpisode], *, fps: int, videos: bool = True, robot_type: str = ""
) -> int:
    """Write episodes of the offline format as a LeRobotDataset (v3); return how many.

    Args:
        folder: must not exist yet.
        videos: cameras as MP4 (lossy), else as images (lossless).

    Raises:
        MissingExtraError: `lerobot` or its extra `dataset` is not installed.
        DsrlError: `folder` exists; no episode; an episode whose columns are not those of the first.
    """
    try:
        from lerobot.datasets.lerobot_dataset import LeRobotDataset
    except ImportError as error:
        raise missing_extra("lerobot", "lerobot", "writing a LeRobotDataset") from error
    if folder.exists():
        raise bad("--out", "a folder that does not exist yet", f"'{folder}'")
    found = iter(episodes)
    first = next(found, None)
    if first is None:
        raise bad("export", "at least one episode", "none")
    columns = list(_columns(first))
    dataset = LeRobotDataset.create(
        folder.name, fps, _features(first, videos), root=folder, robot_type=robot_type or None, use_videos=videos
    )
    count = 0
    try:
        for episode in chain([first], found):
            if list(_columns(episode)) != columns:
                got = ", ".join(sorted(set(_columns(episode)) ^ set(columns)))
                raise DsrlError(f"export, episode {count}: expected the columns of the first, got others: {got}.")
            _add(dataset, episode)
            count += 1
    finally:
        dataset.finalize()  # without it the files have no footer, and nothing of them can be read
    return count


def _columns(episode: OfflineEpisode) -> dict[str, np.ndarray]:
    """All columns (T, …) under LeRobot's names."""
    length = len(episode["action"])
    found = {_NAMES.get(k, k): np.asarray(v) for k, v in episode.items() if k not in (PROMPT, "terminated")}
    done = np.arange(length) == length - 1
    return found | {"next.done": done, "next.terminated": done & bool(episode["terminated"])}


def _features(episode: OfflineEpisode, videos: bool) -> dict[str, dict[str, Any]]:
    features: dict[str, dict[str, Any]] = {}
    for name, values in _columns(episode).items():
        shape = values.shape[1:] or (1,)
        if name.startswith(IMAGE_PREFIX):
            kind, names = "video" if videos else "image", ["height", "width", "channels"]
            features[name] = {"dtype": kind, "shape": shape, "names": names}
        else:
            features[name] = {"dtype": _KINDS[values.dtype.kind], "shape": shape, "names": None}
    return features


def _add(dataset: Any, episode: OfflineEpisode) -> None:
    columns = {}
    for name, values in _columns(episode).items():
        if not name.startswith(IMAGE_PREFIX):
            values = values.astype(_KINDS[values.dtype.kind]).reshape(len(values), *(values.shape[1:] or (1,)))
        columns[name] = values
    for i in range(len(columns["action"])):
        dataset.add_frame({name: values[i] for name, values in columns.items()} | {"task": str(episode[PROMPT])})
    dataset.save_episode()
