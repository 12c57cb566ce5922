"""What both samplers have in common: the rows a denoising runs over, and the form of a packed prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol

import numpy as np
import torch

Pool = Literal["mean", "last_pad"]
"""How the prefix's hidden states become one feature: the mean over tokens that are not padding; or, for parity with
dsrl_pi0, the last token, which for prompts shorter than the longest is padding."""

ROWS_AT_ONCE = 64
"""Noises denoised together. Behind each stands a copy of its prefix's cache: 15 MB at the size of π0, bfloat16."""


class Sampler(Protocol):
    """A model's sampler, cut in two where the noise enters. Prefixes are its own and opaque to others."""

    horizon: int
    dim: int
    steps: int
    feature_dim: int
    dtype: str
    model: Any

    def prefix(self, rows: list[dict[str, Any]]) -> tuple[torch.Tensor, Any]:
        """One pass over transformed inputs: the pooled feature, float32 (B, F), and the prefix."""

    def states(self, prefix: Any, batch: int) -> np.ndarray:
        """The transformed states (B, S), which the output transforms read."""

    def denoise(self, prefix: Any, noise: np.ndarray) -> np.ndarray:
        """Noise float32 (B, K, H, D) -> normalised actions float32 (B, K, H, D)."""

    def pack(self, prefix: Any, batch: int) -> dict[str, torch.Tensor]:
        """The prefix as named tensors (B, …)."""

    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        """Undo `pack`."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights, on the CPU."""


def in_portions(noise: np.ndarray, run: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """Denoise (B, K, H, D) through ``run(rows (n,), noise (n, H, D))``, at most `ROWS_AT_ONCE` noises at a time.

    `rows` says behind which prefix each noise stands.
    """
    batch, count = noise.shape[:2]
    rows, flat = np.repeat(np.arange(batch), count), noise.reshape(-1, *noise.shape[2:])
    parts = [run(rows[part], flat[part]) for part in _portions(len(flat))]
    return np.concatenate(parts).reshape(noise.shape)


def _portions(count: int) -> Iterator[slice]:
    for start in range(0, count, ROWS_AT_ONCE):
        yield slice(start, min(start + ROWS_AT_ONCE, count))
