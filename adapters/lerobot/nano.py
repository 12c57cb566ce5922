"""A miniature SmolVLA: LeRobot's own class at sizes that a CPU can train."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class SmolNanoConfig:
    """Sizes of the miniature."""

    image_size: int = 64
    patch_size: int = 16
    vision_width: int = 64
    vision_layers: int = 3
    vlm_width: int = 96
    layers: int = 4
    heads: int = 4
    expert_share: float = 1.0
    """Width of the action expert, as a share of the language model's."""
    chunk: int = 8
    max_state_dim: int = 32
    max_action_dim: int = 8
    """Width of the noise; the columns beyond the task's actions are padding."""
    prompt_tokens: int = 20
    sampler_steps: int = 5


VLM_TOKENS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}
"""Tokens that SmolVLM's processor asks its tokenizer for, by attribute."""


def save_vlm(folder: Path, sizes: SmolNanoConfig, tokenizer: Any) -> None:
    """Write what SmolVLA reads of its vision-language model: config, tokenizer, image processor; no weights."""
    from transformers import SmolVLMConfig, SmolVLMImageProcessor, SmolVLMProcessor
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

    side = sizes.image_size // sizes.patch_size
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
            "head_dim": sizes.vlm_width // sizes.heads,
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
        image_seq_len=side * side,
    ).save_pretrained(folder)
