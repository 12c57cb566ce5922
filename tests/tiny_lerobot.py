"""Tiny real LeRobot policies, saved as LeRobot saves them, offline, with every weight random.

Whatever a policy wants from the Hub (a tokenizer, a CLIP, a VLM's config) is built small and put, under the
repository's own name, where `from_pretrained` finds it: in the working directory while building, and in the
policy's folder for the adapter.
"""

import contextlib
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import torch

STATE, ACTIONS = 5, 3
CAMERAS = ("front", "wrist")
IMAGE = 32


def byte_tokenizer(extra=(), named=None, **special):
    """A tokenizer over bytes: every prompt fits, and different prompts differ. `named`: attribute -> token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"} | special
    named = named or {}
    words = [
        *dict.fromkeys([*special.values(), *named.values(), *extra, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    ]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special |= {"extra_special_tokens": named} if named else {"additional_special_tokens": list(extra)}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def features(cameras=CAMERAS, image=IMAGE, state=STATE, actions=ACTIONS):
    """Input and output features of a policy."""
    from lerobot.configs import FeatureType, PolicyFeature

    made = {f"observation.images.{c}": PolicyFeature(FeatureType.VISUAL, (3, image, image)) for c in cameras}
    made["observation.state"] = PolicyFeature(FeatureType.STATE, (state,))
    return {"input_features": made, "output_features": {"action": PolicyFeature(FeatureType.ACTION, (actions,))}}


def statistics(cameras=CAMERAS, state=STATE, actions=ACTIONS, seed=0):
    """Normalisation statistics in which no column is like another."""
    rng = np.random.default_rng(seed)

    def column(width):
        mean, std = rng.normal(0, 0.2, width).astype(np.float32), rng.uniform(0.5, 2.0, width).astype(np.float32)
        low, high = mean - 3 * std, mean + 3 * std
        return {"mean": mean, "std": std, "min": low, "max": high, "q01": low, "q99": high, "q10": low, "q90": high}

    images = {
        f"observation.images.{c}": {
            "mean": np.full((3, 1, 1), 0.5, np.float32),
            "std": np.full((3, 1, 1), 0.25, np.float32),
            "min": np.zeros((3, 1, 1), np.float32),
            "max": np.ones((3, 1, 1), np.float32),
        }
        for c in cameras
    }
    made = images | {"observation.state": column(state), "action": column(actions)}
    return {k: {n: torch.from_numpy(v) for n, v in entry.items()} for k, entry in made.items()}


def randomise(module, scale=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_((scale * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))


def save(kind, folder, **changes):
    """Build the tiny policy of this type and save it; returns the policy it was."""
    from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config_of, assets = _BUILDERS[kind]
    with contextlib.chdir(folder), sizes(kind):
        for repo_id, put in assets.items():
            put(Path(repo_id))
        config = make_policy_config(
            kind, device="cpu", **features(image=_IMAGE.get(kind, IMAGE)) | config_of | changes
        )
        torch.manual_seed(0)
        policy = get_policy_class(kind)(config)
        randomise(policy, scale=_SCALE.get(kind, 0.1))
        policy.save_pretrained(folder)
        for pipeline in make_pre_post_processors(config, dataset_stats=statistics()):
            pipeline.save_pretrained(folder)
        for repo_id in assets:  # where the adapter looks: under the repository's last name
            shutil.move(repo_id, folder / Path(repo_id).name)
    return policy.eval()


@contextlib.contextmanager
def sizes(kind):
    """Where a class has its sizes in code: smaller ones."""
    with contextlib.ExitStack() as stack:
        if kind in ("pi0", "pi05"):
            _small_paligemma(stack, kind)
        yield


def _small_paligemma(stack, kind):
    import importlib

    module = importlib.import_module(f"lerobot.policies.{kind}.modeling_{kind}")
    small = {"gemma_2b": (32, 64), "gemma_300m": (24, 48)}

    def config(variant):
        width, mlp = small[variant]
        return module.GemmaConfig(width=width, depth=2, mlp_dim=mlp, num_heads=2, num_kv_heads=1, head_dim=16)

    def vlm(config):
        for part in (config, config.text_config):
            part.vocab_size = 512
        config._vocab_size, config.image_token_index, config.projection_dim = 512, 511, 32
        vision = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "patch_size": 16,
            "projection_dim": 32,
            "vision_use_head": False,
        }
        for key, value in vision.items():
            setattr(config.vision_config, key, value)
        return real_vlm(config)

    def expert(config):
        config.vocab_size = 8
        return real_expert(config)

    real_vlm, real_expert = module.PaliGemmaForConditionalGenerationWithPiGemma, module.PiGemmaForCausalLM
    stack.enter_context(mock.patch.object(module, "get_gemma_config", config))
    stack.enter_context(mock.patch.object(module, "PaliGemmaForConditionalGenerationWithPiGemma", vlm))
    stack.enter_context(mock.patch.object(module, "PiGemmaForCausalLM", expert))


def _paligemma_tokenizer(folder):
    byte_tokenizer(("<image>",)).save_pretrained(folder)


def _smolvlm(folder):
    from dsrl_vla.adapters.lerobot.nano import VLM_TOKENS, save_vlm
    from dsrl_vla.nano.model import NanoConfig

    sizes = NanoConfig(
        image_size=IMAGE, vision_width=32, vision_layers=1, vlm_width=32, layers=2, heads=2, head_dim=16
    )
    save_vlm(folder, sizes, byte_tokenizer(named=VLM_TOKENS))


def _clip(folder):
    from transformers import CLIPConfig, CLIPModel

    tokenizer = byte_tokenizer()
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    common = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = common | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 77}
    config = CLIPConfig(text_config=text, vision_config=common | {"image_size": IMAGE, "patch_size": 16})
    torch.manual_seed(1)
    model = CLIPModel(config)
    randomise(model, seed=1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


_PALIGEMMA = {"google/paligemma-3b-pt-224": _paligemma_tokenizer}
_CHUNK = {"chunk_size": 6, "n_action_steps": 3}
_PI = dict(image_resolution=(IMAGE, IMAGE), num_inference_steps=4, max_action_dim=8, max_state_dim=8, **_CHUNK)
_IMAGE = {"diffusion": 64}  # its backbone divides by 32, and a single keypoint's place says nothing
_SCALE = {"diffusion": 0.02, "multi_task_dit": 0.05}


def _vlm(name):
    def put(folder):
        import tiny_vlms

        getattr(tiny_vlms, name)(folder)

    return put


def _bart_tokenizer(folder):
    byte_tokenizer().save_pretrained(folder)


def _florence():
    """Sizes of a tiny Florence-2: three stages of DaViT, then BART's encoder."""
    size = {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "vocab_size": 512,
        "max_position_embeddings": 256,
    }
    stages = {
        "depths": [1, 1, 1],
        "embed_dim": [16, 32, 32],
        "num_heads": [2, 2, 2],
        "num_groups": [2, 2, 2],
        "window_size": 4,
        "patch_size": [7, 3, 3],
        "patch_stride": [4, 2, 2],
        "patch_padding": [3, 1, 1],
        "patch_prenorm": [False, True, True],
        "projection_dim": 32,
    }
    return {"vision_config": stages, "text_config": {"model_type": "bart"} | size}


