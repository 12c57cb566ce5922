"""On one GPU: our learner against Stable-Baselines3's, and what steering adds to a full-size π0 in bfloat16.

    python benchmarks/bench_gpu.py [--rounds 15] [--parts learner pi0]

Wall-clock time, each side waiting for the GPU at the end of its turn. An update of ours is one recorded CUDA graph;
`unrecorded` is the same launched from Python, `compiled` the graph of networks that torch.compile has fused. π0 is the
native `PI0ForConditionalGeneration` at its real size with random weights: its speed does not depend on them. Writes
results/gpu.json.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import tyro
from bench_learner import AHEAD, SIZES, Size, equal_mlp, ours, theirs
from common import Goal, finish, interval, side_by_side
from dsrl_vla.latent_sac import LatentSAC
from dsrl_vla.networks import NetworkConfig
from dsrl_vla.recipe import load_recipe

PROMPT = "pick up the black bowl and place it on the plate"
Found = tuple[dict[str, Any], list[Goal]]


@dataclass(frozen=True)
class Args:
    """What to measure."""

    rounds: int = 15
    parts: tuple[str, ...] = ("learner", "pi0", "compiled")
    cameras: tuple[int, ...] = (2, 3)
    """Of π0, each in turn."""


def on_the_gpu(functions: Mapping[str, Callable[[], object]], rounds: int, repeats: int) -> dict[str, np.ndarray]:
    """Seconds of wall-clock time per call of each, the GPU's work included."""

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return side_by_side(functions, rounds, repeats, clock)


