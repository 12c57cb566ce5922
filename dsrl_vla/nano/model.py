"""The nano base's architecture: a real `PI0ForConditionalGeneration`, three orders of magnitude smaller."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import at_least, bad, missing_extra


@dataclass(frozen=True)
class NanoConfig:
    """Sizes of the miniature."""

    image_size: int = 64
    patch_size: int = 16
    vision_width: int = 64
    vision_layers: int = 3
    vlm_width: int = 96
    expert_width: int = 128
    layers: int = 3
    """Layers of the language model and of the action expert, which attends to it layer by layer."""
    heads: int = 4
    head_dim: int = 24
    chunk: int = 8
    """Steps in a chunk, all of them executed."""
    max_state_dim: int = 32
    max_action_dim: int = 8
    """Width of the noise; the columns beyond the task's actions are padding."""
    prompt_tokens: int = 20
    sampler_steps: int = 5

    def __post_init__(self) -> None:
        at_least(1, self, "model", *(field.name for field in fields(self)))
        if self.image_size % self.patch_size:
            raise bad("model.image_size", f"a multiple of model.patch_size={self.patch_size}", self.image_size)

    @property
    def image_tokens(self) -> int:
        """Image tokens of one camera."""
        return (self.image_size // self.patch_size) ** 2


def build_tokenizer(texts: Iterable[str], named: Mapping[str, str] | None = None) -> Any:
    """A word-level tokenizer over `texts`, as a transformers tokenizer that saves and loads like any other.

    Args:
        named: further special tokens that the tokenizer knows by attribute; by default only ``<image>``, unnamed.
    """
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise missing_extra("transformers", "transformers", "building a nano base") from error
    words = sorted({word for text in texts for word in text.replace(",", " , ").split()})
    special = ["<pad>", "<bos>", "<eos>", "<unk>", *(named or {"image_token": "<image>"}).values()]
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        **({"extra_special_tokens": dict(named)} if named else {"additional_special_tokens": ["<image>"]}),
    )


def build_model(config: NanoConfig, vocab_size: int, image_token_id: int) -> Any:
    """A freshly initialised ``PI0ForConditionalGeneration`` of these sizes."""
    try:
        from transformers import PI0Config, PI0ForConditionalGeneration
    except ImportError as error:
        raise missing_extra("transformers", "transformers", "building a nano base") from error
    gemma = {
        "model_type": "gemma",
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": 1,
        "head_dim": config.head_dim,
        "vocab_size": vocab_size,
    }
    vlm = {
        "model_type": "paligemma",
        "image_token_id": image_token_id,
        "projection_dim": config.vlm_width,
        "text_config": gemma
        | {"hidden_size": config.vlm_width, "intermediate_size": 3 * config.vlm_width, "pad_token_id": 0},
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": config.vision_width,
            "intermediate_size": 2 * config.vision_width,
            "num_hidden_layers": config.vision_layers,
            "num_attention_heads": 4,
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "vision_use_head": False,
        },
    }
    expert = gemma | {"hidden_size": config.expert_width, "intermediate_size": 3 * config.expert_width}
    return PI0ForConditionalGeneration(
        PI0Config(
            vlm_config=vlm,
            dit_config=expert,
            chunk_size=config.chunk,
            max_state_dim=config.max_state_dim,
            max_action_dim=config.max_action_dim,
            num_inference_steps=config.sampler_steps,
        )
    )