_BUILDERS = {
    "pi0": (_PI, _PALIGEMMA),
    "pi05": (_PI, _PALIGEMMA),
    "smolvla": (
        dict(
            vlm_model_name="HuggingFaceTB/tiny-smolvlm",
            load_vlm_weights=False,
            resize_imgs_with_padding=(IMAGE, IMAGE),
            num_vlm_layers=2,
            num_steps=4,
            max_action_dim=8,
            max_state_dim=8,
            **_CHUNK,
        ),
        {"HuggingFaceTB/tiny-smolvlm": _smolvlm},
    ),
    "diffusion": (
        {
            "pretrained_backbone_weights": None,
            "noise_scheduler_type": "DDIM",
            "num_inference_steps": 4,
            "horizon": 8,
            "n_action_steps": 4,
            "n_obs_steps": 2,
            "down_dims": (16, 32),
            "n_groups": 4,
            "spatial_softmax_num_keypoints": 4,
            "diffusion_step_embed_dim": 16,
            "use_group_norm": True,
        },
        {},
    ),
    "multi_task_dit": (
        {
            "objective": "flow_matching",
            "num_integration_steps": 4,
            "horizon": 8,
            "n_action_steps": 4,
            "hidden_dim": 32,
            "num_layers": 2,
            "num_heads": 2,
            "timestep_embed_dim": 16,
            "image_crop_shape": None,
            "dropout": 0.1,
            "vision_encoder_name": "openai/clip-tiny",
            "text_encoder_name": "openai/clip-tiny",
        },
        {"openai/clip-tiny": _clip},
    ),
    "xvla": (
        dict(
            florence_config=_florence(),
            hidden_size=32,
            depth=2,
            num_heads=2,
            len_soft_prompts=4,
            dim_time=8,
            max_len_seq=128,
            num_denoising_steps=4,
            action_mode="auto",
            max_action_dim=8,
            max_state_dim=8,
            **_CHUNK,
        ),
        {"facebook/bart-large": _bart_tokenizer},
    ),
    "vla_jepa": (
        dict(
            qwen_model_name="Qwen/tiny-qwen3-vl",
            freeze_qwen=True,
            torch_dtype="float32",
            action_hidden_size=32,
            action_num_layers=2,
            action_num_heads=2,
            action_attention_head_dim=16,
            num_video_frames=4,
            num_embodied_action_tokens_per_instruction=4,
            num_action_tokens_per_timestep=2,
            action_dim=ACTIONS,
            state_dim=STATE,
            gripper_dim=2,
            clip_normalized_actions=False,
            binarize_gripper_action=False,
            pre_snap_gripper_action=False,
            **_CHUNK,
        ),
        {"Qwen/tiny-qwen3-vl": _vlm("qwen3_vl")},
    ),
    "eo1": (
        dict(
            vlm_base="Qwen/tiny-qwen2.5-vl",
            image_min_pixels=28 * 28,
            image_max_pixels=56 * 56,
            max_action_dim=8,
            max_state_dim=8,
            num_denoise_steps=4,
            dtype="float32",
            use_fast_processor=True,
            **_CHUNK,
        ),
        {"Qwen/tiny-qwen2.5-vl": _vlm("qwen2_5_vl")},
    ),
    "evo1": (
        dict(
            vlm_model_name="OpenGVLab/tiny-internvl",
            vlm_num_layers=2,
            vlm_dtype="float32",
            use_flash_attn=False,
            image_resolution=(IMAGE, IMAGE),
            max_views=2,
            max_action_dim=8,
            max_state_dim=8,
            embed_dim=32,
            hidden_dim=32,
            state_hidden_dim=32,
            num_heads=2,
            num_layers=2,
            num_inference_timesteps=4,
            enable_gradient_checkpointing=False,
            **_CHUNK,
        ),
        {"OpenGVLab/tiny-internvl": _vlm("internvl")},
    ),
}

KINDS = tuple(_BUILDERS)
