"""A miniature SmolVLA: LeRobot's own class at sizes that a CPU can train, saved as LeRobot saves a policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from dsrl_vla.nano.clone import CloneConfig, OnStep, Sampler, Sight, fit, statistics
from dsrl_vla.nano.demos import Demos
from dsrl_vla.nano.model import NanoConfig, build_tokenizer
from dsrl_vla.observation import IMAGE_PREFIX, STATE
from dsrl_vla.run_dir import disk_errors
from dsrl_vla.tasks.metaworld import prompts

from ..pi0_sampling import pool
from .loading import load, require_lerobot
from .seam import watched

_VLM = "smolvlm"


VLM_TOKENS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}
"""Tokens that SmolVLM's processor asks its tokenizer for, by attribute."""


def save_vlm(folder: Path, sizes: NanoConfig, tokenizer: Any) -> None:
    """Write what SmolVLA reads of its vision-language model: config, tokenizer, image processor; no weights."""
    from transformers import SmolVLMConfig, SmolVLMImageProcessor, SmolVLMProcessor
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

    config = SmolVLMConfig(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=1,
        text_config={
            "model_type": "llama",
            "hidden_size": sizes.vlm_width,
            "intermediate_size": 3 * sizes.vlm_width,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": max(1, sizes.heads // 2),
            "head_dim": sizes.head_dim,
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "hidden_size": sizes.vision_width,
            "intermediate_size": 2 * sizes.vision_width,
            "num_hidden_layers": sizes.vision_layers,
            "num_attention_heads": 4,
            "image_size": sizes.image_size,
            "patch_size": sizes.patch_size,
        },
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    image = {"longest_edge": sizes.image_size}
    SmolVLMProcessor(
        SmolVLMImageProcessor(size=image, max_image_size=image),
        tokenizer,
        SmolVLMVideoProcessor(),
        image_seq_len=sizes.image_tokens,
    ).save_pretrained(folder)


def build(sizes: NanoConfig, demos: Demos, out: Path) -> Any:
    """A freshly initialised SmolVLA of these sizes for these demonstrations; its VLM's files go to `out`."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    vlm = (out / _VLM).resolve()
    save_vlm(vlm, sizes, build_tokenizer([*prompts().values(), *demos.prompts], VLM_TOKENS))
    image = PolicyFeature(FeatureType.VISUAL, (3, sizes.image_size, sizes.image_size))
    config = SmolVLAConfig(
        device="cpu",
        input_features={
            IMAGE_PREFIX + demos.camera: image,
            STATE: PolicyFeature(FeatureType.STATE, demos.states.shape[1:]),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, demos.actions.shape[1:])},
        vlm_model_name=str(vlm),
        load_vlm_weights=False,
        resize_imgs_with_padding=(sizes.image_size, sizes.image_size),
        num_vlm_layers=sizes.layers,
        expert_width_multiplier=sizes.expert_width / sizes.vlm_width,
        chunk_size=sizes.chunk,
        n_action_steps=sizes.chunk,
        max_state_dim=sizes.max_state_dim,
        max_action_dim=sizes.max_action_dim,
        tokenizer_max_length=sizes.prompt_tokens,
        pad_language_to="max_length",
        num_steps=sizes.sampler_steps,
        freeze_vision_encoder=False,
        train_expert_only=False,
    )
    return SmolVLAPolicy(config)


def clone_smolvla(demos: Demos, config: CloneConfig, sizes: NanoConfig, out: Path, on_step: OnStep) -> Any:
    """The architecture ``smolvla``: LeRobot's class, its training loss, and its processors.

    Raises:
        MissingExtraError: LeRobot is not installed.
    """
    require_lerobot("the architecture 'smolvla'")
    from lerobot.policies.factory import make_pre_post_processors

    torch.manual_seed(config.seed)
    policy = build(sizes, demos, out).train()
    pipelines = make_pre_post_processors(policy.config, dataset_stats=_statistics(demos, sizes))
    sight = Sight(demos, sizes.vlm_width)
    sample = Sampler(demos, sizes.chunk, config.wait_share, np.random.default_rng(config.seed))
    camera = IMAGE_PREFIX + demos.camera

    def losses() -> tuple[torch.Tensor, torch.Tensor]:
        observations, actions, objects = sample(config.batch)
        image = torch.from_numpy(observations[camera]).permute(0, 3, 1, 2).float() / 255
        state = torch.from_numpy(observations[STATE])
        batch = pipelines[0](dict(observations) | {camera: image, STATE: state, "action": actions})
        with watched(policy.model.vlm_with_expert, "forward") as seen, watched(policy.model, "embed_prefix") as prefix:
            flow, _ = policy(batch)
        return flow, sight(pool(seen[0][0][0], prefix[0][1]), objects)

    trained = [p for p in policy.parameters() if p.requires_grad]
    fit([*trained, *sight.parameters()], losses, config, on_step)
    with disk_errors(out):
        for saved in (policy.eval(), *pipelines):
            saved.save_pretrained(out)
    return load(str(out))


def _statistics(demos: Demos, sizes: NanoConfig) -> dict[str, dict[str, torch.Tensor]]:
    found = statistics(demos, sizes)
    return {
        STATE: {"mean": torch.tensor(found.state_mean), "std": torch.tensor(found.state_std)},
        "action": {"mean": torch.tensor(found.actions_mean), "std": torch.tensor(found.actions_std)},
    }
