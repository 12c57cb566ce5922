"""Recording rollouts as offline episodes, every step of them: a policy's, or an operator's demonstrations."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from .episodes import episode_generators
from .errors import bad
from .nano.demos import DemoConfig, Operator
from .observation import PROMPT, unsqueeze
from .offline import OfflineEpisode
from .policy import FrozenPolicy
from .rollout import TaskConfig
from .sources import NoiseSource
from .tasks import make_task
from .tasks.base import Demonstrable, TaskEnv

Decide = Callable[[dict[str, np.ndarray]], tuple[np.ndarray, dict[str, Any]]]
"""From an observation to the actions (k, A) until the next decision, and what is kept beside each of them."""
Begin = Callable[[TaskEnv, int], Decide]
"""Who plays the episode of this seed, which has just begun."""


def record(
    base: FrozenPolicy,
    config: TaskConfig,
    source: NoiseSource,
    seeds: Sequence[int],
) -> Iterator[OfflineEpisode]:
    """Play one episode per seed and task and yield it, with an observation for every step.

    Beyond the offline format it has ``noise`` (T, H, D), what the base was given, and ``decision`` (T,), the decision
    that a step belongs to.

    Raises:
        DsrlError: the task is a robot's, or does not fit the base.
    """

    def begin(env: TaskEnv, seed: int) -> Decide:
        streams, numbers = episode_generators([seed]), itertools.count()

        def decide(observation: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, Any]]:
            observations = unsqueeze(observation | {PROMPT: env.info.prompt})
            encoding = base.encode(observations)
            noise = source(observations, encoding, streams)
            chunk = base.denoise(encoding, noise)[0, 0, : base.spec.executed_steps]
            return chunk.numpy(), {"noise": noise[0, 0].numpy(), "decision": next(numbers)}

        return decide

    for env in _tasks(config):
        base.check_task(env.info)
        yield from _played(env, begin, seeds)


def demonstrate(config: TaskConfig, operator: DemoConfig, seeds: Sequence[int]) -> Iterator[OfflineEpisode]:
    """Let an operator play one episode per seed and task and yield it; failures are kept.

    Args:
        operator: how well calibrated, and how steady.

    Raises:
        DsrlError: the task is a robot's, or has no scripted expert.
    """

    def begin(env: TaskEnv, seed: int) -> Decide:
        assert isinstance(env, Demonstrable)
        hand = Operator(env, seed, operator)
        return lambda _: (hand.act()[None], {})

    for env in _tasks(config):
        if not isinstance(env, Demonstrable):
            raise bad("record --demonstrator", "a task with a scripted expert", f"'{env.info.uri}'")
        yield from _played(env, begin, seeds)


def _tasks(config: TaskConfig) -> Iterator[TaskEnv]:
    for uri in config.uris:
        with contextlib.closing(make_task(uri, max_episode_steps=config.max_episode_steps)) as env:
            if env.info.live:
                fix = "What a robot does while it is trained on is in the run's journal: dsrl-vla export."
                raise bad("record", "a simulated task", f"'{uri}', where an operator has a say", fix)
            yield env


def _played(env: TaskEnv, begin: Begin, seeds: Sequence[int]) -> Iterator[OfflineEpisode]:
    for seed in seeds:
        observation, _ = env.reset(seed=seed)
        decide, columns = begin(env, seed), {}  # type: ignore[var-annotated]
        over = terminated = success = False
        while not over:
            chunk, beside = decide(observation)
            for action in chunk:
                row = {**observation, "action": action, **beside}
                observation, reward, terminated, truncated, info = env.step(action)
                success = bool(info["success"])
                for key, value in (row | {"reward": reward, "success": success}).items():
                    columns.setdefault(key, []).append(value)
                over = terminated or truncated
                if over:
                    break
        episode: OfflineEpisode = {key: np.stack(values) for key, values in columns.items()}
        episode |= {"terminated": terminated, PROMPT: env.info.prompt}
        yield episode
