"""The demo's time to a validation success of 0.95, before and after: two commits, by turns.

    python benchmarks/bench_demo.py [--before 39250cc] [--seeds 0 1 2 3 4]

Each run is a fresh interpreter that trains the recipe `demo`, from start-up to the first validation of 0.95 or more,
and to the end of training, without the evaluation after it. CPU seconds, user and system, all threads; wall-clock
seconds beside them. When a run gets there depends on its training seed more than on anything else: a round is a seed,
and the figure is all seeds' time after over all seeds' time before. One that never gets there counts to its end.
Writes results/demo_time.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from common import Goal, finish

ROOT = Path(__file__).parents[1]
CHILD = """
import collections, json, sys, time
wall = time.monotonic()
from dsrl_vla import policy, trainer, training
from dsrl_vla.recipe import load_recipe
from dsrl_vla.tasks import metaworld, rendering

try:
    from dsrl_vla.updates import Updates
    updating = Updates, "until"
except ImportError:  # before
    updating = trainer.Trainer, "_update_to"

times, spent = {}, collections.Counter()
now = lambda: {"cpu": time.process_time(), "wall": time.monotonic() - wall}

def account(owner, name, part):
    original = getattr(owner, name)
    def timed(self, *args, **more):
        start, before = time.process_time(), sum(spent.values())
        found = original(self, *args, **more)
        # what parts inside this one took is theirs
        spent[part] += time.process_time() - start - (sum(spent.values()) - before)
        return found
    setattr(owner, name, timed)

for owner, name, part in (
    (*updating, "updates"), (rendering.FastRenderer, "__call__", "rendering"),
    (metaworld.MetaWorldTask, "advance", "simulation"), (metaworld.MetaWorldTask, "begin", "simulation"),
    (metaworld.MetaWorldTask, "__init__", "making environments"), (policy.FrozenPolicy, "encode", "base, prefix"),
    (policy.FrozenPolicy, "denoise", "base, sampler"), (trainer.Trainer, "validate", "rest of validation"),
):
    account(owner, name, part)

report = trainer.Trainer.report
def watched(self, more):
    row = report(self, more)
    if row.get("validation_success", 0) >= 0.95 and "reached" not in times:
        times["reached"] = now() | {"env_steps": row["env_steps"], "updates": row["updates"]}
    return row

trainer.Trainer.report = watched
times["imported"] = now()
training.train(load_recipe("demo", {"train": {"seed": int(sys.argv[2])}}), sys.argv[1], evaluate_after=False)
total = now()
times.setdefault("reached", total | {"env_steps": None})
spent["imports, base and the rest"] = total["cpu"] - sum(spent.values())
print(json.dumps(times | {"ended": total, "spent": spent}))
"""


@dataclass(frozen=True)
class Args:
    """What to compare."""

    before: str = "39250cc"
    """A commit."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Training seeds."""


def run(checkout: Path, seed: int) -> dict[str, Any]:
    """One training run with the package of `checkout`."""
    with tempfile.TemporaryDirectory() as out:
        environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", CHILD, out + "/run", str(seed)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment, cwd=out, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    runs: dict[str, list[dict[str, Any]]] = {"before": [], "after": []}
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", args.before], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
        subprocess.run(["tar", "x", "-C", folder], input=archive, check=True)
        for part in ("adapters", "recipes"):  # which an installation maps into the package
            (Path(folder) / "dsrl_vla" / part).symlink_to(f"../{part}")
        for seed in args.seeds:
            for name, checkout in (("before", Path(folder)), ("after", ROOT)):
                runs[name].append(run(checkout, seed))
                print(name, seed, runs[name][-1], flush=True)
    read = lambda name, event, clock: np.array([r[event][clock] for r in runs[name]])
    found = {
        f"{event}, {clock} s": {name: [round(float(s), 1) for s in read(name, event, clock)] for name in runs}
        | {"ratio": round(float(read("after", event, clock).sum() / read("before", event, clock).sum()), 4)}
        for event in ("reached", "ended")
        for clock in ("cpu", "wall")
    }
    mean = lambda own, part: round(float(np.mean([r["spent"].get(part, 0.0) for r in own])), 1)
    spent = {name: {part: mean(own, part) for part in own[0]["spent"]} for name, own in runs.items()}
    steps = {name: [r["reached"]["env_steps"] for r in own] for name, own in runs.items()}
    goal = Goal("the demo's time to 0.95, of what it was", found["reached, cpu s"]["ratio"], 0.5, at_least=False)
    return finish(
        "demo_time",
        [goal],
        rounds=len(args.seeds),
        seeds=list(args.seeds),
        before=args.before,
        env_steps=steps,
        times=found,
        cpu_seconds_by_part=spent,
    )


if __name__ == "__main__":
    sys.exit(main())
