"""LeRobot, trained and evaluated for real: a miniature SmolVLA in LeRobot's format, steered on drawer-open.

    python benchmarks/steer_lerobot.py [--seeds 0] [--base runs/nano-smolvla]      (Python 3.12)

Makes the base with `dsrl-vla pretrain nano-smolvla` unless it is there, steers it with the shipped recipe, measures
base, controls and head on the same 100 held-out episodes, and writes benchmarks/results/lerobot.json.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from steer_metaworld import OWN, SHARED, learning_curve

ROOT = Path(__file__).parent
RUNS = Path("runs/benchmark")


@dataclass(frozen=True)
class Args:
    """What to run."""

    seeds: tuple[int, ...] = (0,)
    base: Path = Path("runs/nano-smolvla")
    """The base's folder; made when it is not there."""
    out: Path = field(default=ROOT / "results" / "lerobot.json")


def run_seed(base: Path, seed: int) -> dict[str, Any]:
    """Train and evaluate one head, unless that has been done; return the run's figures."""
    from dsrl_vla.recipe import load_recipe
    from dsrl_vla.training import train

    out = RUNS / f"lerobot-drawer-open-{seed}"
    recipe = load_recipe(
        "lerobot-drawer-open",
        {"base": {"uri": f"lerobot:{base}"}, "train": {"seed": seed}, "eval": {"video_episodes": 0}},
    )
    recipe = replace(recipe, name=out.name)
    if not (out / "eval.json").exists():
        train(recipe, out, resume=(out / "recipe.yaml").exists())
    return json.loads((out / "eval.json").read_text()) | learning_curve(out)


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    from dsrl_vla.pretraining import load_pretrain_recipe, pretrain

    import lerobot

    torch.set_num_threads(1)
    RUNS.mkdir(parents=True, exist_ok=True)
    if not (args.base / "config.json").exists():
        pretrain(load_pretrain_recipe("nano-smolvla"), args.base)
    runs = [run_seed(args.base, seed) for seed in args.seeds]
    results: dict[str, Any] = {key: runs[0][key] for key in SHARED}
    results |= {"lerobot": lerobot.__version__, "base": runs[0]["base"]}
    results["runs"] = [{key: run[key] for key in (*OWN, "steps_to_0.9", "validation")} for run in runs]
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    for run in results["runs"]:
        print(f"seed {run['train_seed']}: {results['base']['success']:.2f} -> {run['steered']['success']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
