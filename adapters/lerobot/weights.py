"""Whether a policy's weights are its file's.

Some of LeRobot's classes print that loading failed and go on with random weights: a head would steer noise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from dsrl_vla.errors import bad

_UNREAD = ("lm_head", "video_encoder", "video_predictor")
"""What chooses words or foresees videos does not act: some checkpoints come without it."""
_LOOKED_AT = 64


def check_loaded(model: Any, file: Path, source: str) -> None:
    """Find every parameter among the file's tensors: by a sample of its values, for LeRobot renames, ties, casts and
    transposes.

    Raises:
        DsrlError: some are not there.
    """
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        kept = [tensors.get_tensor(name) for name in tensors.keys()]  # noqa: SIM118
    there = {_sample(tensor) for tensor in kept} | {_sample(tensor.T) for tensor in kept if tensor.ndim == 2}
    named = [(n, _sample(p)) for n, p in model.named_parameters() if not any(part in n for part in _UNREAD)]
    absent = [name for name, sample in named if sample not in there]
    if absent:
        some = ", ".join(absent[:3]) + (", …" if len(absent) > 3 else "")
        raise bad(
            f"base '{source}'",
            f"all of its {len(named)} weights to come from {file.name}",
            f"{len(absent)} that LeRobot has left as they were initialised ({some})",
            "The file is incomplete, or of a version of LeRobot whose names are others.",
        )


@torch.no_grad()
def _sample(tensor: torch.Tensor) -> tuple[int, bytes]:
    """How many numbers, and some of them in bfloat16, which every other precision is rounded to alike."""
    size = tensor.numel()
    chosen = torch.linspace(0, size - 1, min(size, _LOOKED_AT), dtype=torch.float64).long()
    values = tensor.reshape(-1)[chosen.to(tensor.device)].cpu().to(torch.bfloat16)
    return size, values.view(torch.int16).numpy().tobytes()
