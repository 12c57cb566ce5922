"""``manifest.json``: size and SHA-256 of the files beside it, so that a torn or swapped one is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable
from pathlib import Path

from .errors import bad

MANIFEST = "manifest.json"
_LARGEST = 64 * 1024


def write_manifest(folder: Path, names: Iterable[str]) -> None:
    """Describe these files of a folder."""
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in names}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n")


def check_manifest(
    folder: Path, known: Collection[str], required: Collection[str], ignored: Collection[str] = ()
) -> None:
    """Check every file of a folder that its manifest lists.

    Args:
        known: the only names a manifest may list; they are plain, so that none leads out of the folder.
        required: names it has to list; other files may be absent.
        ignored: names that may be listed, as older manifests do, and are not looked at.

    Raises:
        DsrlError: no manifest, one that is malformed or lists another name, or a file that is not as listed.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise bad(f"{folder}", f"a {MANIFEST}", "none")
    if path.stat().st_size > _LARGEST:
        raise bad(f"{path}", f"at most {_LARGEST} bytes", path.stat().st_size)
    try:
        files = dict(json.loads(path.read_text())["files"])
        listed = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise bad(f"{path}", "a mapping of files to bytes and sha256", f"{error}") from error
    listed = {name: entry for name, entry in listed.items() if name not in ignored}
    for name in listed:
        if name not in known:
            raise bad(f"{path}", f"only {', '.join(sorted(known))}", f"'{name}'"[:120])
    for name in required:
        if name not in listed:
            raise bad(f"{path}", f"an entry for {name}", "none")
    for name, (size, digest) in listed.items():
        if not (folder / name).is_file():
            if name in required:
                raise bad(f"{folder}", f"a file {name}", "none")
            continue
        found = (folder / name).stat().st_size
        if found != size:
            raise bad(f"{folder / name}", f"{size} bytes, as {MANIFEST} says", found)
        if _sha256(folder / name) != digest:
            raise bad(f"{folder / name}", f"the content that {MANIFEST} describes", "another")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
