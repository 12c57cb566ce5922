"""A run's journal: every finished episode, on the disk before it is learnt from.

``RUN/episodes/episode_000012.safetensors`` holds one episode: what the replay needs of it, and all its steps.
A file is written beside its place, flushed to the disk and moved onto it, and its content is hashed: a crash at
any moment leaves every finished episode whole. Nothing is ever changed or deleted.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .errors import bad
from .head import HeadInputs
from .observation import IMAGE_PREFIX
from .replay import Extras
from .run_dir import digest, disk_errors

FOLDER = "episodes"
_PNG, _ENDS = "#png", "#ends"
_PARTS = ("inputs", "extras", "decisions", "steps")


@dataclass(frozen=True)
class EpisodeRecord:
    """One finished episode of N decisions and T steps."""

    number: int
    """Training episodes begun before it, those that did not count included."""
    env_steps: int
    decisions_before: int
    """Of the run, before this episode."""
    prompt: str
    ending: str
    """See `dsrl_vla.tasks.live.Ending`; empty when the limit ended it."""
    terminated: bool
    success: bool
    inputs: HeadInputs
    """What the head looks at, N + 1 rows (N when terminated)."""
    extras: Extras
    """What the algorithm keeps beside observations; N or N + 1 rows."""
    decisions: dict[str, torch.Tensor]
    """``latent`` (N, n, d), zero where a person drove; ``rewards`` float64 (N, k); ``steps`` int64 (N,); ``human``
    bool (N,)."""
    steps: dict[str, np.ndarray]
    """Columns (T, …) of the offline format, with ``human`` and ``decision``, the decision a step belongs to."""
    fps: float = 0.0
    """Steps per second; 0 where nobody knows."""
    noise: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    """float32 (N, H, D), NaN where a person drove."""

    def __len__(self) -> int:
        return len(self.decisions["steps"])


class Journal:
    """The episodes of a run, in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def _path(self, number: int) -> Path:
        return self.folder / f"episode_{number:06d}.safetensors"

    def append(self, record: EpisodeRecord) -> Path:
        """Write an episode; when this returns it is on the disk."""
        from safetensors.torch import save

        tensors = {"noise": record.noise}
        for part in _PARTS:
            for key, value in getattr(record, part).items():
                packed = _pack(value) if part == "steps" and key.startswith(IMAGE_PREFIX) else {"": value}
                tensors |= {f"{part}.{key}{end}": torch.as_tensor(v) for end, v in packed.items()}
        plain = {k: v for k, v in vars(record).items() if k not in (*_PARTS, "noise")}
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        metadata = {"episode": json.dumps(plain), "sha256": digest(tensors)}
        path = self._path(record.number)
        temporary = path.with_name(path.name + ".tmp")
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(save(tensors, metadata))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(self.folder)
        return path

    def numbers(self) -> list[int]:
        """Numbers of the episodes on the disk, in order."""
        return sorted(int(path.stem.split("_")[1]) for path in self.folder.glob("episode_*.safetensors"))

    def read(self, number: int) -> EpisodeRecord:
        """Read an episode.

        Raises:
            DsrlError: the file is not what was written.
        """
        from safetensors import safe_open

        path = self._path(number)
        try:
            with safe_open(path, framework="pt") as file:
                metadata: dict[str, str] = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            plain: dict[str, Any] = json.loads(metadata["episode"])
        except Exception as error:
            raise bad(f"{path}", "an episode of a journal", f"{error}") from error
        if digest(tensors) != metadata["sha256"]:
            raise bad(f"{path}", "the content that was written (by its sha256)", "another", "The disk has changed it.")
        part = lambda name: {k.split(".", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{name}.")}
        steps = _unpack({k: v.numpy() for k, v in part("steps").items()})
        return EpisodeRecord(
            **plain,
            inputs=part("inputs"),
            extras=part("extras"),
            decisions=part("decisions"),
            steps=steps,
            noise=tensors["noise"],
        )

    def __iter__(self) -> Iterator[EpisodeRecord]:
        return (self.read(number) for number in self.numbers())


def _pack(images: np.ndarray) -> dict[str, np.ndarray]:
    """uint8 (T, H, W, 3) as PNGs one after the other, and where each ends."""
    files = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG", compress_level=1)
        files.append(buffer.getvalue())
    data = np.frombuffer(b"".join(files), dtype=np.uint8).copy()
    return {_PNG: data, _ENDS: np.cumsum([len(file) for file in files])}


def _unpack(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Columns with their images as they were."""
    found = {k: v for k, v in columns.items() if not k.endswith((_PNG, _ENDS))}
    for key in [k.removesuffix(_PNG) for k in columns if k.endswith(_PNG)]:
        parts = np.split(columns[key + _PNG], columns[key + _ENDS][:-1])
        found[key] = np.stack([np.asarray(Image.open(io.BytesIO(part.tobytes()))) for part in parts])
    return found


def _sync_folder(folder: Path) -> None:
    """Flush the directory's own entry, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
