"""The replay store against SB3's DictReplayBuffer and LeRobot's ReplayBuffer: bytes per transition, sampling rate.

    python benchmarks/bench_replay.py [--rounds 15] [--lerobot <python>]

A transition is a 64 x 64 RGB image, a state of 8 and a noise of 32 numbers, in episodes of 15; all stores are full.
LeRobot needs its own environment: `--lerobot` names its interpreter, in which this script measures ours and LeRobot's
together: its buffer as its learner makes it, with `optimize_memory`, that keeps no next observations, and as the class
comes, that does. Writes results/replay.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from common import Goal, finish, interval, side_by_side
from dsrl_vla.replay import Replay

CAPACITY, BATCH, STATE, NOISE, EPISODE = 8000, 256, 8, 32, 15
IMAGE = (64, 64, 3)
WORDS = {
    "SB3": "SB3's",
    "LeRobot's learner": "LeRobot's as its learner makes it",
    "LeRobot": "LeRobot's as the class comes",
}


@dataclass(frozen=True)
class Args:
    """What to measure."""

    rounds: int = 15
    lerobot: str = ""
    """A Python that has lerobot and the packages that dsrl-vla needs."""
    child: bool = False
    """Print the comparison with LeRobot as JSON (what `--lerobot` runs)."""


def tensors(value: Any, seen: set[int] | None = None) -> int:
    """Bytes of all arrays and tensors in nested dictionaries; one that is there twice counts once."""
    seen = set() if seen is None else seen
    if isinstance(value, dict):
        return sum(tensors(part, seen) for part in value.values())
    if not isinstance(value, np.ndarray | torch.Tensor) or id(value) in seen:
        return 0
    seen.add(id(value))
    return value.nbytes


def images(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(0, 256, (count, *IMAGE), np.uint8)


def ours(folder: Path | None = None) -> tuple[int, Callable[[], object]]:
    """Bytes per transition, and a function that samples."""
    rng, replay = np.random.default_rng(0), Replay(CAPACITY, (1, NOISE), folder)
    while len(replay) < CAPACITY or replay.observed < replay.rows:
        inputs = {"image.front": torch.from_numpy(images(rng, EPISODE + 1)), "state": torch.zeros(EPISODE + 1, STATE)}
        numbers = replay.observe(inputs)
        latents = torch.zeros(EPISODE, 1, NOISE)
        replay.add(numbers[:-1], latents, np.zeros(EPISODE), np.ones(EPISODE), numbers[1:])
    return tensors(vars(replay)) // len(replay), lambda: replay.sample(BATCH, rng)


def sb3() -> tuple[int, Callable[[], object]]:
    """As `ours`, of SB3's DictReplayBuffer."""
    import gymnasium as gym
    from stable_baselines3.common.buffers import DictReplayBuffer

    box = lambda shape: gym.spaces.Box(-1, 1, shape, np.float32)
    spaces = gym.spaces.Dict({"image": gym.spaces.Box(0, 255, IMAGE, np.uint8), "state": box((STATE,))})
    buffer, rng = DictReplayBuffer(CAPACITY, spaces, box((NOISE,)), device="cpu"), np.random.default_rng(0)
    for _ in range(CAPACITY):
        seen = {"image": images(rng, 1), "state": np.zeros((1, STATE), np.float32)}
        buffer.add(seen, seen, np.zeros((1, NOISE), np.float32), np.zeros(1), np.zeros(1), [{}])
    return tensors(vars(buffer)) // CAPACITY, lambda: buffer.sample(BATCH)


def lerobot(optimize_memory: bool) -> tuple[int, Callable[[], object]]:
    """As `ours`, of LeRobot's ReplayBuffer: float images; next observations unless it is to save memory."""
    from lerobot.rl.buffer import ReplayBuffer

    rng = np.random.default_rng(0)
    keys = ["observation.image", "observation.state"]
    buffer = ReplayBuffer(CAPACITY, device="cpu", state_keys=keys, storage_device="cpu", use_drq=False,
                          optimize_memory=optimize_memory)  # fmt: skip
    for step in range(CAPACITY):
        image = torch.from_numpy(images(rng, 1)).permute(0, 3, 1, 2).float() / 255
        seen = {keys[0]: image, keys[1]: torch.zeros(1, STATE)}
        done = step % EPISODE == EPISODE - 1
        buffer.add(seen, torch.zeros(1, NOISE), 0.0, seen, done, False)
    return tensors(vars(buffer)) // CAPACITY, lambda: buffer.sample(BATCH)


def compare(other: Callable[[], tuple[int, Callable[[], object]]], rounds: int) -> dict[str, Any]:
    """Ours beside another."""
    (mine, our_sample), (its, its_sample) = ours(), other()
    times = side_by_side({"ours": our_sample, "other": its_sample}, rounds, repeats=20)
    return {
        "bytes": {"ours": mine, "other": its, "ratio": round(mine / its, 4)},
        "samples_per_second": {name: interval(BATCH / value) for name, value in times.items()},
        "rate_ratio": interval(times["other"] / times["ours"]),
    }


def goals(name: str, found: dict[str, Any], size: float, rate: float) -> list[Goal]:
    """Both goals against one other."""
    bytes_, faster = found["bytes"]["ratio"], found["rate_ratio"]["median"]
    return [
        Goal(f"replay: bytes per transition over {WORDS[name]}", bytes_, size, at_least=False),
        Goal(f"replay: sampling rate over {WORDS[name]}", faster, rate),
    ]


def on_disk(rounds: int) -> dict[str, Any]:
    """Sampling from files that the page cache holds, against memory."""
    with tempfile.TemporaryDirectory() as folder:
        samples = {"memory": ours()[1], "disk": ours(Path(folder))[1]}
        times = side_by_side(samples, rounds, repeats=20)
    return {"rate_of_memory": interval(times["memory"] / times["disk"])}


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    if args.child:
        modes = (("LeRobot's learner", True), ("LeRobot", False))
        print(json.dumps({name: compare(partial(lerobot, saving), args.rounds) for name, saving in modes}))
        return 0
    found = {"SB3": compare(sb3, args.rounds)}
    wanted = goals("SB3", found["SB3"], 0.55, 3.0)
    if args.lerobot:
        command = [args.lerobot, __file__, "--child", "--rounds", str(args.rounds)]
        path = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=path).stdout
        for name, other in json.loads(said.splitlines()[-1]).items():
            found[name] = other
            wanted += goals(name, other, 0.15, 8.0)
    return finish("replay", wanted, rounds=args.rounds, against=found, on_disk=on_disk(args.rounds))


if __name__ == "__main__":
    sys.exit(main())
