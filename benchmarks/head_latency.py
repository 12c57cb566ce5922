"""What a steering head adds to a decision, in CPU time on one thread, on the nano base and on one of π0's proportions.

The second base is a randomly initialised ``PI0ForConditionalGeneration`` with every width an eighth of π0's and all
else as it is: 18 and 27 layers, two cameras of 256 tokens, a prompt of 48, chunks of 50, 10 steps. A layer's cost goes
with the square of its width, so vision, prefix and action expert stand to each other as in π0, at about 1/64 of the
cost, while the head is as large as it would be for π0: its share here is an upper bound of its share there.

Decisions without and with a head alternate, so that whatever else the machine does hits both. Writes
benchmarks/results/head_latency.json: per decision the CPU milliseconds of either, what the head adds by that
comparison, and its time inside the decision, which a comparison of seconds is too coarse to show.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

PROMPT = "pick up the black bowl and place it on the plate"


@dataclass(frozen=True)
class Args:
    """How much to measure."""

    rounds: int = 21
    nano_decisions: int = 20
    """Per round and policy."""
    pi0_decisions: int = 1
    out: Path = field(default=Path(__file__).parent / "results" / "head_latency.json")


def pi0_in_small() -> Any:
    """A base of π0's proportions, all of its weights random."""
    from dsrl_vla.adapters.pi0_processing import Pi0Processing, Pi0Statistics
    from dsrl_vla.adapters.transformers_pi0 import TransformersPi0
    from dsrl_vla.nano.model import build_tokenizer
    from transformers import PI0Config, PI0ForConditionalGeneration

    tokenizer = build_tokenizer([PROMPT])
    gemma = {"model_type": "gemma", "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1,
             "head_dim": 32, "vocab_size": len(tokenizer)}  # fmt: skip
    vision = {"model_type": "siglip_vision_model", "hidden_size": 144, "intermediate_size": 538,
              "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 224, "patch_size": 14,
              "vision_use_head": False}  # fmt: skip
    vlm = {
        "model_type": "paligemma",
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "projection_dim": 256,
        "text_config": gemma | {"hidden_size": 256, "intermediate_size": 2048, "pad_token_id": 0},
        "vision_config": vision,
    }
    expert = gemma | {"hidden_size": 128, "intermediate_size": 512}
    torch.manual_seed(0)
    sizes = {"chunk_size": 50, "max_state_dim": 32, "max_action_dim": 32, "num_inference_steps": 10}
    model = PI0ForConditionalGeneration(PI0Config(vlm_config=vlm, dit_config=expert, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    statistics = Pi0Statistics(
        cameras=("image", "image2"), image_size=224, image_seq_length=256, max_length=48, state_mean=(0.0,) * 8,
        state_std=(1.0,) * 8, actions_mean=(0.0,) * 7, actions_std=(1.0,) * 7, executed_steps=5,
    )  # fmt: skip
    return TransformersPi0(model, Pi0Processing(statistics, tokenizer, 32), uri="transformers:pi0-in-small")


def make_head(spec: Any, layout: str) -> Any:
    """The default head for a base."""
    from dsrl_vla.head import HeadConfig, SteeringHead
    from dsrl_vla.networks import NetworkConfig
    from dsrl_vla.noise import NoiseLayout

    torch.manual_seed(0)
    return SteeringHead(HeadConfig.for_base(spec, NoiseLayout(spec.noise, layout, 1.5), NetworkConfig())).eval()


def example(base: Any) -> dict[str, Any]:
    """A random observation."""
    rng, spec = np.random.default_rng(0), base.spec.observation
    seen: dict[str, Any] = {"observation.state": rng.normal(size=spec.state_dim).astype(np.float32), "task": PROMPT}
    for camera in spec.cameras:
        size = base.processing.statistics.image_size
        seen[f"observation.images.{camera}"] = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    return seen


def cpu_ms(work: Callable[[], Any]) -> float:
    """CPU milliseconds of a call."""
    start = time.process_time()
    work()
    return 1000 * (time.process_time() - start)


def spread(values: np.ndarray) -> dict[str, Any]:
    """Median and quartiles."""
    low, high = np.quantile(values, (0.25, 0.75))
    return {"median": round(float(np.median(values)), 3), "quartiles": [round(float(low), 3), round(float(high), 3)]}


def time_noise(policy: Any) -> list[float]:
    """From now on, the CPU milliseconds of every choice of noise, where it happens: between prefix and sampler."""
    taken: list[float] = []
    choose = policy.noise

    def timed(*arguments: Any, **more: Any) -> Any:
        start = time.process_time()
        chosen = choose(*arguments, **more)
        taken.append(1000 * (time.process_time() - start))
        return chosen

    policy.noise = timed
    return taken


def measure(base: Any, decisions: int, rounds: int) -> dict[str, Any]:
    """Decisions without and with a head, in turn; and the head alone, on the encoding of that observation."""
    from dsrl_vla import SteeredPolicy
    from dsrl_vla.observation import unsqueeze

    head, seen = make_head(base.spec, "repeat"), example(base)
    policy, batch = SteeredPolicy(base, head), unsqueeze(seen)
    encoding, inside = base.encode(batch), time_noise(policy)
    works = {"unsteered": lambda: base.act(seen, seed=0), "steered": lambda: policy.act(seen)}
    found: dict[str, list[float]] = {name: [] for name in (*works, "head_alone", "head_in_the_decision")}
    for number in range(rounds + 1):  # the first one warms up
        inside.clear()
        taken: dict[str, list[float]] = {name: [] for name in works}
        for turn in range(decisions):  # turn and turn about, so that a burst of other work hits both
            for name in list(works)[:: 1 if turn % 2 else -1]:
                taken[name].append(cpu_ms(works[name]))
        taken["head_alone"] = [cpu_ms(lambda: head.noise(batch, encoding, None)) for _ in range(20)]
        taken["head_in_the_decision"] = inside
        for name, values in taken.items():
            if number:
                found[name].append(float(np.median(values)))
    times_ms = {name: np.array(values) for name, values in found.items()}
    return {
        "noise_shape": list(base.spec.noise.shape),
        "feature_dim": base.spec.feature_dim,
        "base_parameters": sum(p.numel() for p in base.model.parameters()),
        "head_parameters": sum(p.numel() for p in head.parameters()),
        "decisions_per_round": decisions,
        "cpu_ms": {name: spread(values) for name, values in times_ms.items()},
        "added_per_cent": spread(100 * (times_ms["steered"] / times_ms["unsteered"] - 1)),
        "head_in_the_decision_per_cent": spread(100 * times_ms["head_in_the_decision"] / times_ms["unsteered"]),
    }


def head_for_pi0(rounds: int) -> dict[str, Any]:
    """CPU milliseconds of the head that π0 itself would get: features of 2048, noise (50, 32)."""
    from dsrl_vla.head import HeadConfig, SteeringHead
    from dsrl_vla.networks import NetworkConfig
    from dsrl_vla.noise import NoiseLayout, NoiseSpace

    found = {}
    for layout in ("repeat", "chunk"):
        torch.manual_seed(0)
        config = HeadConfig(
            layout=NoiseLayout(NoiseSpace(50, 32), layout, 1.5), state_dim=8, feature_dim=2048, executed_steps=5,
            adapter="", base_model_name_or_path="", network=NetworkConfig(),
        )  # fmt: skip
        head = SteeringHead(config).eval()
        inputs = {"state": torch.randn(1, 8), "feature": torch.randn(1, 2048)}
        work = lambda head=head, inputs=inputs: head.layout.expand(head.latent(inputs, None))
        with torch.no_grad():
            values = np.array([cpu_ms(work) for _ in range(20 * (rounds + 1))][20:])
        found[layout] = {"parameters": sum(p.numel() for p in head.parameters()), "cpu_ms": spread(values)}
    return found


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    from dsrl_vla import load_base

    torch.set_num_threads(1)
    result = {
        "torch": torch.__version__,
        "threads": 1,
        "rounds": args.rounds,
        "nano": measure(load_base("nano:"), args.nano_decisions, args.rounds),
        "pi0_in_small": measure(pi0_in_small(), args.pi0_decisions, args.rounds),
        "head_for_pi0": head_for_pi0(args.rounds),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
