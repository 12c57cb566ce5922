"""The sampler of openpi's PyTorch models: one prefix pass, then the flow from any number of noises behind it.

The same operations in the same order as ``PI0Pytorch.sample_actions`` (openpi/models_pytorch/pi0_pytorch.py), so that
one noise behind one observation is bit-equal to it, uncompiled. ``denoise_step`` is upstream's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from openpi.models import model as openpi_model
from openpi.models_pytorch.pi0_pytorch import make_att_2d_masks
from transformers import DynamicCache

from .sampling import Pool, in_portions


@dataclass(frozen=True)
class TorchPrefix:
    """What the action expert reads."""

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    """Keys and values of every layer, each (B, heads, T, size)."""
    mask: torch.Tensor
    state: torch.Tensor


class TorchSampler:
    """Of a ``PI0Pytorch``, whose weights it freezes."""

    def __init__(self, model: Any, steps: int, pool: Pool, device: str):
        self.model = model.eval().requires_grad_(False)
        self.steps, self.pool, self.device = steps, pool, device
        self.horizon, self.dim = model.config.action_horizon, model.action_in_proj.in_features
        self._language = model.paligemma_with_expert.paligemma.language_model
        self.feature_dim = self._language.config.hidden_size
        weight = self._language.layers[0].self_attn.q_proj.weight
        self.dtype = str(weight.dtype).removeprefix("torch.")

    def prefix(self, rows: list[dict[str, Any]]) -> tuple[torch.Tensor, TorchPrefix]:
        inputs = _stack(rows, self.device)
        seen: Any = openpi_model.Observation.from_dict(inputs)
        images, image_masks, prompt, prompt_mask, state = self.model._preprocess_observation(seen, train=False)
        tokens, mask, autoregressive = self.model.embed_prefix(images, image_masks, prompt, prompt_mask)
        attention = self.model._prepare_attention_masks_4d(make_att_2d_masks(mask, autoregressive))
        self._language.config._attn_implementation = "eager"  # as upstream: others ignore this mask's form
        (hidden, _), cache = self.model.paligemma_with_expert.forward(
            attention_mask=attention,
            position_ids=torch.cumsum(mask, dim=1) - 1,
            past_key_values=None,
            inputs_embeds=[tokens, None],
            use_cache=True,
        )
        return self._pooled(hidden.float(), mask), TorchPrefix(cache.to_legacy_cache(), mask, state)

    def _pooled(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if self.pool == "last_pad":
            return hidden[:, -1]
        weight = mask.float().unsqueeze(-1)
        return (hidden * weight).sum(1) / weight.sum(1)

    def states(self, prefix: TorchPrefix, batch: int) -> np.ndarray:
        return prefix.state[:batch].cpu().numpy()

    def denoise(self, prefix: TorchPrefix, noise: np.ndarray) -> np.ndarray:
        def run(rows: np.ndarray, flat: np.ndarray) -> np.ndarray:
            chosen = torch.as_tensor(rows, device=self.device)
            return self._flow(prefix, chosen, torch.tensor(flat, device=self.device)).cpu().numpy()

        return in_portions(noise, run)

    def _flow(self, prefix: TorchPrefix, rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        cache = DynamicCache.from_legacy_cache(tuple((k[rows], v[rows]) for k, v in prefix.layers))
        mask, state = prefix.mask[rows], prefix.state[rows]
        dt = torch.tensor(-1.0 / self.steps, dtype=torch.float32, device=self.device)
        time = torch.tensor(1.0, dtype=torch.float32, device=self.device)
        while time >= -dt / 2:  # upstream's end test: half a step of slack for rounding
            x = x + dt * self.model.denoise_step(state, mask, cache, x, time.expand(len(x)))
            time = time + dt
        return x

    def pack(self, prefix: TorchPrefix, batch: int) -> dict[str, torch.Tensor]:
        keys, values = (torch.stack(parts, 1) for parts in zip(*prefix.layers, strict=True))
        return {"keys": keys, "values": values, "state": prefix.state, "mask": prefix.mask}

    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> TorchPrefix:
        keys, values, state, mask = (tensors[name].to(self.device) for name in ("keys", "values", "state", "mask"))
        return TorchPrefix(tuple(zip(keys.unbind(1), values.unbind(1), strict=True)), mask, state)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()


def _stack(rows: list[Any], device: str) -> Any:
    """Nested dictionaries of arrays, stacked leaf by leaf."""
    if isinstance(rows[0], dict):
        return {key: _stack([row[key] for row in rows], device) for key in rows[0]}
    return torch.from_numpy(np.stack(rows)).to(device)
