"""Kill -9 at random points of a run, over and over, and resume it each time.

    python benchmarks/kill_resume.py [--kills 50] [--seed 0]

One run on the light task `point:fork`, in a process of its own that is killed at a random moment after every start,
also while it writes. Measured after each kill: whether the run resumes, how many environment steps were lost against
the interval between checkpoints, and whether a write was cut short. The end is compared with a run that nothing
happened to, tensor by tensor: weights, optimisers, generators, replay. Writes benchmarks/results/kill_resume.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro

CHILD = """
import sys
from pathlib import Path
from dsrl_vla import load_recipe, train
from dsrl_vla.collect import Collector
real, out = Collector.step, Path(sys.argv[2])
def step(self, warm_up):
    print(self.env_steps, flush=True)
    real(self, warm_up)
Collector.step = step
train(load_recipe(sys.argv[1]), out, resume=(out / "recipe.yaml").exists(), evaluate_after=False)
"""


@dataclass(frozen=True)
class Args:
    """What to do."""

    kills: int = 50
    seed: int = 0
    interval: int = 100
    """Environment steps between checkpoints."""
    env_steps: int = 6_000
    longest: float = 4.0
    """Seconds a process lives at most after its first decision; uniform."""
    out: Path = field(default=Path(__file__).parent / "results" / "kill_resume.json")


def prepare(args: Args, folder: Path) -> Path:
    """A base cloned on the spot, and the recipe of the run."""
    import torch
    import yaml
    from dsrl_vla.adapters.flow_mlp import FlowMLP, FlowMLPConfig, clone_flow_mlp
    from dsrl_vla.tasks.point import demonstrate

    torch.set_num_threads(1)
    episodes = [demonstrate(seed) for seed in range(60)]
    FlowMLP(clone_flow_mlp(episodes, FlowMLPConfig(4, 2), steps=300)).save_pretrained(folder / "base")
    network = {"network": {"width": 16, "layers": 1}}
    train = {"env_steps": args.env_steps, "learning_starts": 32, "gradient_steps": 0.5, "validate_every": 2000,
             "validation_episodes": 4, "checkpoint_every": args.interval, "stop_at": None}  # fmt: skip
    tree: dict[str, Any] = {"base": {"uri": f"flow-mlp:{folder / 'base'}"}, "head": network, "critic": network}
    tree |= {"task": {"uri": "point:fork", "max_episode_steps": 40, "num_envs": 4}, "train": train}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def live_and_die(recipe: Path, out: Path, seconds: float) -> tuple[list[int], bool]:
    """Start or resume the run and kill it; the environment steps at every decision begun, and whether it was alive."""
    command = [sys.executable, "-c", CHILD, str(recipe), str(out)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stderr is not None
    steps = [int(first)] if (first := child.stdout.readline()) else []
    if steps:
        time.sleep(seconds)
    alive = child.poll() is None
    child.kill()
    rest, errors = child.communicate()
    if not steps and child.returncode != 0:
        raise SystemExit(f"a resume failed:\n{errors}")
    whole = [line for line in rest.split("\n")[:-1] if line]
    return steps + [int(line) for line in whole], alive


def compare(out: Path, straight: Path) -> list[str]:
    """Names of the tensors and facts in which the two runs' last checkpoints differ."""
    import torch
    from dsrl_vla.run_dir import load_checkpoint

    (mine, state), (theirs, other) = (load_checkpoint(p / "checkpoints") or ({}, {}) for p in (out, straight))
    different = sorted(mine.keys() ^ theirs.keys())
    different += [k for k in mine.keys() & theirs.keys() if not torch.equal(mine[k], theirs[k])]
    return different + [k for k in state.keys() | other.keys() if k != "seconds" and state.get(k) != other.get(k)]


def main(args: Args) -> None:
    """Kill, resume, compare, write."""
    from dsrl_vla import load_recipe, train
    from dsrl_vla.run_dir import load_checkpoint

    rng, kills = np.random.default_rng(args.seed), []
    with tempfile.TemporaryDirectory() as place:
        recipe, out = prepare(args, Path(place)), Path(place) / "killed"
        reached = 0
        for number in range(args.kills):
            steps, alive = live_and_die(recipe, out, float(rng.uniform(0, args.longest)))
            if not steps:
                print(f"the run was over after {number} kills", flush=True)
                break
            torn = len(list((out / "checkpoints").glob(".writing_*"))) if (out / "checkpoints").exists() else 0
            kills.append(
                {
                    "resumed_at": steps[0],
                    "lost": max(0, reached - steps[0]),
                    "killed_at": steps[-1],
                    "write_cut_short": bool(torn),
                    "alive": alive,
                }
            )
            reached = max(reached, steps[-1])
            print(f"kill {number + 1}: {kills[-1]}", flush=True)
        train(load_recipe(recipe), out, resume=True, evaluate_after=False)
        train(load_recipe(recipe), Path(place) / "straight", evaluate_after=False)
        different = compare(out, Path(place) / "straight")
        _, state = load_checkpoint(out / "checkpoints") or ({}, {})
    result = {
        "kills": sum(k["alive"] for k in kills),
        "resumes": len(kills),
        "checkpoint_interval": args.interval,
        "largest_loss": max(k["lost"] for k in kills),
        "writes_cut_short": sum(k["write_cut_short"] for k in kills),
        "env_steps": state["env_steps"],
        "transitions": state["added"],
        "different_from_the_uninterrupted_run": different,
        "each": kills,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print({k: v for k, v in result.items() if k != "each"})


if __name__ == "__main__":
    main(tyro.cli(Args))
