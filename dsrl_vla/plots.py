"""Pictures of a run: the curve, and base and steered side by side on the same episode."""

from __future__ import annotations

import contextlib
import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np

from . import seeds as seed_ranges
from .episodes import episode_generators
from .errors import missing_extra
from .head import SteeringHead
from .measures import YARDSTICKS, value, yardstick
from .policy import FrozenPolicy
from .recipe import Recipe
from .rollout import TaskConfig
from .run_dir import disk_errors
from .sources import HeadNoise, NoiseSource, PriorNoise
from .tasks import TaskEnv, make_task

log = logging.getLogger(__name__)
_STEERED, _BASE = "#0b6e99", "#b5651d"


def draw_curves(path: Path, rows: list[dict[str, Any]], result: dict[str, Any] | None) -> None:
    """Draw success (or return) against environment steps, with the base's and the final evaluation, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(1.6, 1))
    train = [(r["env_steps"], r["success"]) for r in rows if "success" in r]
    validated = next((name for name in YARDSTICKS if any(f"validation_{name}" in r for r in rows)), "success")
    what = yardstick(result["base"]).name if result else validated
    held = [(r["env_steps"], r[f"validation_{what}"]) for r in rows if f"validation_{what}" in r]
    if train:
        left.plot(*zip(*train, strict=True), color=_STEERED, alpha=0.35, label="training, last 50 episodes")
    if held:
        left.plot(*zip(*held, strict=True), "o-", color=_STEERED, label="validation, deterministic head")
    if result:
        base = result["base"]
        left.axhline(value(base), color=_BASE, ls="--", label="base")
        left.axhspan(*base["ci95"], color=_BASE, alpha=0.12)
        left.set_title(result["task"], fontsize=10)
        _bars(right, result)
    left.set(xlabel="environment steps", ylabel=what)
    if what == "success":
        left.set(ylim=(-0.03, 1.03))
    left.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(axis: Any, result: dict[str, Any]) -> None:
    named = {"base": result["base"]} | {f"{k} noise": v for k, v in result["controls"].items()}
    named |= {"steered": result["steered"], "steered,\nstochastic": result["steered_stochastic"]}
    heights = np.array([value(m) for m in named.values()])
    low, high = np.array([m["ci95"] for m in named.values()]).T
    colours = [_STEERED if name.startswith("steered") else _BASE for name in named]
    errors = np.clip([heights - low, high - heights], 0, None)
    axis.barh(list(named), heights, xerr=errors, color=colours, alpha=0.85, capsize=3)
    axis.invert_yaxis()
    what = yardstick(result["base"]).name
    axis.set(xlabel=f"{what}, {result['episodes']} held-out episodes")
    if what == "success":
        axis.set(xlim=(0, 1.03))
    axis.tick_params(labelsize=8)


def film(
    base: FrozenPolicy, uri: str, max_episode_steps: int, source: NoiseSource, seed: int, size: int = 256
) -> tuple[np.ndarray, bool | None]:
    """Play one episode and film it: uint8 (T, size, size, 3), and whether it succeeded."""
    with contextlib.closing(make_task(uri, max_episode_steps=max_episode_steps)) as env:
        return _film(base, env, source, seed, size)


def _film(
    base: FrozenPolicy, env: TaskEnv, source: NoiseSource, seed: int, size: int
) -> tuple[np.ndarray, bool | None]:
    limit = env.info.max_episode_steps
    streams = episode_generators([seed])
    observation, _ = env.reset(seed=seed)
    frames, steps, over, success = [env.frame(size)], 0, False, False
    while not over:
        observations = {k: v[None] for k, v in observation.items()} | {"task": [env.info.prompt]}
        encoding = base.encode(observations)
        chunk = base.denoise(encoding, source(observations, encoding, streams))[0, 0, : base.spec.executed_steps]
        for row in chunk.numpy():
            _, success, terminated = env.advance(row)
            steps += 1
            frames.append(env.frame(size))
            over = terminated or env.cut_short or steps >= limit
            if over:
                break
        observation = env.observe()
    return np.stack(frames), bool(success) if env.info.measure == "success" else None


def write_video(path: Path, base: FrozenPolicy, head: SteeringHead, config: TaskConfig, seeds: list[int]) -> None:
    """Write an MP4 of base (left) and steered (right) on the same episodes, one after the other, every task."""
    try:
        import imageio.v3 as iio
    except ImportError as error:
        raise missing_extra("imageio", "demo", "writing videos") from error
    reel = []
    for uri, seed in itertools.product(config.uris, seeds):
        sources = (PriorNoise(base.spec.noise), HeadNoise(head))
        pair = [film(base, uri, config.max_episode_steps, source, seed) for source in sources]
        length = max(len(frames) for frames, _ in pair) + 10
        sides = [_finish(f, won, length, name) for (f, won), name in zip(pair, ("base", "steered"), strict=True)]
        reel.append(np.concatenate(sides, 2))
    iio.imwrite(path, np.concatenate(reel), fps=30, codec="libx264", plugin="pyav")


def _finish(frames: np.ndarray, success: bool | None, length: int, name: str) -> np.ndarray:
    """Hold the last frame to `length`, framed in green where the episode succeeded, in red where not, in grey where
    there is no success (None)."""
    from PIL import Image, ImageDraw

    held = np.concatenate([frames, np.repeat(frames[-1:], length - len(frames), 0)])
    colour, edge = np.array({True: [40, 160, 60], False: [190, 50, 40], None: [120, 120, 120]}[success]), 6
    border = held[len(frames) - 1 :]
    border[:, :edge] = border[:, -edge:] = border[:, :, :edge] = border[:, :, -edge:] = colour
    label = Image.new("RGB", (64, 16), "black")
    ImageDraw.Draw(label).text((4, 2), name, fill="white")
    held[:, 8:24, 8:72] = np.asarray(label)
    return held


def draw_run(
    out: Path,
    recipe: Recipe,
    base: FrozenPolicy,
    head: SteeringHead,
    rows: list[dict[str, Any]],
    result: dict[str, Any],
    live: bool = False,
) -> None:
    """The pictures: ``curves.png`` and ``rollouts.mp4``. A failure here loses nothing that was measured.

    A `live` task is not filmed: its robot is not to move again when all has been measured.
    """
    with disk_errors(out):
        draw_curves(out / "curves.png", rows, result)
        if recipe.eval.video_episodes and not live:
            films = seed_ranges.block(result["seeds"][0], recipe.eval.video_episodes)
            try:
                write_video(out / "rollouts.mp4", base, head, recipe.task, films)
            except Exception as error:
                log.warning("rollouts.mp4 was not written: %s", error)
