"""A prefix's keys and values, many rows of each, with room behind them that every denoising step writes anew.

transformers' own cache joins prefix and step to new tensors in every layer of every step: as many copies of the whole
prefix as there are noises.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class _Layer(DynamicLayer):
    """Holds `prefix` (keys and values, (B, groups, T, size)) with every row `count` times, from the first step on.

    Steps may be of any length, but none longer than the first. Without gradients.
    """

    def __init__(self, prefix: tuple[torch.Tensor, torch.Tensor], count: int):
        super().__init__()
        self.lazy_initialization(*prefix)
        self.count = count
        self.keys, self.values = prefix
        self.room: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self.room:
            self.room = [self._spread(x, end) for x in (self.keys, self.values)]
        self.keys, self.values = (room[..., :end, :] for room in self.room)
        self.keys[..., start:, :] = key_states
        self.values[..., start:, :] = value_states
        return self.keys, self.values

    def _spread(self, prefix: torch.Tensor, length: int) -> torch.Tensor:
        rows, groups, filled, size = prefix.shape
        room = prefix.new_empty(rows, self.count, groups, length, size)
        room[..., :filled, :] = prefix.unsqueeze(1)
        return room.flatten(0, 1)


def spread(layers: Iterable[tuple[torch.Tensor, torch.Tensor]], count: int) -> DynamicCache:
    """A cache to denoise behind: every row of a prefix's keys and values `count` times. They are left as they are."""
    fresh = DynamicCache()
    fresh.layers = [_Layer(pair, count) for pair in layers]
    return fresh
