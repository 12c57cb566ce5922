"""VLA-JEPA, GR00T, EVO1, MolmoAct2: an action expert that is handed the backbone's tokens and draws its own noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from dsrl_vla.errors import NotSteerableError
from dsrl_vla.noise import NoiseSpace

from ..pi0_sampling import pool
from ..refusals import refuse_unsteerable
from .seam import Prefix, arguments_at, watched
from .split import Batch, Split


class VLAJEPA(Split):
    """VLA-JEPA: the embodied-action tokens of a Qwen3-VL condition a flow-matching DiT."""

    seam = "model.action_model.predict_action"
    interface = {"model.action_model.predict_action": ("conditioning_tokens", "state")}

    @property
    def noise(self) -> NoiseSpace:
        return NoiseSpace(self.policy.model.action_model.action_horizon, self.config.action_dim)

    @property
    def sampler_steps(self) -> int:
        return self.policy.model.action_model.num_inference_timesteps

    @property
    def feature_dim(self) -> int:
        return self.policy.model.qwen.model.config.hidden_size

    def feature(self, arguments: Mapping[str, Any]) -> torch.Tensor:
        return arguments["conditioning_tokens"].float().mean(1)

    def denoise(self, arguments: dict[str, Any], noise: torch.Tensor) -> torch.Tensor:
        return self.draw(arguments, noise)


class Groot(Split):
    """GR00T N1.7: `_encode_features` has run, `get_action_with_features` samples."""

    seam = "_groot_model.action_head.get_action_with_features"
    interface = {seam: ("backbone_features", "state_features", "embodiment_id", "backbone_output", "action_input")}

    @classmethod
    def refuse(cls, config: Any) -> None:
        super().refuse(config)
        if config.use_relative_actions:
            raise NotSteerableError(
                "policy 'groot': expected use_relative_actions to be off, got actions relative to a state that its "
                "own decoder remembers, one for all rows. This adapter does not decode them."
            )

    @property
    def _head(self) -> Any:
        return self.policy._groot_model.action_head

    @property
    def noise(self) -> NoiseSpace:
        return self.padded(self._head.action_horizon, self._head.action_dim)

    @property
    def sampler_steps(self) -> int:
        return self._head.num_inference_timesteps

    @property
    def feature_dim(self) -> int:
        return self._head.config.backbone_embedding_dim

    @property
    def executed_steps(self) -> int:
        return min(self.policy._resolve_action_queue_steps(), self._head.action_horizon)

    def feature(self, arguments: Mapping[str, Any]) -> torch.Tensor:
        return pool(arguments["backbone_features"], arguments["backbone_output"]["backbone_attention_mask"])

    def denoise(self, arguments: dict[str, Any], noise: torch.Tensor) -> torch.Tensor:
        with torch.autocast(noise.device.type, torch.bfloat16, enabled=self.config.use_bf16):
            drawn = self.draw(arguments, noise)["action_pred"]
        return drawn[:, :, : self.action_dim]


class Evo1(Split):
    """EVO1: fused InternVL tokens, and noise that is uniform on [-1, 1]."""

    seam = "model.action_head.get_action"
    interface = {seam: ("fused_tokens", "state", "embodiment_id", "action_mask", "context_mask")}

    @property
    def noise(self) -> NoiseSpace:
        width = self.config.max_action_dim
        live = tuple(column < self.action_dim for column in range(width))
        return NoiseSpace(self.config.chunk_size, width, prior="uniform", live=live)

    @property
    def sampler_steps(self) -> int:
        return int(self.policy.model.action_head.num_inference_timesteps)

    @property
    def feature_dim(self) -> int:
        return self.config.embed_dim

    @property
    def chunk_width(self) -> int:
        return self.config.max_action_dim  # its postprocessor crops

    def feature(self, arguments: Mapping[str, Any]) -> torch.Tensor:
        tokens, mask = arguments["fused_tokens"], arguments.get("context_mask")
        if tokens.ndim == 2:
            return tokens
        return pool(tokens, torch.ones(tokens.shape[:2]) if mask is None else mask)

    def denoise(self, arguments: dict[str, Any], noise: torch.Tensor) -> torch.Tensor:
        with self.policy._maybe_autocast():
            return self.draw(arguments, noise).view(noise.shape)


class MolmoAct2(Split):
    """MolmoAct2's continuous mode: the expert is handed the keys and values of every layer."""

    seam = "model.model.generate_actions_from_inputs"
    interface = {
        seam: ("input_ids", "states", "action_dim_is_pad", "encoder_kv_states", "encoder_attention_mask", "generator"),
        "model.model._depth_gate_from_condition": ("encoder_attention_mask", "layer_kv_states"),
    }

    @classmethod
    def refuse(cls, config: Any) -> None:
        super().refuse(config)
        mode = getattr(config, "inference_action_mode", None) or config.action_mode
        refuse_unsteerable(f"policy '{config.type}'", {"type": config.type, "action_mode": mode})

    @property
    def noise(self) -> NoiseSpace:
        return self.padded(self.policy._generation_action_horizon(), self.policy._backbone().config.max_action_dim)

    @property
    def sampler_steps(self) -> int:
        own = getattr(self.config, "num_inference_steps", None)
        return int(own or self.policy._backbone().config.flow_matching_num_steps)

    @property
    def feature_dim(self) -> int:
        return self.policy._backbone().config.hidden_size

    def feature(self, arguments: Mapping[str, Any]) -> torch.Tensor:
        raise AssertionError("the feature is the backbone's output, which the seam is not handed")

    def encode(self, batch: Batch) -> tuple[torch.Tensor, Prefix]:
        backbone = self.policy._backbone()
        asked = self.reach(batch) | {"generator": None}
        with watched(backbone, "forward") as seen:
            found = arguments_at(
                backbone, "_depth_gate_from_condition", lambda: backbone.generate_actions_from_inputs(**asked)
            )
        hidden, mask = seen[0].last_hidden_state, found["encoder_attention_mask"]
        kept = {k: asked.get(k) for k in ("input_ids", "states", "action_dim_is_pad", "action_horizon", "num_steps")}
        kept |= {"encoder_kv_states": found["layer_kv_states"], "encoder_attention_mask": mask}
        rows = len(hidden)
        return pool(hidden, torch.ones(hidden.shape[:2]) if mask is None else mask), Prefix.of(kept, rows)

    def denoise(self, arguments: dict[str, Any], noise: torch.Tensor) -> torch.Tensor:
        return self.draw(arguments, noise)[:, :, : self.action_dim]
