"""``export`` and ``export-policy``: a run's episodes as a LeRobotDataset, its head as a policy of LeRobot's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class ExportArgs:
    """Export a run's episodes as a LeRobotDataset: those its robot has played, or new ones of its head."""

    run: tyro.conf.Positional[Path]
    """A run's directory."""
    out: Path
    """The folder to write; it must not exist yet."""
    source: Literal["auto", "journal", "rollouts"] = "auto"
    """journal: what a robot has played while training. rollouts: play the best head anew. auto: the journal where
    there is one."""
    episodes: int = 50
    """Rollouts to play."""
    fps: int | None = None
    """Steps per second, as the dataset is to say; by default a robot's own, else 20."""
    images: Literal["video", "png"] = "video"
    """Cameras as MP4 (lossy) or as images (lossless)."""


def run_export(argv: list[str]) -> int:
    """Export a run's episodes as a LeRobotDataset."""
    args = tyro.cli(ExportArgs, prog="dsrl-vla export", args=argv)
    from tqdm import tqdm

    from .. import seeds
    from ..errors import bad
    from ..journal import FOLDER, Journal
    from ..lerobot_export import journalled, write_lerobot_dataset
    from ..pairing import check_pair
    from ..recording import record
    from ..sources import HeadNoise
    from ..training import load_run

    journal = Journal(args.run / FOLDER)
    total, fps = len(journal.numbers()), 20
    if args.source == "journal" and not total:
        raise bad(f"{args.run}", "a run on a robot, with a journal", "none", "Export its rollouts.")
    if args.source == "rollouts" or (args.source == "auto" and not total):
        recipe, head = load_run(args.run)
        base, numbers = recipe.base.load(), seeds.block(seeds.RECORDING, args.episodes)
        check_pair(head.config, base)
        episodes, total = record(base, recipe.task, HeadNoise(head), numbers), args.episodes * len(recipe.task.uris)
    else:
        episodes, fps = journalled(journal), round(journal.read(journal.numbers()[0]).fps)
    with tqdm(episodes, total=total, unit="episode", desc="export", disable=None) as bar:
        count = write_lerobot_dataset(args.out, bar, fps=args.fps or fps, videos=args.images == "video")
    print(f"{count} episodes; written: {args.out}")
    return 0


@dataclass(frozen=True)
class ExportPolicyArgs:
    """Write a folder that LeRobot's tools run: lerobot-eval --policy.path=OUT. It refers to the base by its URI."""

    source: tyro.conf.Positional[Path]
    """A run's directory, or a head's folder."""
    out: Path
    """The folder to write; it must not exist yet."""
    base: str = ""
    """URI of the base; by default the run's, or the one that the head names."""


def run_export_policy(argv: list[str]) -> int:
    """Write a run's head as a policy for LeRobot's tools."""
    args = tyro.cli(ExportPolicyArgs, prog="dsrl-vla export-policy", args=argv)
    from ..bases import check_named
    from ..errors import DsrlError
    from ..head import SteeringHead
    from ..head_config import CONFIG
    from ..recipe import BaseConfig, base_beside
    from ..training import load_run

    try:
        from lerobot_policy_dsrl.export import write_policy
    except ImportError as error:
        raise DsrlError(
            f"export-policy needs the package 'lerobot_policy_dsrl' and LeRobot, and could not import them ({error}). "
            "The package is in the repository: pip install ./adapters/lerobot_policy_dsrl"
        ) from error
    if (args.source / "recipe.yaml").exists() and not (args.source / CONFIG).exists():
        recipe, head = load_run(args.source)
        config = recipe.base
    else:
        head = SteeringHead.from_pretrained(args.source)
        beside = base_beside(args.source)
        config = BaseConfig(head.config.base_uri, dtype=beside.dtype, options=beside.options)
        if not args.base:
            check_named(config.uri, f"{args.source / CONFIG}", f"--base '{config.uri}'")
    if args.base:
        same = args.base.partition(":")[0] == config.uri.partition(":")[0]
        config = replace(config, uri=args.base, options=config.options if same else {})
    write_policy(args.out, head, config.load(), config.dtype, config.options)
    print(f"written: {args.out}; run it with: lerobot-eval --policy.path={args.out} --env.type=…")
    return 0
