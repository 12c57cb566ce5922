"""Tiny real vision-language models, saved where a LeRobot policy looks for the full-size one."""

import torch
from tiny_lerobot import IMAGE, byte_tokenizer, randomise

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def _text(vocabulary, **more):
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0} | more.pop("rope", {})
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": vocabulary,
        "rope_scaling": rope,
        "rope_parameters": rope,
        "max_position_embeddings": 2048,
    } | more


def _ids(tokenizer):
    wanted = {
        "image_token_id": TOKENS[4],
        "video_token_id": TOKENS[5],
        "vision_start_token_id": TOKENS[2],
        "vision_end_token_id": TOKENS[3],
    }
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in wanted.items()}


def _save(model, folder, *processors):
    torch.manual_seed(1)
    randomise(model, seed=1)
    for saved in (model, *processors):
        saved.save_pretrained(folder)


def qwen3_vl_config(tokenizer, spare=128):
    from transformers import Qwen3VLConfig

    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 16,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
        "spatial_merge_size": 2,
    }
    text = _text(len(tokenizer) + spare, rope={"mrope_interleaved": True})
    return Qwen3VLConfig(text_config=text, vision_config=vision, **_ids(tokenizer))


def qwen3_vl(folder):
    from transformers import (
        Qwen2VLImageProcessorFast,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    tokenizer = byte_tokenizer(TOKENS)
    size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    images = Qwen2VLImageProcessorFast(patch_size=16, merge_size=2, size=size)
    processor = Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(), chat_template=CHAT)
    _save(Qwen3VLForConditionalGeneration(qwen3_vl_config(tokenizer)), folder, processor)


def qwen2_5_vl(folder):
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessorFast,
        Qwen2VLVideoProcessor,
    )

    tokenizer = byte_tokenizer(TOKENS)
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 14,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
        "window_size": 56,
        "spatial_merge_size": 2,
    }
    config = Qwen2_5_VLConfig(text_config=_text(len(tokenizer) + 16), vision_config=vision, **_ids(tokenizer))
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    images = Qwen2VLImageProcessorFast(patch_size=14, merge_size=2, size=size)
    processor = Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=CHAT)
    _save(Qwen2_5_VLForConditionalGeneration(config), folder, processor)


def internvl(folder):
    from transformers import InternVLConfig, InternVLModel

    tokenizer = byte_tokenizer(("<IMG_CONTEXT>", "<img>", "</img>"))
    text = {
        "model_type": "qwen2",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 2048,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": [IMAGE, IMAGE],
        "patch_size": [8, 8],
    }
    image = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    config = InternVLConfig(text_config=text, vision_config=vision, image_token_id=image, image_seq_length=4)
    _save(InternVLModel(config), folder, tokenizer)
