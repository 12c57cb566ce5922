"""A run's directory: what is written there, when, and how a crash leaves it whole.

Files are written beside their place and moved onto it, so that a reader never sees half of one. Checkpoints
are safetensors and JSON: no pickle.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import DsrlError, bad
from .manifest import MANIFEST, check_manifest, write_manifest

log = logging.getLogger(__name__)
STATE, TENSORS = "state.json", "tensors.safetensors"
KEEP = 2
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_PLACE = (errno.EACCES, errno.EROFS, errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk, or a path that cannot be one, into a sentence."""
    try:
        yield
    except Exception as error:
        text = str(error)
        number = getattr(error, "errno", None)
        full = number in _FULL or any(f"os error {code}" in text for code in _FULL)  # safetensors' own have no number
        if full or "No space left" in text:
            free = shutil.disk_usage(path if path.exists() else path.parent).free / 1e6
            raise DsrlError(
                f"{path}: expected room on the disk, got a full one ({free:.0f} MB free). Free some: a run goes on "
                "with --resume; what was written before is intact."
            ) from error
        if number in _NO_PLACE:
            raise bad(str(path), "a folder that can be written", text) from error
        if type(error).__name__ == "SafetensorError":
            raise DsrlError(f"{path}: expected a disk that takes what is written, got {text}") from error
        raise


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of named tensors in name order, to the last bit."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Within this context no other process may enter it for the same run's directory; a process that dies leaves it.

    Raises:
        DsrlError: another one is in it.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        what = "a run that no process is at", "one that another process is at"
        raise bad(str(out), *what, "Wait for its end, or end it.") from error
    except OSError as error:  # another machine's disk, which knows no locks
        log.debug("%s is not locked: %s", out, error)
    try:
        yield
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder, before the work whose result is to lie there; raises as `disk_errors` does."""
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to, moved onto it once it is on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with disk_errors(path.parent):
            yield temporary
            _fsync(temporary)
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a file's content, all or nothing."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, data: Any) -> None:
    """Replace a JSON file, all or nothing."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def part(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Replace a safetensors file, all or nothing."""
    with replacing(path) as temporary:
        _save(tensors, temporary)


def _save(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file that whoever may read the others of its folder may read: the library makes its own
    for their owner alone."""
    import safetensors.torch

    path.touch()
    mode = path.stat().st_mode
    safetensors.torch.save_file(_apart(tensors), path)
    path.chmod(mode)


def copy_files(source: Path, folder: Path) -> None:
    """Replace files of a folder by another's of the same name, each all or nothing."""
    make_folder(folder)
    for path in sorted(source.iterdir()):
        with replacing(folder / path.name) as temporary:
            shutil.copyfile(path, temporary)


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What safetensors takes: tensors that share no memory. One that shares none anyway is not copied: a replay on
    the disk may be larger than memory."""
    where = {name: tensor.untyped_storage().data_ptr() for name, tensor in tensors.items()}
    users = Counter(where.values())
    shared = lambda name: users[where[name]] > 1
    return {k: v.detach().clone() if shared(k) else v.detach().contiguous() for k, v in tensors.items()}


class Metrics:
    """``metrics.jsonl``: one line per report, readable while the run goes on."""

    def __init__(self, path: Path):
        self.path = path
        self.pending: list[dict[str, Any]] = []
        """Lines that the disk has not taken yet."""

    def append(self, row: dict[str, Any]) -> None:
        """Add a line; one that cannot be written is kept, and written with the next that can."""
        self.pending.append(row)
        self.flush()

    def flush(self) -> None:
        """Write what is pending, all or nothing."""
        size = None
        try:
            with disk_errors(self.path.parent), self.path.open("a+b") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 1))
                torn = size and file.read(1) != b"\n"
                lines = "".join(json.dumps(row) + "\n" for row in self.pending)
                file.write(("\n" * bool(torn) + lines).encode())
            self.pending.clear()
        except (DsrlError, OSError) as error:
            if size is not None:
                with contextlib.suppress(OSError):
                    os.truncate(self.path, size)
            log.warning("%s: %d lines wait to be written: %s", self.path.name, len(self.pending), error)

    def rows(self) -> list[dict[str, Any]]:
        """All lines; a last one that a crash cut short is left out."""
        found = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return found

    def truncate(self, env_steps: int, updates: float = math.inf) -> None:
        """Forget what a resumed run is about to do again: what came after these steps and updates."""
        known = lambda row: row.get("env_steps", 0) <= env_steps and row.get("updates", 0) <= updates
        kept = [row for row in self.rows() if known(row)]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))


def save_checkpoint(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> Path:
    """Write ``<folder>/step_<n>/`` with a manifest, all or nothing; keep the newest two.

    A folder that is there is never written over: a second one of the same step is ``step_<n>.1``, and newer.

    Raises:
        DsrlError: the disk is full or cannot be written to. What was there before is intact.
    """
    temporary = folder / f".writing_{step:09d}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with disk_errors(folder):
            temporary.mkdir(parents=True)
            _save(tensors, temporary / TENSORS)
            (temporary / STATE).write_text(json.dumps(state, indent=2) + "\n")
            write_manifest(temporary, (TENSORS, STATE))
            for name in (TENSORS, STATE, MANIFEST, "."):
                _fsync(temporary / name)
            final = _unused(folder, step)
            os.replace(temporary, final)
            _fsync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in checkpoints(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted((path for path in folder.glob("step_*") if path.is_dir()), key=_age)


def _age(path: Path) -> tuple[str, int]:
    """Step, and which of the step's."""
    step, _, again = path.name.partition(".")
    return step, int(again or 0)


def _unused(folder: Path, step: int) -> Path:
    """A name newer than all of the same step, those included that have been pruned since."""
    name = f"step_{step:09d}"
    there = [_age(path) for path in checkpoints(folder)]
    again = 1 + max((number for step_name, number in there if step_name == name), default=-1)
    return folder / (f"{name}.{again}" if again else name)


def load_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The newest checkpoint that is whole, or None when there is none at all.

    One that is not whole is passed over with a warning, and removed, lest it count as one of the two to keep; one that
    the system does not let be read is passed over.

    Raises:
        DsrlError: there are checkpoints, and none is whole.
    """
    import safetensors.torch

    problems: dict[Path, Exception] = {}
    for unfinished in folder.glob(".writing_*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    for path in reversed(checkpoints(folder)):
        try:
            check_manifest(path, (TENSORS, STATE), (TENSORS, STATE))
            found = safetensors.torch.load_file(path / TENSORS), json.loads((path / STATE).read_text())
        except Exception as error:
            problems[path] = error
            continue
        for other, problem in problems.items():
            log.warning("checkpoint %s: %s Going on from %s, the one before.", other.name, problem, path.name)
            if not isinstance(problem, OSError | MemoryError):
                shutil.rmtree(other, ignore_errors=True)
        return found
    if problems:
        words = "; ".join(f"{path.name}: {problem}" for path, problem in problems.items())
        raise bad(str(folder), "a checkpoint that can be read", words)
    return None
