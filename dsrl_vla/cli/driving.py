"""``drive``: a base or a head on a robot, to rehearse (``dry_run: true`` in the robot's file) or to be measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class DriveArgs:
    """Run a base, or a run's best head, on a robot; say how it went, and how well the control rate was kept."""

    robot: tyro.conf.Positional[Path]
    """The robot's YAML file; see dsrl_vla.robots.config."""
    run: str = ""
    """A run's directory, a head's folder or a shipped head: its base and its (best) head."""
    base: str = ""
    """URI of a base, to run it as it is, or with `--head`."""
    head: str | None = None
    """A head: a folder or a Hub repository; by default the run's."""
    dtype: str = ""
    """Of the base; by default its adapter's, or the run's."""
    device: str = ""
    episodes: int = 1
    max_episode_steps: int = 300
    seed: int = 0


def run_drive(argv: list[str]) -> int:
    """Run a base or a head on a robot."""
    args = tyro.cli(DriveArgs, prog="dsrl-vla drive", args=argv)
    from .. import seeds
    from ..episodes import run_episodes
    from ..errors import bad
    from ..rollout import TaskConfig, VectorTask
    from ..sources import NoiseSource, PriorNoise, SteeredNoise
    from ..steered_policy import SteeredPolicy
    from .serving import ServeArgs, load, load_bare

    numbers = seeds.block(args.seed, args.episodes)
    if bool(args.run) == bool(args.base):
        raise bad("drive", "either --run or --base", "both" if args.base else "neither")
    asked = ServeArgs(args.run or args.base, args.head, dtype=args.dtype, device=args.device)
    base, head = load_bare(asked) if args.base else load(asked)
    if args.run and head is None:
        raise bad("drive --run", "a run's directory, a head's folder or a shipped head", f"'{args.run}'")
    policy = SteeredPolicy(base, head) if head else None
    source: NoiseSource = SteeredNoise(policy) if policy else PriorNoise(base.spec.noise)
    config = TaskConfig(f"robot:{args.robot}", args.max_episode_steps, num_envs=1)
    with VectorTask(config, base.spec.executed_steps) as task:
        base.check_task(task.info)
        show = lambda e: print(f"{'success' if e.success else 'no success'}, {e.steps} steps", flush=True)
        done = run_episodes(base, task, source, numbers, on_episode=show)
        report = task.envs.call("report")[0]
    print(f"{sum(e.success for e in done)} of {len(done)} episodes succeeded")
    for kind, count in (policy.fallbacks if policy else {}).items():
        print(f"the base decided alone {count} times: {kind}")
    print(", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in report.items()))
    return 0
