"""An unmodified `lerobot-eval` on a steered policy's folder: base and steered success on the same held-out episodes.

    dsrl-vla train demo --out runs/demo                      # or lerobot-drawer-open, whose base is LeRobot's SmolVLA
    python benchmarks/lerobot_eval.py runs/demo              (Python 3.12, with lerobot_policy_dsrl installed)

Exports the run's head, runs LeRobot's command on it as installed, once as it is and once with --policy.steer=false,
on the seeds of our own evaluation, and writes what both say.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from dsrl_vla import seeds
from dsrl_vla.measures import wilson
from dsrl_vla.run_dir import write_json

ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Args:
    """What to run."""

    source: tyro.conf.Positional[Path]
    """A run's directory, or a head's folder."""
    base: str = ""
    """URI of the base, where a head does not name it."""
    task: str = "metaworld:drawer-open-v3"
    max_episode_steps: int = 120
    episodes: int = 100
    batch: int = 10
    out: Path = field(default=ROOT / "results" / "lerobot_eval.json")


def lerobot_eval(args: Args, policy: Path, steer: bool, out: Path) -> dict[str, Any]:
    """Run LeRobot's command; return success, its interval, and the command."""
    command = [
        str(Path(sys.executable).parent / "lerobot-eval"),
        f"--policy.path={policy}",
        f"--policy.steer={str(steer).lower()}",
        "--env.type=dsrl",
        f"--env.uri={args.task}",
        f"--env.episode_length={args.max_episode_steps}",
        f"--eval.n_episodes={args.episodes}",
        f"--eval.batch_size={args.batch}",
        "--eval.use_async_envs=false",
        f"--seed={seeds.EVALUATION}",
        f"--output_dir={out}",
    ]
    environment = {"MUJOCO_GL": "egl", "OMP_NUM_THREADS": "1"} | dict(os.environ)
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    found = json.loads((out / "eval_info.json").read_text())
    won = [bool(success) for task in found["per_task"] for success in task["metrics"]["successes"]]
    low, high = wilson(sum(won), len(won))
    return {"success": sum(won) / len(won), "ci95": [round(low, 4), round(high, 4)], "episodes": len(won)}


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    import lerobot
    from dsrl_vla.cli import main as dsrl_vla

    with tempfile.TemporaryDirectory() as folder:
        policy = Path(folder) / "steered"
        base = ["--base", args.base] if args.base else []
        if status := dsrl_vla(["export-policy", str(args.source), "--out", str(policy), *base]):
            return status
        config = json.loads((policy / "config.json").read_text())
        results: dict[str, Any] = {
            "command": "lerobot-eval --policy.path=DIR --env.type=dsrl --env.uri=" + args.task,
            "lerobot": lerobot.__version__,
            "base_uri": config["base"],
            "seeds": [seeds.EVALUATION, seeds.EVALUATION + args.episodes - 1],
            "policy_bytes": sum(path.stat().st_size for path in policy.iterdir()),
        }
        for name, steer in (("base", False), ("steered", True)):
            results[name] = lerobot_eval(args, policy, steer, Path(folder) / name)
    own = args.source / "eval.json"
    if own.exists():
        said = json.loads(own.read_text())
        results["our_own_evaluation"] = {name: said[name]["success"] for name in ("base", "steered") if name in said}
    write_json(args.out, results)
    print(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
