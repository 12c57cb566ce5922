"""Imperfect demonstrations from the simulators' own scripted experts: the mis-calibrated operator.

In a share of the episodes the operator's calibration is off: the expert sees the object a few centimetres
to the side of where it is, and mostly fails. Failures are kept. Cloning such a mix gives a policy with two
modes, one of which works, and that is what a noise-steered policy has to choose between. The data are
synthetic and make no claim to resemble people's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..errors import at_least, bad
from ..tasks import make_task
from ..tasks.base import IMAGE_PREFIX, STATE, Demonstrable


@dataclass(frozen=True)
class DemoConfig:
    """How demonstrations are made."""

    tasks: tuple[str, ...] = (
        "metaworld:drawer-open-v3",
        "metaworld:pick-place-v3",
        "metaworld:sweep-into-v3",
        "metaworld:push-v3",
        "metaworld:peg-insert-side-v3",
    )
    """Task URIs; tasks with an expert, of one family, with one camera."""
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

    def __post_init__(self) -> None:
        if not self.tasks:
            raise bad("demos.tasks", "at least one task", "none")
        at_least(1, self, "demos", "episodes", "max_episode_steps")
        at_least(0, self, "demos", "action_noise", "seed")
        if not 0 <= self.offset_share <= 1:
            raise bad("demos.offset_share", "from 0 to 1", self.offset_share)


@dataclass
class Demos:
    """Frames of all episodes, one after the other, with what a clone needs to cut them into chunks."""

    images: np.ndarray  # uint8 (N, H, W, 3)
    states: np.ndarray  # float32 (N, S)
    actions: np.ndarray  # float32 (N, A)
    objects: np.ndarray  # float32 (N, 6): first object's and goal's xyz, what an image should tell
    task: np.ndarray  # int64 (N,)
    last: np.ndarray  # int64 (N,): index of the episode's last frame
    camera: str
    prompts: tuple[str, ...]
    expert_success: dict[str, float]

    def __len__(self) -> int:
        return len(self.states)


class Operator:
    """Plays the episode of this seed, which has just begun: an expert whose calibration may be off, with a hand that
    shakes."""

    def __init__(self, env: Demonstrable, seed: int, config: DemoConfig):
        self.rng, self.action_noise = np.random.default_rng(seed), config.action_noise
        self.shift = config.offset if self.rng.random() < config.offset_share else 0.0
        self.expert = env.expert()

    def act(self) -> np.ndarray:
        """The action (A,) in the present state, float32 in [-1, 1]."""
        action = np.clip(self.expert(self.shift), -1, 1).astype(np.float32)
        shake = self.action_noise * self.rng.standard_normal(len(action))
        return np.clip(action + shake, -1, 1).astype(np.float32)


def _episode(env: Demonstrable, seed: int, config: DemoConfig) -> tuple[list[tuple], bool]:
    env.begin(seed)
    operator, camera = Operator(env, seed, config), IMAGE_PREFIX + next(iter(env.info.cameras))
    frames, success, after = [], False, 8
    for _ in range(config.max_episode_steps):
        action, observation = operator.act(), env.observe()
        frames.append((observation[camera], observation[STATE], action, env.whereabouts()))
        success |= env.advance(action)[1]
        after -= success
        if not after:
            break
    return frames, success


def collect(config: DemoConfig, on_episode: Callable[[str, int], None] = lambda *_: None) -> Demos:
    """Collect `config.episodes` demonstrations of every task.

    Raises:
        DsrlError: a task without an expert. UnknownNameError: no such task.
    """
    columns: list[tuple] = []
    task_index: list[int] = []
    last: list[int] = []
    success: dict[str, float] = {}
    prompts, cameras = [], set()
    for index, uri in enumerate(config.tasks):
        env, wins = make_task(uri, max_episode_steps=config.max_episode_steps), 0
        if not isinstance(env, Demonstrable) or len(env.info.cameras) != 1:
            raise bad(f"demos.tasks[{index}]", "a task with an expert and one camera", f"'{uri}'")
        for episode in range(config.episodes):
            frames, won = _episode(env, config.seed + episode, config)
            wins += won
            columns += frames
            task_index += [index] * len(frames)
            last += [len(columns) - 1] * len(frames)
            on_episode(uri, episode)
        success[uri] = wins / config.episodes
        prompts.append(env.info.prompt)
        cameras |= set(env.info.cameras)
        env.close()
    if len(cameras) > 1:
        raise bad("demos.tasks", "tasks seen by the same camera", ", ".join(sorted(cameras)))
    images, states, actions, objects = (np.stack(column) for column in zip(*columns, strict=True))
    return Demos(
        images=images,
        states=states,
        actions=actions,
        objects=objects,
        task=np.asarray(task_index),
        last=np.asarray(last),
        camera=cameras.pop(),
        prompts=tuple(prompts),
        expert_success=success,
    )
