"""A run's directory: what is written there, when, and how a crash leaves it whole.

Files are written beside their place and moved onto it, so that a reader never sees half of one. Checkpoints
are safetensors and JSON: no pickle.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .errors import DsrlError, bad

STATE, TENSORS = "state.json", "tensors.safetensors"
KEEP = 2


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into a sentence."""
    try:
        yield
    except Exception as error:
        text = str(error)
        number = getattr(error, "errno", None)
        if number == errno.ENOSPC or "No space left" in text or "os error 28" in text:
            free = shutil.disk_usage(path if path.exists() else path.parent).free / 1e6
            raise DsrlError(
                f"{path}: expected room on the disk, got a full one ({free:.0f} MB free). Free some and go on with "
                "--resume; what was written before is intact."
            ) from error
        if number in (errno.EACCES, errno.EROFS):
            raise bad(str(path), "a folder that can be written", text) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a file's content, all or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path.parent):
        temporary.write_text(text)
        os.replace(temporary, path)


def write_json(path: Path, data: Any) -> None:
    """Replace a JSON file, all or nothing."""
    write_text(path, json.dumps(data, indent=2) + "\n")


class Metrics:
    """``metrics.jsonl``: one line per report, readable while the run goes on."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, row: dict[str, Any]) -> None:
        """Add a line."""
        with disk_errors(self.path.parent), self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All lines; a last one that a crash cut short is left out."""
        found = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return found

    def truncate(self, env_steps: int) -> None:
        """Forget what a resumed run is about to do again."""
        kept = [row for row in self.rows() if row.get("env_steps", 0) <= env_steps]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))


def save_checkpoint(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> Path:
    """Write ``<folder>/step_<n>/``, all or nothing; keep the newest two."""
    from safetensors.torch import save_file

    final = folder / f"step_{step:09d}"
    temporary = folder / f".writing_{step:09d}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with disk_errors(folder):
            temporary.mkdir(parents=True)
            save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, temporary / TENSORS)
            (temporary / STATE).write_text(json.dumps(state, indent=2) + "\n")
            for name in (TENSORS, STATE):
                with (temporary / name).open("rb") as file:
                    os.fsync(file.fileno())
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in sorted(folder.glob("step_*"))[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The newest checkpoint that can be read, or None when there is none at all.

    Raises:
        DsrlError: there are checkpoints, and none can be read.
    """
    from safetensors.torch import load_file

    found = sorted(folder.glob("step_*"), reverse=True)
    problems = []
    for path in found:
        try:
            return load_file(path / TENSORS), json.loads((path / STATE).read_text())
        except Exception as error:
            problems.append(f"{path.name}: {error}")
    if found:
        raise bad(str(folder), "a checkpoint that can be read", "; ".join(problems))
    return None
