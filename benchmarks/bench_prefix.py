"""K noises behind one prefix pass against K separate calls, and how often a decision runs the prefix.

    python benchmarks/bench_prefix.py [--rounds 9]

Bases: the embedded nano base, and the native PI0 class with every width of π0 divided by 16 (its layers, image and
prompt tokens, horizon and sampler steps kept). Weights are random in the second. Writes results/prefix.json.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tyro
from common import Goal, finish, interval, side_by_side
from dsrl_vla.adapters.pi0_processing import Pi0Processing, Pi0Statistics
from dsrl_vla.adapters.transformers_pi0 import TransformersPi0
from dsrl_vla.bases import load_base
from dsrl_vla.collect import Collector
from dsrl_vla.head import HeadConfig, SteeringHead
from dsrl_vla.learners import build_learner
from dsrl_vla.nano.model import build_tokenizer
from dsrl_vla.noise import generators
from dsrl_vla.observation import batch
from dsrl_vla.policy import FrozenPolicy
from dsrl_vla.recipe import load_recipe
from dsrl_vla.replay import Replay
from dsrl_vla.rollout import VectorTask

GOALS = {8: 3.0, 16: 4.5}


@dataclass(frozen=True)
class Args:
    """What to measure."""

    rounds: int = 9
    small: bool = False
    """Leave out the base of π0's proportions."""


def proportioned(divisor: int = 16) -> FrozenPolicy:
    """π0 with its widths divided; three cameras of 256 tokens, a prompt of 48, 50 steps, 10 sampler steps."""
    from transformers import PI0Config, PI0ForConditionalGeneration

    tokenizer = build_tokenizer(["pick up the cup and put it on the shelf"])
    full = PI0Config()
    narrow = lambda config, **more: {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size // divisor,
        "intermediate_size": config.intermediate_size // divisor,
        "num_hidden_layers": config.num_hidden_layers,
        **more,
    }
    gemma = {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256 // divisor}
    gemma |= {"vocab_size": len(tokenizer), "pad_token_id": 0}
    vision = narrow(full.vlm_config.vision_config, num_attention_heads=8, image_size=224, patch_size=14)
    text = narrow(full.vlm_config.text_config, **gemma)
    vlm = {
        "model_type": "paligemma",
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "projection_dim": text["hidden_size"],
        "text_config": text,
        "vision_config": vision | {"vision_use_head": False},
    }
    torch.manual_seed(0)
    model = PI0ForConditionalGeneration(PI0Config(vlm_config=vlm, dit_config=narrow(full.dit_config, **gemma)))
    statistics = Pi0Statistics(
        cameras=("a", "b", "c"), image_size=224, image_seq_length=256, state_mean=(0.0,) * 8, state_std=(1.0,) * 8,
        actions_mean=(0.0,) * 7, actions_std=(1.0,) * 7,
    )  # fmt: skip
    processing = Pi0Processing(statistics, tokenizer, model.config.max_state_dim)
    return TransformersPi0(model, processing, uri=f"transformers:pi0/{divisor}")


def observe(base: FrozenPolicy) -> dict[str, Any]:
    """A random observation that fits."""
    rng, spec = np.random.default_rng(0), base.spec.observation
    size = 224 if len(spec.cameras) == 3 else 64
    images = {f"observation.images.{name}": rng.integers(0, 256, (size, size, 3), np.uint8) for name in spec.cameras}
    state = rng.normal(size=spec.state_dim).astype(np.float32)
    return batch([images | {"observation.state": state, "task": "pick up the cup"}])


def shared_and_separate(base: FrozenPolicy, count: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """K noises in one decision; K decisions of one noise each."""
    seen, noise = observe(base), base.spec.noise.sample(generators([0]), count)
    together = lambda: base.denoise(base.encode(seen), noise)
    apart = lambda: [base.denoise(base.encode(seen), noise[:, i : i + 1]) for i in range(count)]
    assert torch.allclose(together(), torch.cat(apart(), 1), atol=1e-4)
    return together, apart


def measure(base: FrozenPolicy, rounds: int) -> tuple[dict[str, Any], list[Goal]]:
    """Both counts on one base."""
    found, goals = {}, []
    for count, goal in GOALS.items():
        together, apart = shared_and_separate(base, count)
        times = side_by_side({"shared": together, "separate": apart}, rounds)
        ratio = interval(times["separate"] / times["shared"])
        seconds = {name: interval(value) for name, value in times.items()}
        found[f"K={count}"] = {"seconds": seconds, "ratio": ratio}
        goals.append(Goal(f"{base.spec.uri}, K = {count}: separate over shared", ratio["median"], goal))
    return found, goals


def passes_per_decision(algorithm: str, decisions: int = 12) -> float:
    """Vision-language passes of real collection on the nano base, per decision; final observations not counted."""
    recipe, base = load_recipe("drawer-open", {"task": {"num_envs": 2}}), load_base("nano:")
    layout = recipe.noise.over(base.spec.noise)
    head = SteeringHead(HeadConfig.for_base(base.spec, layout, recipe.head.network))
    learner = build_learner(algorithm, base, head, recipe.critic, recipe.sac, recipe.na, (0.0, 1.0), 0)  # type: ignore[arg-type]
    replay, calls = Replay(500, layout.latent_shape), []
    hook = base.model.model.vlm.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[attr-defined]
    with VectorTask(recipe.task, base.spec.executed_steps) as task:
        keeper = learner.keeper()
        collector = Collector(base, head, task, replay, sac=recipe.sac, first_seed=0, keeper=keeper)
        for step in range(decisions):
            collector.step(warm_up=step < decisions // 2)
    learner.fit_normaliser(replay)
    for made in replay.batches(3, 32, np.random.default_rng(0)):
        learner.update(made)
    hook.remove()
    return len(calls) / decisions


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    bases = [load_base("nano:")] + ([] if args.small else [proportioned()])
    found, goals = {}, []
    for base in bases:
        found[base.spec.uri], more = measure(base, args.rounds)
        goals += more
    passes = {name: passes_per_decision(name) for name in ("sac", "na")}
    for name, value in passes.items():
        goals.append(Goal(f"prefix passes per decision, {name}", value, 1.0, at_least=False, unit=""))
    return finish("prefix", goals, rounds=args.rounds, shared_prefix=found, prefix_passes_per_decision=passes)


if __name__ == "__main__":
    sys.exit(main())
