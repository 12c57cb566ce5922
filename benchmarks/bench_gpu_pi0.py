"""What steering adds to a full-size π0 in bfloat16 on one GPU, and what eight noises cost in place of one.

    python benchmarks/bench_gpu_pi0.py [--rounds 15]

The native `PI0ForConditionalGeneration` at its real size with random weights: its speed does not depend on them.
Wall-clock time from an observation of pictures to actions on the CPU. Prefix and sampler are recorded CUDA graphs;
`unrecorded` is the same launched from Python, as transformers does it. Writes results/gpu_pi0.json.
"""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tyro
from common import Goal, finish, interval, on_the_gpu
from dsrl_vla import SteeredPolicy
from dsrl_vla.adapters.pi0_processing import Pi0Processing, Pi0Statistics
from dsrl_vla.adapters.transformers_pi0 import TransformersPi0
from dsrl_vla.head import HeadConfig, SteeringHead
from dsrl_vla.nano.model import build_tokenizer
from dsrl_vla.networks import NetworkConfig
from dsrl_vla.noise import NoiseLayout, generators
from dsrl_vla.observation import unsqueeze
from head_latency import PROMPT, example


@dataclass(frozen=True)
class Args:
    """What to measure."""

    rounds: int = 15
    cameras: tuple[int, ...] = (2, 3)
    """Of π0, each in turn."""


def full_pi0(cameras: int) -> Any:
    """π0 at its real size, bfloat16, random weights made on the GPU."""
    from transformers import PI0Config, PI0ForConditionalGeneration

    tokenizer, config = build_tokenizer([PROMPT]), PI0Config()
    config.vlm_config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = PI0ForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    statistics = Pi0Statistics(
        cameras=tuple("abcd"[:cameras]), image_size=224, image_seq_length=256, max_length=48, state_mean=(0.0,) * 8,
        state_std=(1.0,) * 8, actions_mean=(0.0,) * 7, actions_std=(1.0,) * 7, executed_steps=5,
    )  # fmt: skip
    return TransformersPi0(model, Pi0Processing(statistics, tokenizer, config.max_state_dim), uri="transformers:pi0")


def ceilings() -> dict[str, float]:
    """What this GPU does at most: bytes moved by a copy, counted twice, and bfloat16 products of random matrices."""
    events = lambda: (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))

    def seconds(work: Callable[[], object]) -> float:
        taken = []
        for _ in range(12):
            start, end = events()
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            taken.append(start.elapsed_time(end) / 1000)
        return float(np.median(taken[2:]))

    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copied = seconds(lambda: target.copy_(source))
    multiplied = seconds(lambda: a @ b)
    return {"bytes_per_second": 2 * 4 * 2**30 / copied, "flops_per_second": 2 * 8192**3 / multiplied}


