"""Imperfect demonstrations from MetaWorld's own scripted experts: the mis-calibrated operator.

In a share of the episodes the operator's calibration is off: the expert sees the object a few centimetres
to the side of where it is, and mostly fails. Failures are kept. Cloning such a mix gives a policy with two
modes, one of which works, and that is what a noise-steered policy has to choose between. The data are
synthetic and make no claim to resemble people's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import bad
from ..tasks.base import IMAGE_PREFIX, STATE
from ..tasks.metaworld import CAMERA, MetaWorldTask, make, prompts


@dataclass(frozen=True)
class DemoConfig:
    """How demonstrations are made."""

    tasks: tuple[str, ...] = (
        "drawer-open-v3",
        "pick-place-v3",
        "sweep-into-v3",
        "push-v3",
        "peg-insert-side-v3",
    )
    """MetaWorld task names."""
    episodes: int = 40
    """Episodes per task."""
    offset: float = 0.045
    """How far a mis-calibrated operator sees the object from where it is, in metres along x."""
    offset_share: float = 0.6
    """Share of episodes with a mis-calibrated operator."""
    action_noise: float = 0.2
    """Standard deviation of the operator's hand, in action units."""
    max_episode_steps: int = 120
    """Where an episode is cut off."""
    seed: int = 100_000
    """First episode seed; episode i of a task uses seed + i."""


@dataclass
class Demos:
    """Frames of all episodes, one after the other, with what a clone needs to cut them into chunks."""

    images: np.ndarray  # uint8 (N, H, W, 3)
    states: np.ndarray  # float32 (N, S)
    actions: np.ndarray  # float32 (N, A)
    objects: np.ndarray  # float32 (N, 6): first object's and goal's xyz, what an image should tell
    task: np.ndarray  # int64 (N,)
    last: np.ndarray  # int64 (N,): index of the episode's last frame
    prompts: tuple[str, ...]
    expert_success: dict[str, float]

    def __len__(self) -> int:
        return len(self.states)


def _expert(name: str) -> Any:
    from metaworld.policies import ENV_POLICY_MAP

    expert: Any = ENV_POLICY_MAP[name]
    return expert()


def _episode(env: MetaWorldTask, expert, seed: int, config: DemoConfig) -> tuple[list[tuple], bool]:
    rng = np.random.default_rng(seed)
    shift = config.offset if rng.random() < config.offset_share else 0.0
    env.begin(seed)
    frames, success, after = [], False, 8
    for _ in range(config.max_episode_steps):
        seen = env.raw.copy()
        seen[4] += shift
        action = np.clip(expert.get_action(seen), -1, 1).astype(np.float32)
        action = np.clip(action + config.action_noise * rng.standard_normal(4), -1, 1).astype(np.float32)
        observation = env.observe()
        objects = np.concatenate([env.raw[4:7], env.raw[36:39]]).astype(np.float32)
        frames.append((observation[IMAGE_PREFIX + CAMERA], observation[STATE], action, objects))
        success |= env.advance(action)[1]
        after -= success
        if not after:
            break
    return frames, success


def collect(config: DemoConfig, on_episode: Callable[[str, int], None] = lambda *_: None) -> Demos:
    """Collect `config.episodes` demonstrations of every task.

    Raises:
        DsrlError: an empty task list. UnknownNameError: a task MetaWorld does not have.
    """
    if not config.tasks:
        raise bad("demos.tasks", "at least one MetaWorld task", "none")
    columns: list[tuple] = []
    task_index: list[int] = []
    last: list[int] = []
    success: dict[str, float] = {}
    for index, name in enumerate(config.tasks):
        env, expert, wins = make(name, max_episode_steps=500), _expert(name), 0
        for episode in range(config.episodes):
            frames, won = _episode(env, expert, config.seed + episode, config)
            wins += won
            columns += frames
            task_index += [index] * len(frames)
            last += [len(columns) - 1] * len(frames)
            on_episode(name, episode)
        success[name] = wins / config.episodes
        env.close()
    images, states, actions, objects = (np.stack(column) for column in zip(*columns, strict=True))
    return Demos(
        images=images,
        states=states,
        actions=actions,
        objects=objects,
        task=np.asarray(task_index),
        last=np.asarray(last),
        prompts=tuple(prompts()[name] for name in config.tasks),
        expert_success=success,
    )
