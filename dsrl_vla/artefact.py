"""A head as files: what they are, how large they may be, and how strangers' ones are read.

``head.safetensors`` and ``head_config.json`` are the head; ``eval.json``, ``recipe.yaml``, ``curves.png``,
``rollouts.mp4`` and the card say where it comes from; ``manifest.json`` has everybody's checksum. Nothing here is a
pickle, and nothing a file says is believed before it is checked: sizes first, then checksums, then types and shapes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from .errors import DsrlError, bad
from .head_config import CONFIG, WEIGHTS, HeadConfig
from .manifest import MANIFEST, check_manifest
from .plain import read_object

CARD, EVAL, RECIPE, CURVES, VIDEO = "README.md", "eval.json", "recipe.yaml", "curves.png", "rollouts.mp4"
_MIB = 1024**2
LARGEST = {
    WEIGHTS: 256 * _MIB,
    CONFIG: _MIB,
    MANIFEST: _MIB // 16,
    CARD: _MIB,
    EVAL: 4 * _MIB,
    RECIPE: _MIB,
    CURVES: 16 * _MIB,
    VIDEO: 64 * _MIB,
}
"""Every file an artefact may hold, and its greatest size in bytes."""
HEAD_FILES = (WEIGHTS, CONFIG, MANIFEST)
LISTED = tuple(name for name in LARGEST if name not in (MANIFEST, CARD))
"""What a manifest describes; not the card, which people edit on the Hub."""

Head = TypeVar("Head", bound=nn.Module)


def check_size(name: str, size: int, source: str) -> None:
    """Refuse a file that is larger than any head needs."""
    if size > LARGEST[name]:
        raise bad(f"head '{source}', {name}", f"at most {LARGEST[name] // 1024} KiB", f"{size // 1024} KiB")


def check_folder(folder: Path, source: str) -> None:
    """Refuse a folder that holds no head, one too large, or one that its manifest (if any) does not describe.

    Raises:
        DsrlError: names the file.
    """
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise bad(f"head '{source}'", f"a file {name}", "none in that folder")
    for name in LARGEST:
        if (folder / name).is_file():
            check_size(name, (folder / name).stat().st_size, source)
    if (folder / MANIFEST).exists():
        check_manifest(folder, LISTED, (WEIGHTS, CONFIG), ignored=(CARD,))


def held(folder: Path) -> list[str]:
    """The files of an artefact in a folder that `check_folder` has passed. What its manifest, if it has one, does not
    know is not of it: an evaluation that an earlier head left there, say."""
    here = [name for name in LARGEST if (folder / name).is_file()]
    if MANIFEST not in here:
        return here
    known = {MANIFEST, CARD, *read_object(folder / MANIFEST)["files"]}
    return [name for name in here if name in known]


def read_config(folder: Path, source: str) -> HeadConfig:
    """The config of a head in a folder that `check_folder` has passed."""
    try:
        return HeadConfig.from_json((folder / CONFIG).read_text())
    except UnicodeDecodeError as error:
        raise bad(f"{source}/{CONFIG}", "JSON", f"{error}") from error


def read_head(cls: type[Head], folder: Path, source: str) -> Head:
    """Build the head that a folder describes.

    Raises:
        DsrlError: as `check_folder`; not safetensors, another dtype, weights that do not fit the config, NaN.
    """
    from safetensors import SafetensorError, safe_open

    check_folder(folder, source)
    config = read_config(folder, source)
    head = _hollow(cls, config)
    wanted = {name: list(tensor.shape) for name, tensor in head.state_dict().items()}
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: list(part.get_shape()) for name, part in slices.items()}
            types = {name: str(part.get_dtype()) for name, part in slices.items()}
            _refuse_others(wanted, found, types, source)
            tensors = {name: file.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, DsrlError):
            raise
        raise bad(f"{source}/{WEIGHTS}", "a safetensors file", " ".join(str(error).split())) from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise bad(f"{source}/{WEIGHTS}: {name}", "finite weights", "NaN or infinity")
    head.load_state_dict(tensors, strict=True, assign=True)
    return head


def _hollow(cls: type[Head], config: HeadConfig) -> Head:
    """The head without memory for its weights: a config may lie about its size."""
    _ = config.layout.latent_shape  # cached on a real device, for it is used after the weights have come
    with torch.device("meta"):
        return cls(config)


def _refuse_others(wanted: dict[str, list[int]], found: dict[str, list[int]], types: dict[str, str], source: str):
    where, described = f"{source}/{WEIGHTS}", f"the weights that {CONFIG} describes"
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise bad(where, described, f"none called {name}")
        if name not in wanted:
            raise bad(where, described, f"one called {name} besides")
        if wanted[name] != found[name]:
            raise bad(where, described, f"{name} of shape {found[name]} in place of {wanted[name]}")
        if types[name] != "F32":
            raise bad(f"{where}: {name}", "float32 (F32)", types[name])
