"""What each part takes for π0 on a 24 GB GPU: computed, not measured, from the real class's weights.

    python benchmarks/bench_memory.py

The model is built on the meta device, where weights have shapes and no storage. Activations and the allocator's own
share are not counted; what is left over has to hold them. Writes results/memory.json.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from common import Goal, finish
from dsrl_vla.critic import CriticConfig, CriticEnsemble
from dsrl_vla.head import HeadConfig, SteeringHead
from dsrl_vla.networks import NetworkConfig
from dsrl_vla.noise import NoiseLayout, NoiseSpace

GIB = 2**30


@dataclass(frozen=True)
class Args:
    """The set-up."""

    cameras: int = 3
    prompt: int = 48
    noises: int = 9
    """Noises behind one prefix: DSRL-NA's bank and the executed one."""
    gpu_gb: float = 24.0


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def base_parts() -> tuple[Any, dict[str, int]]:
    """π0's config, and the weights of its parts."""
    from transformers import PI0Config, PI0ForConditionalGeneration

    config = PI0Config()
    with torch.device("meta"):
        model = PI0ForConditionalGeneration(config)
    vlm, expert = model.model.vlm, model.model.dit
    unused = count(expert.embed_tokens) if getattr(expert, "embed_tokens", None) is not None else 0
    parts = {
        "SigLIP": count(vlm.vision_tower),
        "Gemma 2B": count(vlm.language_model),
        "action expert": count(expert) - unused,
        "action expert's word embeddings (never read)": unused,
    }
    return config, parts | {"projections": count(model) - sum(parts.values())}


def cache_bytes(config: Any, tokens: int) -> int:
    """Keys and values of one observation, bfloat16."""
    text = config.vlm_config.text_config
    return 2 * 2 * tokens * text.num_hidden_layers * text.num_key_value_heads * text.head_dim


def learner_parts(width: int) -> dict[str, int]:
    """Bytes of head and critics on features of this width, float32, by what they are for."""
    layout = NoiseLayout(NoiseSpace(50, 32), "repeat", columns="all")
    network = NetworkConfig()
    head = SteeringHead(HeadConfig(layout, 32, width, 50, "", "", network=network))
    critic = CriticEnsemble(CriticConfig(network), head.config)
    trained = count(head) + count(critic)
    return {
        "head and critics": 4 * trained,
        "their gradients": 4 * trained,
        "their optimisers (two moments)": 8 * trained,
        "averaged head and target critics": 4 * trained,
    }


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    config, parts = base_parts()
    tokens = 256 * args.cameras + args.prompt
    cache = cache_bytes(config, tokens)
    table = {f"base, bfloat16: {name}": 2 * number for name, number in parts.items()}
    table |= {
        f"keys and values of one observation ({tokens} tokens)": cache,
        f"… of {args.noises} noises, as copied by the fan-out": args.noises * cache,
    }
    table |= {f"learner, float32: {name}": size for name, size in learner_parts(2048).items()}
    total = sum(table.values())
    replay = {"pooled feature and state": 4 * (2048 + 32), "keys and values, were they kept": cache}
    return finish(
        "memory",
        [
            Goal(
                "π0, one observation, and the learner",
                round(total / GIB, 2),
                round(args.gpu_gb * 1e9 / GIB, 2),
                False,
                " GiB",
            )
        ],
        computed=True,
        set_up=vars(args),
        bytes=table,
        total_bytes=total,
        replay_bytes_per_observation=replay,
        copies_of_the_base={"in memory": 1, "in targets": 0, "in checkpoints": 0},
    )


if __name__ == "__main__":
    sys.exit(main())