def floor(base: Any, cameras: int, rates: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds below which no implementation gets: the prefix is bound by arithmetic, the expert by reading its
    weights once per step. Attention's own arithmetic is not counted."""
    count = lambda module: sum(p.numel() for p in module.parameters())
    vlm, expert = base.model.model.vlm, base.model.model.dit
    words = lambda module: count(module.embed_tokens) if getattr(module, "embed_tokens", None) is not None else 0
    language = count(vlm.language_model) - words(vlm.language_model)
    tokens = 256 * cameras
    flops = 2 * (count(vlm.vision_tower) * tokens + language * (tokens + 48))
    read = 2 * (count(expert) - words(expert)) * base.spec.sampler_steps
    prefix, steps = 1000 * flops / rates["flops_per_second"], 1000 * read / rates["bytes_per_second"]
    return {"prefix": prefix, "sampler": steps, "decision": prefix + steps}


def launched(base: Any) -> Any:
    """The same π0, its kernels launched from Python."""
    plain = TransformersPi0(base.model, base.processing, uri=base.spec.uri)
    plain._look, plain._sampler = plain._look.function, plain._sampler.function
    return plain


def decisions(base: Any, rounds: int) -> dict[str, np.ndarray]:
    """Seconds of decisions without a head and with one, and of what a decision is made of."""
    torch.manual_seed(0)
    config = HeadConfig.for_base(
        base.spec, NoiseLayout(base.spec.noise, "repeat", 1.5), NetworkConfig(), fingerprint=None
    )
    head, seen = SteeringHead(config).eval(), example(base)
    head.calibrate(head.read(unsqueeze(seen), base.encode(unsqueeze(seen))))  # or nothing would be checked for
    policy, far = SteeredPolicy(base, copy.deepcopy(head)), SteeredPolicy(base, head)
    far.head.cpu()
    by_python = launched(base)
    several = unsqueeze(seen)
    noise = {count: base.spec.noise.sample(generators([0]), count) for count in (1, 8, 16)}
    encoding = base.encode(several)
    sides: dict[str, Callable[[], object]] = {
        "unsteered": lambda: base.act(seen, seed=0),
        "unsteered, unrecorded": lambda: by_python.act(seen, seed=0),
        "the base's noise": lambda: base.spec.noise.sample(generators([0])),
        "the head's noise": lambda: policy.noise(several, encoding, [0]),
        "the head's noise, head on the CPU": lambda: far.noise(several, encoding, [0]),
        "steered": lambda: policy.act(seen),
        "pictures to inputs": lambda: base.processing(several, base.model.device, base.model.dtype),
        "encode": lambda: base.encode(several),
    }
    sides |= {f"denoise, K={k}": lambda w=w: base.denoise(encoding, w) for k, w in noise.items()}
    sides |= {f"decision, K={k}": lambda w=w: base.denoise(base.encode(several), w) for k, w in noise.items()}
    times = on_the_gpu(sides, rounds, 1)
    assert not policy.fallbacks and not far.fallbacks, (policy.last_fallback, far.last_fallback)
    return times


def summary(times: Mapping[str, np.ndarray], least: Mapping[str, float]) -> dict[str, Any]:
    """What the times say: ratios within a round."""
    heads = [side for side in times if side.startswith("the head")]
    share = lambda head, whole: interval(100 * (times[head] - times["the base's noise"]) / times[whole])
    return {
        "ms": {name: interval(1000 * value) for name, value in times.items()},
        "per_cent_of_a_decision": {head: share(head, "unsteered") for head in heads},
        "per_cent_of_an_unrecorded_decision": {head: share(head, "unsteered, unrecorded") for head in heads},
        "steered_over_unsteered": interval(times["steered"] / times["unsteered"]),
        "unrecorded_over_recorded": interval(times["unsteered, unrecorded"] / times["unsteered"]),
        "K=8_over_K=1": interval(times["decision, K=8"] / times["decision, K=1"]),
        "8_separate_decisions_over_K=8": interval(8 * times["decision, K=1"] / times["decision, K=8"]),
        "floor_ms": {name: float(f"{value:.4g}") for name, value in least.items()},
        "over_the_floor": interval(1000 * times["unsteered"] / least["decision"]),
    }


def goals_of(found: Mapping[str, Any], cameras: int) -> list[Goal]:
    """What is wanted of π0 with so many cameras."""
    name = f"π0 of full size, bf16, {cameras} cameras"
    part = found["per_cent_of_an_unrecorded_decision"]["the head's noise"]["median"]
    whole = round(100 * (found["ms"]["steered"]["median"] / found["ms"]["unsteered"]["median"] - 1), 2)
    return [
        Goal(f"{name}: what a head adds to a decision as transformers launches it", part, 2.0, False, " %"),
        Goal(f"{name}: what steering adds to a recorded decision (of the medians)", whole, 2.0, False, " %"),
        Goal(f"{name}: a decision with K = 8 over one with K = 1", found["K=8_over_K=1"]["median"], 1.5, False),
    ]


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    rates = ceilings()
    torch.cuda.empty_cache()
    found, goals = {}, []
    for cameras in args.cameras:
        torch.cuda.reset_peak_memory_stats()
        base = full_pi0(cameras)
        found[cameras] = summary(decisions(base, args.rounds), floor(base, cameras, rates))
        found[cameras]["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        goals += goals_of(found[cameras], cameras)
        del base
        gc.collect()
        torch.cuda.empty_cache()
    ceiling = {name: float(f"{value:.4g}") for name, value in rates.items()}
    gpu = torch.cuda.get_device_name()
    return finish("gpu_pi0", goals, gpu=gpu, rounds=args.rounds, ceilings=ceiling, cameras=found)


if __name__ == "__main__":
    sys.exit(main())
