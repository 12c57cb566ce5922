"""Diffusion policy and the multi-task DiT: a conditioning vector, and a sampler that is handed it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from dsrl_vla.errors import NotSteerableError
from dsrl_vla.noise import NoiseSpace
from lerobot.utils.constants import OBS_IMAGES, OBS_STATE

from ..refusals import refuse_unsteerable
from .split import Batch, Split


class Conditioned(Split):
    """Observations of `n_obs_steps` steps become one vector, which is also the feature."""

    resizes = False
    vector: str

    @classmethod
    def refuse(cls, config: Any) -> None:
        super().refuse(config)
        if getattr(config, "env_state_feature", None):
            raise NotSteerableError(
                f"policy '{config.type}': expected one that sees images and a state, got one that reads "
                "observation.environment_state, which no observation here holds."
            )
        if getattr(config, "objective", "diffusion") == "diffusion":
            refuse_unsteerable(f"policy '{config.type}'", {"noise_scheduler_type": config.noise_scheduler_type})

    @property
    def noise(self) -> NoiseSpace:
        return NoiseSpace(self.config.horizon, self.action_dim)

    def feature(self, arguments: Mapping[str, Any]) -> torch.Tensor:
        return arguments[self.vector]

    def batch(self, batch: Batch) -> Batch:
        """Give every observation its time dimension, (B, n_obs_steps, …), the latest last."""
        steps, batch = self.config.n_obs_steps, dict(batch)
        for key in (OBS_STATE, *self.config.image_features):
            if key in batch and batch[key].ndim in (2, 4):
                batch[key] = batch[key].unsqueeze(1).expand(-1, steps, *batch[key].shape[1:])
        if self.config.image_features:
            batch[OBS_IMAGES] = torch.stack([batch[key] for key in self.config.image_features], dim=-4)
        return batch

    def executed(self, chunk: torch.Tensor) -> torch.Tensor:
        """Drop the rows that belong to past observations."""
        return chunk[:, self.config.n_obs_steps - 1 :]


class Diffusion(Conditioned):
    """Diffusion policy with a U-Net, sampled by DDIM."""

    seam = "diffusion.conditional_sample"
    interface = {"diffusion.conditional_sample": ("batch_size", "global_cond", "noise")}
    prompt = False
    vector = "global_cond"

    @property
    def sampler_steps(self) -> int:
        return self.policy.diffusion.num_inference_steps

    @property
    def feature_dim(self) -> int:
        encoders, config = getattr(self.policy.diffusion, "rgb_encoder", None), self.config
        per_step = config.robot_state_feature.shape[0]
        if encoders is not None:
            first = encoders[0] if isinstance(encoders, torch.nn.ModuleList) else encoders
            per_step += first.feature_dim * len(config.image_features)
        return per_step * config.n_obs_steps

    def denoise(self, arguments: dict[str, Any], noise: torch.Tensor) -> torch.Tensor:
        return self.executed(self.call_seam(arguments | {"batch_size": len(noise), "noise": noise}))


class MultiTaskDiT(Conditioned):
    """Multi-task diffusion transformer, its flow objective or its DDIM one; it draws its noise inline."""

    seam = "objective.conditional_sample"
    interface = {"objective.conditional_sample": ("model", "batch_size", "conditioning_vec")}
    vector = "conditioning_vec"
    entry = "_generate_actions"  # predict_action_chunk reads queues that only select_action fills

    @property
    def sampler_steps(self) -> int:
        if self.config.is_flow_matching:
            return self.config.num_integration_steps
        return self.policy.objective.num_inference_steps

    @property
    def feature_dim(self) -> int:
        return self.policy.observation_encoder.conditioning_dim

    def denoise(self, arguments: dict[str, Any], noise: torch.Tensor) -> torch.Tensor:
        return self.executed(self.draw(arguments | {"batch_size": len(noise)}, noise))
