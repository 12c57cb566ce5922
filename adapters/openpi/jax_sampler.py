"""The sampler of openpi's JAX models: one compiled prefix pass, then the flow from any number of noises behind it.

The same operations in the same order as ``Pi0.sample_actions`` (openpi/models/pi0.py), through the model's public
methods, so that one noise behind one observation is bit-equal to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx, traverse_util
from openpi.models import model as openpi_model
from openpi.models.pi0 import make_attn_mask

from .sampling import Pool, in_portions


@dataclass(frozen=True)
class JaxPrefix:
    """What the action expert reads. Rows beyond the batch are filling."""

    cache: Any
    """Keys and values, each (layers, B, T, heads, size)."""
    mask: jax.Array
    state: jax.Array


class JaxSampler:
    """Of a ``Pi0``. The weights are those at construction, as in openpi's own ``Policy``.

    A shape seen for the first time is compiled, which takes seconds to a minute; batches are filled up to a few
    sizes so that there are few of them.
    """

    def __init__(self, model: Any, steps: int, pool: Pool):
        graph, self._weights = nnx.split(model)
        network = model.PaliGemma.llm.module
        self.model, self.steps = model, steps
        self.horizon, self.dim = model.action_horizon, model.action_dim
        self.feature_dim = network.configs[0].width
        self.dtype = str(jnp.dtype(network.embed_dtype))
        self._prefix = jax.jit(lambda weights, seen: _prefix(nnx.merge(graph, weights), seen, pool))
        self._denoise = jax.jit(lambda weights, *rest: _denoise(nnx.merge(graph, weights), steps, *rest))

    def prefix(self, rows: list[dict[str, Any]]) -> tuple[torch.Tensor, JaxPrefix]:
        filled = rows + rows[-1:] * (_size(len(rows)) - len(rows))
        inputs = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *filled)
        seen: Any = openpi_model.Observation.from_dict(inputs)
        feature, cache, mask = self._prefix(self._weights, seen)
        return _to_torch(feature[: len(rows)]), JaxPrefix(cache, mask, seen.state)

    def states(self, prefix: JaxPrefix, batch: int) -> np.ndarray:
        return np.asarray(prefix.state[:batch])

    def denoise(self, prefix: JaxPrefix, noise: np.ndarray) -> np.ndarray:
        def run(rows: np.ndarray, flat: np.ndarray) -> np.ndarray:
            extra = _size(len(rows)) - len(rows)
            rows, filled = np.pad(rows, (0, extra)), np.pad(flat, ((0, extra), (0, 0), (0, 0)))
            actions = self._denoise(self._weights, prefix.cache, prefix.mask, prefix.state, rows, filled)
            return np.asarray(actions[: len(flat)])

        return in_portions(noise, run)

    def pack(self, prefix: JaxPrefix, batch: int) -> dict[str, torch.Tensor]:
        keys, values = (_to_torch(jnp.moveaxis(part[:, :batch], 0, 1)) for part in prefix.cache)
        state, mask = _to_torch(prefix.state[:batch]), _to_torch(prefix.mask[:batch])
        return {"keys": keys, "values": values, "state": state, "mask": mask}

    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> JaxPrefix:
        batch = len(tensors["state"])
        filled = {name: tensor[_filled(batch)] for name, tensor in tensors.items()}
        cache = tuple(jnp.moveaxis(_from_torch(filled[name]), 1, 0) for name in ("keys", "values"))
        return JaxPrefix(cache, _from_torch(filled["mask"]), _from_torch(filled["state"]))

    def state_dict(self) -> dict[str, torch.Tensor]:
        flat = traverse_util.flatten_dict(self._weights.to_pure_dict())
        return {".".join(map(str, path)): _to_torch(value) for path, value in flat.items()}


def _size(count: int) -> int:
    """The batch size that is compiled for: the next power of two up to 16, then the next multiple of 16."""
    return 1 << (count - 1).bit_length() if count <= 16 else -(-count // 16) * 16


def _filled(batch: int) -> torch.Tensor:
    return torch.arange(_size(batch)).clamp(max=batch - 1)


def _prefix(model: Any, seen: Any, pool: Pool) -> tuple[jax.Array, Any, jax.Array]:
    seen = openpi_model.preprocess_observation(None, seen, train=False)
    tokens, mask, autoregressive = model.embed_prefix(seen)
    (hidden, _), cache = model.PaliGemma.llm(
        [tokens, None], mask=make_attn_mask(mask, autoregressive), positions=jnp.cumsum(mask, axis=1) - 1
    )
    hidden = hidden.astype(jnp.float32)
    if pool == "last_pad":
        return hidden[:, -1], cache, mask
    weight = mask.astype(jnp.float32)[..., None]
    return (hidden * weight).sum(1) / weight.sum(1), cache, mask


def _denoise(
    model: Any, steps: int, cache: Any, mask: jax.Array, state: jax.Array, rows: jax.Array, noise: jax.Array
) -> jax.Array:
    cache = jax.tree.map(lambda part: part[:, rows], cache)
    mask, state = mask[rows], state[rows]
    seen = openpi_model.Observation(images={}, image_masks={}, state=state)
    dt = -1.0 / steps

    def step(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        x, time = carry
        tokens, own, autoregressive, condition = model.embed_suffix(seen, x, jnp.broadcast_to(time, len(x)))
        before = jnp.broadcast_to(mask[:, None, :], (len(x), tokens.shape[1], mask.shape[1]))
        positions = jnp.sum(mask, axis=-1)[:, None] + jnp.cumsum(own, axis=-1) - 1
        (_, hidden), _ = model.PaliGemma.llm(
            [None, tokens],
            mask=jnp.concatenate([before, make_attn_mask(own, autoregressive)], axis=-1),
            positions=positions,
            kv_cache=cache,
            adarms_cond=[None, condition],
        )
        return x + dt * model.action_out_proj(hidden[:, -model.action_horizon :]), time + dt

    # The end test is upstream's: half a step of slack for what the sum of steps loses to rounding.
    return jax.lax.while_loop(lambda carry: carry[1] >= -dt / 2, step, (noise, 1.0))[0]


def _to_torch(array: jax.Array) -> torch.Tensor:
    if array.dtype == jnp.bfloat16:  # numpy has no bfloat16 that torch would take
        return torch.from_numpy(np.array(array.view(jnp.uint16)).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def _from_torch(tensor: torch.Tensor) -> jax.Array:
    if tensor.dtype == torch.bfloat16:
        return jnp.asarray(tensor.contiguous().view(torch.int16).numpy().view(np.uint16)).view(jnp.bfloat16)
    return jnp.asarray(tensor.numpy())
