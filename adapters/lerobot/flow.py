"""π0, π0.5 and SmolVLA: a prefix in a KV cache, and an Euler loop around `denoise_step`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from dsrl_vla.noise import NoiseSpace

from ..pi0_sampling import pool
from .seam import Prefix, watched
from .split import Batch, Split

_STEP = ("prefix_pad_masks", "past_key_values", "x_t", "timestep")


class FlowStep(Split):
    """The seam is one step of the flow; the loop around it is LeRobot's `euler_integrate`."""

    seam = "model.denoise_step"
    backbone = "paligemma_with_expert"
    spares = True

    @property
    def noise(self) -> NoiseSpace:
        return self.padded(self.config.chunk_size, self.config.max_action_dim)

    @property
    def sampler_steps(self) -> int:
        return self.config.num_inference_steps

    def encode(self, batch: Batch) -> tuple[torch.Tensor, Prefix]:
        with watched(getattr(self.policy.model, self.backbone), "forward") as seen:
            arguments = self.reach(self.batch(batch))
        for per_step in ("x_t", "timestep"):
            del arguments[per_step]
        feature = pool(seen[0][0][0], arguments["prefix_pad_masks"])
        return feature, Prefix.of(arguments, len(feature))

    def feature(self, arguments: Mapping[str, Any]) -> torch.Tensor:
        raise AssertionError("the feature is the backbone's output, which the seam is not handed")

    def denoise(self, arguments: dict[str, Any], noise: torch.Tensor) -> torch.Tensor:
        from lerobot.policies.common.flow_matching import euler_integrate

        step = self.policy.model.denoise_step
        chunk = euler_integrate(lambda x, t: step(x_t=x, timestep=t, **arguments), noise, self.sampler_steps)
        return chunk[..., : self.action_dim]


class Pi0(FlowStep):
    """π0: the state enters with the actions, not the prefix."""

    interface = {"model.denoise_step": ("state", *_STEP)}

    @property
    def feature_dim(self) -> int:
        return self.policy.model.paligemma_with_expert.paligemma.config.text_config.hidden_size

    def cast(self, dtype: torch.dtype) -> None:
        name = str(dtype).removeprefix("torch.")
        self.config.dtype = name
        self.policy.model.paligemma_with_expert.to_bfloat16_for_selected_params(name)


class Pi05(Pi0):
    """π0.5: the state is part of the prompt."""

    interface = {"model.denoise_step": _STEP}


class SmolVLA(FlowStep):
    """SmolVLA: the state is the last token of the prefix."""

    interface = {"model.denoise_step": _STEP}
    backbone = "vlm_with_expert"

    @property
    def sampler_steps(self) -> int:
        return self.config.num_steps

    @property
    def feature_dim(self) -> int:
        return self.policy.model.vlm_with_expert.config.text_config.hidden_size

    def cast(self, dtype: torch.dtype) -> None:
        self.policy.model.vlm_with_expert.to(dtype)

    def denoise(self, arguments: dict[str, Any], noise: torch.Tensor) -> torch.Tensor:
        chunk = super().denoise(arguments, noise)
        return self.policy._pi_aloha_encode_actions(chunk) if self.config.adapt_to_pi_aloha else chunk