def syncs_per_update(update: Callable[[], object]) -> float:
    """How often a call of AHEAD updates makes Python wait for the GPU, as torch itself reports it, per update."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        update()
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(each.message) for each in told) / AHEAD


def unrecorded(learner: LatentSAC) -> None:
    learner._work = learner._learn


def compiled(learner: LatentSAC) -> None:
    for module in (learner.head, learner.critic, learner.target):
        module.network.compile()  # type: ignore[operator, union-attr]


def against_sb3(rounds: int) -> Found:
    """Both sizes of ensemble, with LayerNorms on both sides and without."""
    found: dict[str, Any] = {}
    goals = []
    for name, size in SIZES.items():
        mlp = NetworkConfig("mlp", width=size.width, layers=size.hidden - 1)
        launched, by_python = ours(size, mlp, device="cuda")
        unrecorded(launched)
        sides = {
            "ours, plain": ours(size, replace(mlp, norm=False), device="cuda")[1],
            "sb3, plain": theirs(size, False, "cuda"),
            "ours, normed": ours(size, mlp, device="cuda")[1],
            "sb3, normed": theirs(size, True, "cuda"),
            "ours, normed, unrecorded": by_python,
        }
        times = on_the_gpu(sides, rounds, 5)
        ratios = {kind: interval(times[f"sb3, {kind}"] / times[f"ours, {kind}"]) for kind in ("plain", "normed")}
        waits = {side: syncs_per_update(update) for side, update in sides.items()}
        rates = {side: interval(AHEAD / value) for side, value in times.items()}
        found[name] = {"size": vars(size), "updates_per_second": rates, "ratio": ratios, "syncs_per_update": waits}
        words = {"plain": "the same network", "normed": "the same network with LayerNorms"}
        for kind in ratios:
            goals.append(Goal(f"GPU: updates/s over SB3's SAC, {words[kind]}, {name}", ratios[kind]["median"], 4.0))
            goals.append(
                Goal(f"GPU: host syncs per update, {words[kind]}, {name}", waits[f"ours, {kind}"], 0, False, "")
            )
    return found, goals


def shipped(rounds: int, with_compiled: bool) -> dict[str, Any]:
    """The shipped recipes' transformer, an MLP of as many weights, and both on one thread of this machine's CPU."""
    recipe = load_recipe("drawer-open")
    size, feature = Size(21, 4, 0, 0, recipe.critic.members, recipe.sac.batch), 96
    networks = {"transformer": recipe.head.network, "mlp": equal_mlp(size, feature, recipe.head.network)}
    sides = {}
    for name, network in networks.items():
        sides[f"{name}, gpu"] = ours(size, network, feature, "cuda")[1]
        sides[f"{name}, cpu"] = ours(size, network, feature)[1]
        if with_compiled:
            learner, sides[f"{name}, gpu, compiled"] = ours(size, network, feature, "cuda")
            compiled(learner)
    times = on_the_gpu(sides, rounds, 2)
    return {"ms_per_update": {name: interval(1000 * value / AHEAD) for name, value in times.items()}}


def full_pi0(cameras: int) -> Any:
    """π0 at its real size, bfloat16, random weights made on the GPU."""
    from dsrl_vla.adapters.pi0_processing import Pi0Processing, Pi0Statistics
    from dsrl_vla.adapters.transformers_pi0 import TransformersPi0
    from dsrl_vla.nano.model import build_tokenizer
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


def example(base: Any) -> dict[str, Any]:
    """A random observation."""
    rng, spec = np.random.default_rng(0), base.spec.observation
    images = {f"observation.images.{c}": rng.integers(0, 256, (224, 224, 3), dtype=np.uint8) for c in spec.cameras}
    return images | {"observation.state": rng.normal(size=spec.state_dim).astype(np.float32), "task": PROMPT}


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
    return {"prefix_ms": prefix, "sampler_ms": steps, "decision_ms": prefix + steps}


def decisions(base: Any, rounds: int) -> dict[str, np.ndarray]:
    """Seconds of decisions without a head and with one, and of what a decision is made of."""
    import copy

    from dsrl_vla import SteeredPolicy
    from dsrl_vla.head import HeadConfig, SteeringHead
    from dsrl_vla.noise import NoiseLayout, generators
    from dsrl_vla.observation import unsqueeze

    torch.manual_seed(0)
    config = HeadConfig.for_base(
        base.spec, NoiseLayout(base.spec.noise, "repeat", 1.5), NetworkConfig(), fingerprint=None
    )
    head, seen = SteeringHead(config).eval(), example(base)
    near, far = SteeredPolicy(base, copy.deepcopy(head).cuda()), SteeredPolicy(base, head)
    several = unsqueeze(seen)
    noise = {count: base.spec.noise.sample(generators([0]), count) for count in (1, 8, 16)}
    encoding = base.encode(several)
    sides: dict[str, Callable[[], object]] = {
        "unsteered": lambda: base.act(seen, seed=0),
        "steered": lambda: far.act(seen),
        "steered, head on the GPU": lambda: near.act(seen),
        "encode": lambda: base.encode(several),
    }
    sides |= {f"denoise, K={k}": lambda w=w: base.denoise(encoding, w) for k, w in noise.items()}
    sides |= {f"decision, K={k}": lambda w=w: base.denoise(base.encode(several), w) for k, w in noise.items()}
    times = on_the_gpu(sides, rounds, 1)
    assert not far.fallbacks and not near.fallbacks, (far.last_fallback, near.last_fallback)
    return times


def pi0(rounds: int, views: tuple[int, ...]) -> Found:
    """π0 with each number of cameras."""
    rates = ceilings()
    torch.cuda.empty_cache()
    found: dict[str, Any] = {"ceilings": {name: float(f"{value:.4g}") for name, value in rates.items()}}
    goals = []
    for cameras in views:
        torch.cuda.reset_peak_memory_stats()
        base = full_pi0(cameras)
        times = decisions(base, rounds)
        least = floor(base, cameras, rates)
        added = interval(100 * (times["steered"] / times["unsteered"] - 1))
        eight = interval(times["decision, K=8"] / times["decision, K=1"])
        separate = interval(8 * times["decision, K=1"] / times["decision, K=8"])
        found[f"{cameras} cameras"] = {
            "ms": {name: interval(1000 * value) for name, value in times.items()},
            "steering_adds_per_cent": added,
            "with_the_head_on_the_gpu_per_cent": interval(
                100 * (times["steered, head on the GPU"] / times["unsteered"] - 1)
            ),
            "K=8_over_K=1": eight,
            "8_separate_decisions_over_K=8": separate,
            "floor": {name: float(f"{value:.4g}") for name, value in least.items()},
            "over_the_floor": interval(1000 * times["unsteered"] / least["decision_ms"]),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        }
        name = f"π0, bf16, {cameras} cameras"
        goals.append(Goal(f"{name}: what steering adds to a decision", added["median"], 2.0, False, " %"))
        goals.append(Goal(f"{name}: a decision with K = 8 over one with K = 1", eight["median"], 1.5, False))
        del base
        torch.cuda.empty_cache()
    return found, goals


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name()}
    goals: list[Goal] = []
    if "learner" in args.parts:
        found["against_sb3"], more = against_sb3(args.rounds)
        goals += more
        print(found["against_sb3"], flush=True)
    if "pi0" in args.parts:
        found["pi0"], more = pi0(args.rounds, args.cameras)
        goals += more
        print(found["pi0"], flush=True)
    found["shipped"] = shipped(args.rounds, "compiled" in args.parts)
    print(found["shipped"], flush=True)
    return finish("gpu", goals, rounds=args.rounds, **found)


if __name__ == "__main__":
    sys.exit(main())
