"""Readers of offline episodes: npz files, Hugging Face datasets, LeRobotDatasets; and the writer of npz files.

Robomimic's hdf5 files are read by `dsrl_vla.offline_robomimic`.

The npz format: all steps of all episodes one after the other, one array per field.

======================================  =====================  ==================================================
``episode_index``                       int (N,)               which episode a step belongs to, in order
``observation.state``                   float (N, S)           before the action
``observation.images.<camera>``         uint8 (N, H, W, 3)     before the action
``action``                              float (N, A)           environment units
``reward``                              float (N,)             of the action
``terminated``                          bool (N,)              true on the last step of an episode that ended there
``success``                             bool (N,), optional    for relabelling
``noise``                               float (N, H, D), opt.  what the base was given
``task``                                str, () or (N,)        the prompt
======================================  =====================  ==================================================
"""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .entry_points import imported
from .errors import DsrlError, bad, missing_extra
from .inversion import FAR, FAR_WORDS
from .observation import IMAGE_PREFIX, PROMPT
from .offline import OfflineConfig, OfflineEpisode, OfflineLoader, Relabel, demonstrations, sparse_success
from .offline_robomimic import read_robomimic
from .replay import Replay
from .run_dir import replacing

log = logging.getLogger(__name__)
_SHIPPED = {"sparse_success": sparse_success, "demonstrations": demonstrations}
_SCALARS = ("reward", "success", "human", "decision", "next.terminated")
OBS_IMAGE = "observation.image"  # LeRobot's name of an only camera
_NAMES = {"next.reward": "reward", "next.success": "success"}  # LeRobot's columns
_ENDS = ("terminated", "next.terminated", "success", "next.done")
"""What tells whether an episode terminated, best first: `next.done` does not tell a success from a cut."""


def read_episodes(config: OfflineConfig) -> Iterator[OfflineEpisode]:
    """The episodes a config names, one source after the other, relabelled as it says.

    Raises:
        DsrlError: no such file or folder; a field is missing; the relabelling function cannot be imported.
    """
    paths = [Path(source).expanduser() for source in config.sources]
    for path in paths:
        if not path.exists():
            raise bad("offline.source", "an .npz or .hdf5 file or the folder of a dataset", f"'{path}'")
    relabel = load_relabel(config.relabel) if config.relabel else lambda episode: episode
    read = (islice(named_problems(str(path), reader_of(path)(path)), config.episodes) for path in paths)
    return (relabel(episode) for episode in chain.from_iterable(read))


def fill(replay: Replay, loader: OfflineLoader) -> None:
    """Let a replay hold the episodes that the loader's config names; it says when there is no room for all of them.

    Raises:
        DsrlError: there is not one transition in them.
    """
    with tqdm(unit="episode", desc="offline data", disable=None) as bar:
        loader.fill(replay, read_episodes(loader.config), bar.update)
    if not replay.added:
        chunk = loader.base.spec.executed_steps
        wanted = f"an episode that terminated, or one of more than the {chunk} steps of a chunk"
        raise bad(f"offline.source {', '.join(loader.config.sources)}", wanted, "none, so nothing to learn from")
    if loader.reach and (reach := sum(loader.reach) / len(loader.reach)) < FAR:
        words = (
            "offline data: the noise found for recorded actions comes hardly nearer to them than random noise does "
            "(reach %.2f of 1): %s, or noise.bound or noise.layout keeps it from it."
        )
        log.warning(words, reach, FAR_WORDS)
    if replay.added > replay.capacity:
        words = (
            "offline data: train.replay_capacity has room for the last %d of %d decisions; the others are left out."
        )
        log.warning(words, replay.capacity, replay.added)


def reader_of(path: Path) -> Callable[[Path], Iterator[OfflineEpisode]]:
    """What reads this file or folder."""
    if path.suffix in (".hdf5", ".h5"):
        return read_robomimic
    return read_npz if path.is_file() else read_dataset


def named_problems(source: str, episodes: Iterator[OfflineEpisode]) -> Iterator[OfflineEpisode]:
    """The episodes; what a reader trips over is told as what is wrong with the source.

    Raises:
        DsrlError: it is not what its name says, damaged, or without episodes.
    """
    expected, count = "an .npz or .hdf5 file or the folder of a dataset, whole and with episodes", 0
    try:
        for episode in episodes:
            count += 1
            yield episode
    except DsrlError:
        raise
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as error:
        raise bad(f"offline.source '{source}'", expected, f"{type(error).__name__}: {error}") from error
    if not count:
        raise bad(f"offline.source '{source}'", expected, "no episode")


def read_npz(path: Path) -> Iterator[OfflineEpisode]:
    """Episodes of an npz file in the format above; no pickled objects."""
    with np.load(path, allow_pickle=False) as archive:
        columns = {name: archive[name] for name in archive.files}
    yield from split(columns, str(path))


