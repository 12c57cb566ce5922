"""The action expert's attention for many noises: all heads that share keys and values ask as one.

transformers copies keys and values for every head, and turns the mask into numbers again in every layer. With one
key-value head, as in π0, the queries of all heads may as well be one long row of queries: nothing is copied, and the
kernel works on blocks that fill it. The sums are the same, in another order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F

NAME = "dsrl_vla_heads_as_one"


class _Masks:
    """A step's mask, which all layers share, folded once.

    Args:
        count: how many rows in a row are of one observation, and have the same mask.
    """

    def __init__(self, count: int):
        self.count = count
        self.last: tuple[torch.Tensor, torch.Tensor] | None = None

    def fold(self, mask: torch.Tensor, times: int, dtype: torch.dtype) -> torch.Tensor:
        """A boolean mask (N, 1, Q, T) as numbers to add, (N, 1, Q * times, T)."""
        if self.last is None or self.last[0] is not mask:
            own = mask[:: self.count]
            numbers = torch.zeros(own.shape, dtype=dtype, device=mask.device).masked_fill_(~own, -torch.inf)
            rows = numbers.repeat_interleave(times, 2).unsqueeze(1).expand(-1, self.count, -1, -1, -1)
            self.last = mask, rows.flatten(0, 1)  # of a single observation a view, which stays in the cache
        return self.last[1]


_masks: ContextVar[_Masks | None] = ContextVar("masks", default=None)


@contextlib.contextmanager
def heads_as_one(model: Any, count: int) -> Iterator[None]:
    """Within it, and in this thread only, the action expert of a ``PI0ForConditionalGeneration`` attends in this way.

    Args:
        count: noises per observation; one after the other in a batch.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    config = model.model.dit.config
    if config._attn_implementation == "sdpa":  # another one is somebody's choice
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        config._attn_implementation = NAME
    with sharing(count):
        yield


@contextlib.contextmanager
def sharing(count: int) -> Iterator[None]:
    """Within it, and in this thread only, `attend` takes every `count` rows to be of one observation."""
    token = _masks.set(_Masks(count))
    try:
        yield
    finally:
        _masks.reset(token)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """query (N, heads, Q, size), key and value (N, groups, T, size) -> (N, Q, heads, size); an attention function of
    transformers, and outside `sharing` its own."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    masks = _masks.get()
    if masks is None or attention_mask is None or attention_mask.dtype != torch.bool:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
    groups, heads = key.shape[1], query.shape[1]
    by_group = query.unflatten(1, (groups, -1)).transpose(2, 3)  # (N, groups, Q, heads of a group, size)
    asked = by_group.flatten(2, 3)  # of a single group a view, for so the projection has left it
    mask = masks.fold(attention_mask, heads // groups, query.dtype)
    found = F.scaled_dot_product_attention(asked, key, value, attn_mask=mask, scale=scaling)
    return found.view(by_group.shape).transpose(1, 2).flatten(2, 3), None
