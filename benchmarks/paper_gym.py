"""Figure 3 of arXiv 2506.15799, its Gym part: steering a frozen diffusion policy, here and by Stable-Baselines3.

    python benchmarks/paper_gym.py [--tasks hopper …] [--variants ours sb3 sac] [--seeds 0 1 2]

Both sides steer the same base on the same training budget, 200,000 environment steps, with one update per decision on
one thread. `ours` is the shipped recipe gym-<task>; `sac` is that recipe by DSRL-SAC, where it ships with DSRL-NA.
`sb3` is Stable-Baselines3's SAC, unchanged, whose environment is `dsrl_vla.NoiseEnv`, with the settings of the paper's
Hopper run where SAC has them; on the other two tasks the paper's networks are wider, and so are neither side's here.
Every 20,000 steps the deterministic head plays 10 validation episodes; the best by validation plays the held-out
evaluation episodes, the same for all and for base and controls. SB3's environment steps are four a decision, also
where an episode ended within one: at most 0.4 % fewer than are said. Runs that benchmarks/results/paper_gym.json holds
are not repeated; it grows run by run.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from dsrl_vla import seeds as ranges
from dsrl_vla.evaluation import measure
from dsrl_vla.noise_env import NoiseEnv
from dsrl_vla.recipe import Recipe, load_recipe
from dsrl_vla.rollout import VectorTask
from dsrl_vla.run_dir import Metrics
from dsrl_vla.sources import HeadNoise, NoiseSource
from dsrl_vla.tasks import make_task
from kept_runs import base_measures, evaluated, finished, grow, settings, trained

TASKS = ("hopper", "walker2d", "halfcheetah")
RUNS = Path("runs/paper-gym")
SB3 = {
    "policy": "MlpPolicy",
    "learning_rate": 3e-4,
    "buffer_size": 200_000,
    "learning_starts": 1000,
    "batch_size": 256,
    "tau": 0.005,
    "gamma": 0.99,
    "train_freq": 1,
    "gradient_steps": 1,
    "target_entropy": 0.0,
    "policy_kwargs": {"net_arch": [128, 128, 128]},
}
"""The paper's for Hopper (facts of its code: three hidden layers of tanh, gamma per chunk, target entropy 0), one
update per decision. One environment: `NoiseEnv` is one."""
Curve = list[list[float]]
"""[environment steps, seconds, mean return of the validation episodes]; the seconds are wall time, validation before
the point included."""


@dataclass(frozen=True)
class Args:
    """What to run."""

    tasks: tuple[str, ...] = TASKS
    variants: tuple[str, ...] = ("ours", "sb3")
    seeds: tuple[int, ...] = (0, 1, 2)
    env_steps: int = 200_000
    out: Path = field(default=Path(__file__).parent / "results" / "paper_gym.json")


class PolicyNoise(NoiseSource):
    """The deterministic choice of an SB3 policy, as noise."""

    def __init__(self, policy: Any, layout: Any):
        self.policy, self.layout = policy, layout

    def __call__(self, observations, encoding, generators):
        state = torch.as_tensor(observations["observation.state"], dtype=torch.float32)
        seen = torch.cat([state, encoding.feature], 1).numpy()
        latent = torch.as_tensor(self.policy.predict(seen, deterministic=True)[0])
        return self.layout.expand(latent.view(len(latent), 1, *self.layout.latent_shape))


def wanted(task: str, variant: str, args: Args) -> dict[str, Any]:
    """What decides a run's result, apart from its seed."""
    own = settings(recipe_for(task, variant, 0, args))
    if variant != "sb3":
        return own
    kept = {k: own[k] for k in own if k.split(".")[0] in ("base", "task", "noise", "eval")}
    return json.loads(json.dumps(kept | {"env_steps": args.env_steps} | {f"sb3.{k}": v for k, v in SB3.items()}))


def recipe_for(task: str, variant: str, seed: int, args: Args) -> Recipe:
    """The shipped recipe, by DSRL-SAC where the variant says so."""
    algorithm = {"algorithm": "sac"} if variant == "sac" else {}
    return load_recipe(f"gym-{task}", algorithm | {"train": {"seed": seed, "env_steps": args.env_steps}})


