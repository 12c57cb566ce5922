"""A DSRL run over the wire beside the same run in process: the same head, the same prefix passes, at what speed.

The base is served by ``dsrl-vla serve`` in a process of its own; learner and simulator are here. First both runs are
made whole, one after the other, from the same seed, and everything they leave is compared bit for bit. Then rounds of
decisions with their updates alternate between the two, so that whatever else the machine does hits both, and give the
steps per second. Prefix passes are counted at the server. Writes benchmarks/results/remote.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro


@dataclass(frozen=True)
class Args:
    """What to run."""

    recipe: str = "demo"
    base: str = "nano:"
    env_steps: int = 2_000
    episodes: int = 10
    """Of validation and of the held-out evaluation."""
    rounds: int = 11
    decisions: int = 5
    """Of all environments together, per round."""
    out: Path = field(default=Path(__file__).parent / "results" / "remote.json")


@contextlib.contextmanager
def serving(base: str) -> Iterator[str]:
    """``dsrl-vla serve`` on a free port; yields its URI."""
    command = [sys.executable, "-m", "dsrl_vla.cli", "serve", base, "--port", "0", "--threads", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        process.wait(30)


def recipe_for(args: Args, uri: str) -> Any:
    """The recipe at this size, over a base."""
    from dsrl_vla.recipe import load_recipe

    train = {
        "env_steps": args.env_steps,
        "learning_starts": 100,
        "validate_every": args.env_steps // 2,
        "validation_episodes": args.episodes,
        "stop_at": None,
        "checkpoint_every": args.env_steps,
    }
    evaluation = {"episodes": args.episodes, "controls": False, "video_episodes": 1}
    tree = {"base": {"uri": uri}, "train": train, "eval": evaluation}
    return load_recipe(args.recipe, tree)


def count_encodes(base: Any) -> list[int]:
    """Counts the calls of a base's `encode` from now on, in a list of one."""
    calls, encode = [0], base.encode

    def counted(observations: Any) -> Any:
        calls[0] += 1
        return encode(observations)

    base.encode = counted
    return calls


def whole_run(args: Args, base: Any, out: Path) -> dict[str, Any]:
    """Train and evaluate; what the run left, without what names the base or the time."""
    from dsrl_vla.training import train

    recipe = recipe_for(args, args.base)
    result = train(recipe, out, base=base)
    assert result.evaluation is not None
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("seconds")
    ignored = ("base_uri", "train_seconds")
    evaluation = {key: value for key, value in result.evaluation.items() if key not in ignored}
    head = {name: tensor.clone() for name, tensor in result.head.state_dict().items()}
    return {"head": head, "metrics": rows, "evaluation": evaluation, "seconds": result.evaluation["train_seconds"]}


def same_run(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """What of two runs is equal bit for bit."""
    heads = a["head"].keys() == b["head"].keys() and all(torch.equal(a["head"][k], b["head"][k]) for k in a["head"])
    return {
        "head": heads,
        "metrics": a["metrics"] == b["metrics"],
        "evaluation": a["evaluation"] == b["evaluation"],
        "greatest_difference_in_head": max(float((a["head"][k] - b["head"][k]).abs().max()) for k in a["head"]),
    }


def alternate(args: Args, bases: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Steps per second with updates, in alternating rounds; and prefix passes at the server for its share."""
    from dsrl_vla.rollout import VectorTask
    from dsrl_vla.trainer import Trainer

    found: dict[str, list[float]] = {name: [] for name in bases}
    with contextlib.ExitStack() as stack:
        trainers = {}
        for name, base in bases.items():
            recipe = recipe_for(args, args.base)
            task = stack.enter_context(VectorTask(recipe.task, base.spec.executed_steps))
            trainers[name] = Trainer(recipe, base, task, task, folder / name)
            while trainers[name].collector.decisions <= recipe.train.learning_starts:
                trainers[name]._decide()
        counts = {"prefix_passes": 0, "decisions": 0, "calls_of_encode": 0}
        for number in range(args.rounds + 1):  # the first one warms up
            for name, trainer in trainers.items():
                before = bases["remote"].served()["prefix_passes"]
                encodes = bases[name].calls[0]
                start, steps = time.perf_counter(), trainer.collector.env_steps
                for _ in range(args.decisions):
                    trainer._decide()
                rate = (trainer.collector.env_steps - steps) / (time.perf_counter() - start)
                if number:
                    found[name].append(rate)
                if name == "remote":
                    counts["prefix_passes"] += bases["remote"].served()["prefix_passes"] - before
                    counts["calls_of_encode"] += bases[name].calls[0] - encodes
                    counts["decisions"] += args.decisions
    ratio = np.array(found["remote"]) / np.array(found["in_process"])
    rates = {name: round(float(np.median(values)), 1) for name, values in found.items()}
    quartiles = [round(float(q), 3) for q in np.quantile(ratio, (0.25, 0.75))]
    speed = {"steps_per_second": rates, "ratio": round(float(np.median(ratio)), 3), "ratio_quartiles": quartiles}
    # An episode that times out has its last observation encoded too, to bootstrap from: a pass without a decision.
    counts["passes_for_last_observations"] = counts["calls_of_encode"] - counts["decisions"]
    return speed | {"at_the_server": counts}


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    from dsrl_vla import load_base

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, serving(args.base) as uri:
        bases = {"in_process": load_base(args.base), "remote": load_base(f"remote:{uri}")}
        for base in bases.values():
            base.calls = count_encodes(base)
        runs, passes = {}, {}
        for name, base in bases.items():
            before = bases["remote"].served().get("prefix_passes", 0)
            runs[name] = whole_run(args, base, Path(folder) / name)
            passes[name] = base.calls[0]
            if name == "remote":
                passes["counted_at_the_server"] = bases["remote"].served()["prefix_passes"] - before
        speed = alternate(args, bases, Path(folder))
    result = {
        "recipe": args.recipe,
        "base": args.base,
        "env_steps": args.env_steps,
        "torch": torch.__version__,
        "threads": 1,
        "equal": same_run(runs["in_process"], runs["remote"]),
        "success": {name: run["evaluation"]["steered"]["success"] for name, run in runs.items()},
        "train_seconds": {name: run["seconds"] for name, run in runs.items()},
        "prefix_passes_of_the_whole_run": passes,
        "rounds": args.rounds,
        "decisions_per_round": args.decisions,
        **speed,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