def split(columns: dict[str, np.ndarray], name: str) -> Iterator[OfflineEpisode]:
    """Cut columns over all steps into episodes."""
    if "episode_index" not in columns:
        raise bad(f"offline data '{name}'", "a field 'episode_index'", ", ".join(sorted(columns)))
    index = columns.pop("episode_index")
    if not len(index):
        return
    edges = np.flatnonzero(np.diff(index)) + 1
    if len(np.unique(index)) != len(edges) + 1:
        wanted = "the steps of every episode one after the other"
        raise bad(f"offline data '{name}': episode_index", wanted, "episodes that are mixed; is it shuffled?")
    for first, last in zip([0, *edges], [*edges, len(index)], strict=True):
        episode: OfflineEpisode = {k: v[first:last] for k, v in columns.items() if np.ndim(v)}
        episode |= {k: v[()] for k, v in columns.items() if not np.ndim(v)}
        for name in {*_SCALARS, "terminated"} & set(episode):
            if np.shape(episode[name])[1:] == (1,):
                episode[name] = episode[name][:, 0]
        if np.ndim(episode.get(PROMPT, "")):
            episode[PROMPT] = episode[PROMPT][0]
        if "terminated" in episode:
            episode["terminated"] = bool(np.asarray(episode["terminated"])[-1])
        yield episode


def write_npz(path: Path, episodes: Iterable[OfflineEpisode]) -> None:
    """Write episodes in the format above, compressed; all or nothing."""
    columns: dict[str, list[np.ndarray]] = {}
    for number, episode in enumerate(episodes):
        length = len(episode["action"])
        ended = np.zeros(length, dtype=bool)
        ended[-1] = bool(episode["terminated"])
        rows = {k: np.asarray(v) for k, v in episode.items() if k not in (PROMPT, "terminated")}
        rows |= {"episode_index": np.full(length, number), "terminated": ended}
        if PROMPT in episode:
            rows[PROMPT] = np.full(length, str(episode[PROMPT]))
        for key, values in rows.items():
            columns.setdefault(key, []).append(values)
    arrays: dict[str, Any] = {key: np.concatenate(parts) for key, parts in columns.items()}
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def read_dataset(folder: Path) -> Iterator[OfflineEpisode]:
    """Episodes of a Hugging Face dataset on disk, or of a LeRobotDataset (``meta/info.json``).

    Columns as in the npz format, or under LeRobot's names (``next.reward``, ``next.success``, ``next.done``). Where
    several tell how an episode ended, the first of `_ENDS` does.

    Raises:
        MissingExtraError: `datasets`, or for a LeRobotDataset `lerobot`, is not installed.
    """
    if (folder / "meta" / "info.json").exists():
        yield from _read_lerobot(folder)
        return
    try:
        import datasets
    except ImportError as error:
        raise missing_extra("datasets", "datasets", f"reading '{folder}'") from error
    table = datasets.load_from_disk(str(folder)).with_format("numpy")
    columns = {_NAMES.get(name, name): _column(table, name) for name in table.column_names}
    ends = [name for name in _ENDS if name in columns]
    if ends:
        columns["terminated"] = columns[ends[0]]
    for name in set(ends) - {"terminated", "success"}:
        del columns[name]
    yield from split(columns, str(folder))


def _column(table: Any, name: str) -> np.ndarray:
    values = table[name][:]
    if name.startswith(IMAGE_PREFIX):
        return np.stack([np.asarray(v, dtype=np.uint8) for v in values])
    return np.asarray(values)


def _read_lerobot(folder: Path) -> Iterator[OfflineEpisode]:
    try:
        from lerobot.datasets.lerobot_dataset import LeRobotDataset
    except ImportError as error:
        raise missing_extra("lerobot", "lerobot", f"reading the LeRobotDataset '{folder}'") from error
    dataset = LeRobotDataset(folder.name, root=folder)
    rows: list[dict[str, Any]] = []
    for i in range(len(dataset)):
        row = dataset[i]
        if rows and int(row["episode_index"]) != int(rows[-1]["episode_index"]):
            yield _lerobot_episode(rows)
            rows = []
        rows.append(row)
    if rows:
        yield _lerobot_episode(rows)


_LEROBOTS_OWN = ("timestamp", "frame_index", "episode_index", "index", "task_index", PROMPT, "next.done")


def _lerobot_episode(rows: list[dict[str, Any]]) -> OfflineEpisode:
    """LeRobot's images are float CHW in [0, 1]; its `next.done` does not tell a success from a cut."""
    episode: OfflineEpisode = {PROMPT: rows[0]["task"]}
    for key in rows[0]:
        if key in _LEROBOTS_OWN or key.endswith("_is_pad"):
            continue
        name = _NAMES.get(key, key)
        if name == OBS_IMAGE:
            name = f"{IMAGE_PREFIX}image"
        values = np.stack([np.asarray(row[key]) for row in rows])
        if name.startswith(IMAGE_PREFIX):
            values = (values.transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)
        elif name in _SCALARS:
            values = values.reshape(len(rows), -1)[:, 0]
        episode[name] = values
    told = [episode.pop(name) for name in _ENDS[:2] if name in episode] or [episode.get("success", np.zeros(1))]
    episode["terminated"] = bool(np.max(told[0]))
    return episode


def load_relabel(name: str) -> Relabel:
    """A shipped relabelling by name (``sparse_success``), or ``package.module:function``.

    Raises:
        DsrlError: it cannot be imported.
    """
    if name in _SHIPPED:
        return _SHIPPED[name]
    if ":" not in name:
        raise bad("offline.relabel", f"{', '.join(_SHIPPED)} or package.module:function", f"'{name}'")
    found: Relabel = imported(name, "offline.relabel")
    return found