def run_ours(recipe: Recipe, out: Path) -> tuple[dict[str, Any], NoiseSource]:
    """Train by the shipped recipe; what is to be told of the run, and its best head's noise."""
    head = trained(recipe, out, evaluate_after=False).head
    rows = Metrics(out / "metrics.jsonl").rows()
    curve = [
        [r["env_steps"], r["seconds"], round(r["validation_return"], 1)] for r in rows if "validation_return" in r
    ]
    return {"curve": curve, "env_steps": rows[-1]["env_steps"], "updates": rows[-1]["updates"]}, HeadNoise(head)


def run_sb3(recipe: Recipe, out: Path) -> tuple[dict[str, Any], NoiseSource]:
    """Train by Stable-Baselines3, on as many environment steps, validated as often."""
    from stable_baselines3 import SAC

    base, config = recipe.base.load(), recipe.train
    layout = recipe.noise.over(base.spec.noise)
    env = NoiseEnv(base, make_task(recipe.task.uri, max_episode_steps=recipe.task.max_episode_steps), layout)
    first = ranges.TRAINING * (1 + config.seed)
    kwargs = SB3 | {"policy_kwargs": SB3["policy_kwargs"] | {"activation_fn": torch.nn.Tanh}}  # type: ignore[operator]
    model = SAC(env=Seeded(env, first), seed=config.seed, device="cpu", **kwargs)  # type: ignore[arg-type]
    curve: Curve = []
    best, at, start = -np.inf, 0, time.perf_counter()
    seeds = ranges.block(ranges.VALIDATION, config.validation_episodes)
    with VectorTask(recipe.task, base.spec.executed_steps) as held_out:
        while at < config.env_steps:
            steps = config.validate_every // base.spec.executed_steps
            model.learn(steps, reset_num_timesteps=not curve)
            at, seconds = at + config.validate_every, time.perf_counter() - start
            found = measure(base, held_out, PolicyNoise(model.policy, layout), seeds).mean
            curve.append([at, round(seconds, 1), round(found, 1)])
            print("sb3", *curve[-1], flush=True)
            if found > best:
                best = found
                weights = {k: v.clone() for k, v in model.policy.state_dict().items()}
    model.policy.load_state_dict(weights)
    return {"curve": curve, "env_steps": at, "updates": model._n_updates}, PolicyNoise(model.policy, layout)


class Seeded(gym.Wrapper):
    """The environment with the seeds of a run's training episodes, one after the other."""

    def __init__(self, env: gym.Env, first: int):
        super().__init__(env)
        self.following = itertools.count(first)

    def reset(self, **_: Any):
        return self.env.reset(seed=next(self.following))


RUN = {"ours": run_ours, "sac": run_ours, "sb3": run_sb3}


def run(task: str, variant: str, seed: int, args: Args) -> tuple[dict[str, Any], dict[str, Any]]:
    """One run and its evaluation; and what the results file holds beside runs."""
    recipe = recipe_for(task, variant, seed, args)
    out = RUNS / f"{task}-{variant}-{seed}"
    known = base_measures(RUNS / f"{task}-base.json", recipe)
    finished(out, recipe)
    clock, resumed = time.process_time(), (out / "recipe.yaml").exists()
    found, source = RUN[variant](recipe, out)
    if not resumed:
        found["cpu_seconds"] = round(time.process_time() - clock, 1)
    facts, steered = evaluated(recipe, source, known)
    shutil.rmtree(out, ignore_errors=True)
    controls = {name: m.to_json() for name, m in known.items() if name != "base"}
    beside = {"episodes": recipe.eval.episodes, "base": known["base"].to_json(), "controls": controls}
    beside["base_sha256"] = recipe.base.load().sha256()
    return facts | {"returns": [round(e.reward, 1) for e in steered.episodes]} | found, beside


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    RUNS.mkdir(parents=True, exist_ok=True)
    jobs = ((t, v, s) for s in args.seeds for t in args.tasks for v in args.variants)
    of = lambda task, variant, _: wanted(task, variant, args)
    grow(args.out, jobs, of, lambda *job: run(*job, args), "gym-{}".format)
    return 0


if __name__ == "__main__":
    sys.exit(main())
