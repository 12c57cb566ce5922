"""π0's sampler, cut in two where the noise enters: one prefix pass, then denoising from K noises behind it.

The same operations in the same order as ``PI0ForConditionalGeneration.sample_actions``
(transformers/models/pi0/modeling_pi0.py), so that K = 1 is bit-equal to it. More noises attend as `pi0_attention`
says.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange, repeat

from .pi0_attention import heads_as_one


def prefix(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[Any, torch.Tensor]:
    """Run the vision-language model once; return its KV cache and hidden states (B, T, width)."""
    mask = inputs["attention_mask"]
    embeds = model.model.embed_prefix(inputs["input_ids"], inputs["pixel_values"], inputs["pixel_attention_mask"])
    output = model.model.vlm(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=mask.cumsum(-1) - 1,
        token_type_ids=torch.zeros_like(embeds)[:, :, 0],
        use_cache=True,
    )
    return output["cache" if "cache" in output else "past_key_values"], output.last_hidden_state


def look(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`prefix` as named tensors (B, …): "hidden", and the keys and values of every layer."""
    cache, hidden = prefix(model, inputs)
    found = {"hidden": hidden}
    for index, layer in enumerate(cache.layers):
        found |= {f"keys.{index}": layer.keys, f"values.{index}": layer.values}
    return found


def pool(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens that are not padding: (B, T, width) -> float32 (B, width)."""
    weight = mask.to(hidden.device, torch.float32).unsqueeze(-1)
    return (hidden.float() * weight).sum(1) / weight.sum(1)


def fan_out(cache: Any, count: int) -> Any:
    """A new cache holding every row `count` times; the old one is untouched and shares storage when count = 1."""
    from transformers import DynamicCache

    layers = [(layer.keys, layer.values) for layer in cache.layers]
    if count > 1:
        layers = [tuple(x.repeat_interleave(count, 0) for x in layer) for layer in layers]
    fresh = DynamicCache()
    for index, (keys, values) in enumerate(layers):
        fresh.update(keys, values, index)
    return fresh


READ_BY_EXPERT = ("state", "attention_mask", "pixel_attention_mask")
"""What the action expert reads beside keys and values."""


def suffix_inputs(inputs: Mapping[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """What the action expert reads beside the cache, every row `count` times."""
    return {name: inputs[name].repeat_interleave(count, 0) for name in READ_BY_EXPERT}


def _cache_name(model: Any) -> str:
    """What this transformers calls the cache; newer ones warn of the older name."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def denoise(model: Any, context: Mapping[str, torch.Tensor], noise: torch.Tensor, steps: int) -> torch.Tensor:
    """Integrate the flow from noise (B, K, H, D) to normalised actions (B, K, H, D), all behind one prefix.

    Args:
        context: what the expert reads, and keys and values as `look` names them.
    """
    from .pi0_cache import spread

    batch, count = noise.shape[:2]
    per_noise = suffix_inputs(context, count)
    layers = range(sum(name.startswith("keys.") for name in context))
    cache = spread([(context[f"keys.{index}"], context[f"values.{index}"]) for index in layers], count)
    length, name = cache.get_seq_length(), _cache_name(model)
    x = rearrange(noise, "b k h d -> (b k) h d").to(context["state"].dtype)
    dt = -1.0 / steps
    with heads_as_one(model, count) if count > 1 else contextlib.nullcontext():
        for step in range(steps):
            time = torch.full((batch * count,), 1.0 + step * dt, dtype=torch.float32, device=x.device)
            velocity = model(noise=x, timestep=time, **{name: cache}, **per_noise).logits
            cache.crop(length - cache.get_seq_length())
            x = x + dt * velocity
    return rearrange(x, "(b k) h d -> b k h d", b=batch)


def flow_loss(
    model: Any, inputs: dict[str, torch.Tensor], actions: torch.Tensor, draws: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """π0's flow-matching loss with `draws` noises and times behind one prefix.

    Args:
        actions: (B, H, D) normalised and padded.

    Returns:
        The mean loss, and the prefix's pooled feature (B, width), both with gradients.
    """
    cache, hidden = prefix(model, inputs)
    per_draw = suffix_inputs(inputs, draws)
    target = repeat(actions, "b h d -> (b k) h d", k=draws)
    loss = model(actions=target, **{_cache_name(model): fan_out(cache, draws)}, **per_draw).loss
    return loss.mean(), pool(hidden, inputs["attention_mask"])
