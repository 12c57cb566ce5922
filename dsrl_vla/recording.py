"""Recording a policy's rollouts as offline episodes, every step of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from .episodes import episode_generators
from .errors import bad
from .observation import PROMPT, unsqueeze
from .offline import OfflineEpisode
from .policy import FrozenPolicy
from .rollout import TaskConfig
from .sources import NoiseSource
from .tasks import make_task
from .tasks.base import TaskEnv


def record(
    base: FrozenPolicy,
    config: TaskConfig,
    source: NoiseSource,
    seeds: Sequence[int],
    on_episode: Callable[[OfflineEpisode], None] = lambda _: None,
) -> Iterator[OfflineEpisode]:
    """Play one episode per seed and task and yield it, with an observation for every step.

    Beyond the offline format it has ``noise`` (T, H, D), what the base was given, and ``decision`` (T,), the decision
    that a step belongs to.
    """
    for uri in config.uris:
        with contextlib.closing(make_task(uri, max_episode_steps=config.max_episode_steps)) as env:
            if env.info.live:
                fix = "What a robot does while it is trained on is in the run's journal: dsrl-vla export."
                raise bad("record", "a simulated task", f"'{uri}', where an operator has a say", fix)
            base.check_task(env.info)
            yield from _episodes(base, env, source, seeds, on_episode)


def _episodes(
    base: FrozenPolicy,
    env: TaskEnv,
    source: NoiseSource,
    seeds: Sequence[int],
    on_episode: Callable[[OfflineEpisode], None],
) -> Iterator[OfflineEpisode]:
    for seed in seeds:
        streams = episode_generators([seed])
        observation, _ = env.reset(seed=seed)
        columns: dict[str, list] = {}
        over = terminated = success = False
        decision = 0
        while not over:
            observations = unsqueeze(observation | {PROMPT: env.info.prompt})
            encoding = base.encode(observations)
            noise = source(observations, encoding, streams)
            chunk = base.denoise(encoding, noise)[0, 0, : base.spec.executed_steps]
            for action in chunk.numpy():
                row = {**observation, "action": action, "noise": noise[0, 0].numpy(), "decision": decision}
                observation, reward, terminated, truncated, info = env.step(action)
                success = bool(info["success"])
                for key, value in (row | {"reward": reward, "success": success}).items():
                    columns.setdefault(key, []).append(value)
                over = terminated or truncated
                if over:
                    break
            decision += 1
        episode: OfflineEpisode = {key: np.stack(values) for key, values in columns.items()}
        episode |= {"terminated": terminated, PROMPT: env.info.prompt}
        on_episode(episode)
        yield episode
