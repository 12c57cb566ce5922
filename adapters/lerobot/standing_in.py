"""X-VLA, EO-1, Wall-X: encoder and sampler in one method, with the noise drawn in between.

The method is called again for every noise, and what its encoder returned the first time stands in for the encoder.
Wall-X has no encoder apart from its sampler: every step goes over the whole sequence, and K noises cost K times as
much as one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from dsrl_vla.noise import NoiseSpace

from ..pi0_sampling import pool
from ..refusals import refuse_unsteerable
from .seam import Prefix, arguments_at, replaced, watched
from .split import Batch, Split


class XVLA(Split):
    """X-VLA: a Florence-2 encoder and a soft-prompted transformer that predicts the clean action."""

    seam = "model.generate_actions"
    interface = {
        seam: ("input_ids", "image_input", "image_mask", "domain_id", "proprio", "steps"),
        "model.forward_vlm": ("input_ids", "pixel_values", "image_mask"),
    }

    @property
    def noise(self) -> NoiseSpace:
        """Gripper columns of the ee6d and joint spaces are zeroed before the network sees them: not live."""
        space, width = self.policy.model.action_space, self.policy.model.dim_action
        proprio = torch.zeros(1, max(self.policy.model.dim_proprio, width))
        seen = space.preprocess(proprio, torch.ones(1, 1, width))[1][0, 0, :width]
        real = space.postprocess(torch.zeros(1, 1, width)).shape[-1]
        return NoiseSpace(self.config.chunk_size, width, live=tuple(bool(seen[i]) and i < real for i in range(width)))

    @property
    def chunk_width(self) -> int:
        width = self.policy.model.dim_action
        return self.policy.model.action_space.postprocess(torch.zeros(1, 1, width)).shape[-1]

    @property
    def sampler_steps(self) -> int:
        return self.config.num_denoising_steps

    @property
    def feature_dim(self) -> int:
        return self.config.get_florence_config().vision_config.projection_dim

    def cast(self, dtype: torch.dtype) -> None:
        self.config.dtype = str(dtype).removeprefix("torch.")
        self.policy.model._apply_dtype()

    def feature(self, arguments: Mapping[str, Any]) -> torch.Tensor:
        return arguments["seen"]["vlm_features"].float().mean(1)

    def reach(self, batch: Batch) -> dict[str, Any]:
        arguments = super().reach(batch)
        images = arguments["image_input"].to(self.policy.model._get_target_dtype())
        seen = self.policy.model.forward_vlm(arguments["input_ids"], images, arguments["image_mask"])
        return arguments | {"seen": seen, "image_input": images[:, :0]}

    def denoise(self, arguments: dict[str, Any], noise: torch.Tensor) -> torch.Tensor:
        seen = arguments.pop("seen")
        with replaced(self.policy.model, "forward_vlm", lambda *_: seen):
            return self.draw(arguments, noise)


class EO1(Split):
    """EO-1: a Qwen2.5-VL whose cache of the prompt is kept while the action tokens are denoised."""

    seam = "model.sample_actions"
    interface = {seam: ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "states"),
                 "model.sample_noise": ("shape", "device")}  # fmt: skip

    @property
    def noise(self) -> NoiseSpace:
        return self.padded(self.config.chunk_size, self.config.max_action_dim)

    @property
    def sampler_steps(self) -> int:
        return self.config.num_denoise_steps

    @property
    def feature_dim(self) -> int:
        return self.policy.model.hidden_size

    def feature(self, arguments: Mapping[str, Any]) -> torch.Tensor:
        raise AssertionError("the feature is the backbone's output, which the seam is not handed")

    def encode(self, batch: Batch) -> tuple[torch.Tensor, Prefix]:
        model, arguments = self.policy.model, self.reach(batch)
        network = model.vlm_backbone.model
        with watched(network, "forward") as outputs, watched(network, "get_rope_index") as positions:
            arguments_at(model, "sample_noise", lambda: model.sample_actions(**arguments))
        hidden = outputs[0].last_hidden_state
        kept = arguments | {
            "pixel_values": None,
            "image_grid_thw": None,
            "cache": outputs[0].past_key_values,
            "positions": positions[0][0].movedim(1, 0),
        }
        mask = arguments["attention_mask"][:, : hidden.shape[1]]
        return pool(hidden, mask), Prefix.of(kept, len(hidden))

    def denoise(self, arguments: dict[str, Any], noise: torch.Tensor) -> torch.Tensor:
        model, cache = self.policy.model, arguments.pop("cache")
        network, positions = model.vlm_backbone.model, arguments.pop("positions").movedim(0, 1)
        forward = network.forward

        def resumed(*args: Any, **kwargs: Any) -> Any:
            """The pass over the prompt is the one without a cache; it has been made."""
            if kwargs.get("past_key_values") is None:
                return _Remembered(cache)
            return forward(*args, **kwargs)

        with contextlib.ExitStack() as stack:
            stack.enter_context(replaced(network, "forward", resumed))
            stack.enter_context(replaced(network, "get_rope_index", lambda *_, **__: (positions, None)))
            stack.enter_context(replaced(model, "sample_noise", lambda shape, device: noise.view(shape)))
            chunk = model.sample_actions(**arguments)
        return chunk[:, :, : self.action_dim].float()


class _Remembered:
    """An output of the backbone of which only the cache is asked for."""

    def __init__(self, cache: Any):
        self.past_key_values = cache


class WallX(Split):
    """Wall-X in its diffusion mode."""

    seam = "model.predict"
    interface = {seam: ("predict_mode", "pred_horizon", "action_dim", "input_ids", "dof_mask", "proprioception",
                        "num_inference_timesteps")}  # fmt: skip
    _packed = ("pixel_values", "image_grid_thw")  # one row per patch or image, the same number for every observation

    @classmethod
    def refuse(cls, config: Any) -> None:
        super().refuse(config)
        refuse_unsteerable(f"policy '{config.type}'", {"type": config.type, "prediction_mode": config.prediction_mode})

    @property
    def noise(self) -> NoiseSpace:
        return self.padded(self.config.chunk_size, self.config.max_action_dim)

    @property
    def sampler_steps(self) -> int:
        return self.default("num_inference_timesteps")

    @property
    def feature_dim(self) -> int:
        return 0

    def feature(self, arguments: Mapping[str, Any]) -> None:
        """Nothing is seen before the sampler starts."""

    def encode(self, batch: Batch) -> tuple[None, Prefix]:
        arguments = self.reach(batch)
        rows = len(arguments["input_ids"])
        for name in self._packed:
            if arguments.get(name) is not None:
                arguments[name] = arguments[name].unflatten(0, (rows, -1))
        return None, Prefix.of(arguments, rows)

    def denoise(self, arguments: dict[str, Any], noise: torch.Tensor) -> torch.Tensor:
        for name in self._packed:
            if arguments.get(name) is not None:
                arguments[name] = arguments[name].flatten(0, 1)
        return self.draw(arguments, noise)["predict_action"][:, :, : self.action_dim]
