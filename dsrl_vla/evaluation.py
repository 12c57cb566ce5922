"""Paired, seeded evaluation: base, controls and head on the same episodes, none of them seen in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import seeds as seed_ranges
from .episodes import Episode, run_episodes
from .errors import bad
from .head import SteeringHead
from .measures import YARDSTICKS, Yardstick, shown
from .noise import NoiseLayout
from .pairing import check_pair
from .policy import FrozenPolicy
from .rollout import TaskConfig, VectorTask
from .sources import HeadNoise, LayoutNoise, NoiseSource, PriorNoise, ZeroNoise
from .tasks import TaskInfo

RUN_FACTS = (
    *("recipe", "train_seed", "env_steps", "validation_env_steps", "finalists", "updates", "train_seconds"),
    "warnings",
)
"""What ``eval.json`` says of the run itself, beside what `evaluate` measures."""


@dataclass(frozen=True)
class Measure:
    """How one way of picking noise did, by what counts on its task."""

    episodes: tuple[Episode, ...]

    @property
    def yardstick(self) -> Yardstick:
        """What counts."""
        return YARDSTICKS[self.episodes[0].measure]

    @property
    def scores(self) -> np.ndarray:
        """Of every episode, float64 (N,)."""
        return np.array([self.yardstick.score(e) for e in self.episodes])

    @property
    def success(self) -> float:
        """Share of successful episodes."""
        return float(np.mean([e.success for e in self.episodes]))

    @property
    def mean(self) -> float:
        """Share of successful episodes, or mean return."""
        return float(self.scores.mean())

    def by_task(self) -> dict[str, Measure]:
        """One measure for each task played."""
        found: dict[str, list[Episode]] = {}
        for episode in self.episodes:
            found.setdefault(episode.task, []).append(episode)
        return {uri: Measure(tuple(episodes)) for uri, episodes in found.items()}

    def to_json(self) -> dict[str, Any]:
        """``{"success" or "return", "ci95", "mean_steps"}``."""
        ends = [self.yardstick.kept(end) for end in self.yardstick.interval(self.scores)]
        steps = float(np.mean([e.steps for e in self.episodes]))
        return {self.yardstick.name: self.mean, "ci95": ends, "mean_steps": round(steps, 1)}


def paired_difference(a: Measure, b: Measure) -> dict[str, Any]:
    """Mean of `b` less that of `a` over the same episodes, and its 95 % interval."""
    ends = a.yardstick.gain(a.scores, b.scores)
    return {"mean": float((b.scores - a.scores).mean()), "ci95": [a.yardstick.kept(end) for end in ends]}


def control_sources(base: FrozenPolicy, layout: NoiseLayout) -> dict[str, NoiseSource]:
    """What a gain has to beat: constant zero, the prior cut at the head's bound, the layout at random."""
    return {
        "zero": ZeroNoise(base.spec.noise),
        "clipped": PriorNoise(base.spec.noise, clip=layout.bound),
        "layout": LayoutNoise(layout),
    }


def measure(
    base: FrozenPolicy,
    task: VectorTask,
    source: NoiseSource,
    seeds: Sequence[int],
    **options: Any,
) -> Measure:
    """Run one episode per seed and task; `options` are those of `run_episodes`."""
    return Measure(tuple(run_episodes(base, task, source, seeds, **options)))


def measure_base(
    base: FrozenPolicy,
    task: VectorTask,
    layout: NoiseLayout,
    seeds: Sequence[int],
    controls: bool,
    on_episode: Callable[[Episode], None] = lambda _: None,
) -> dict[str, Measure]:
    """The base under its own noise, and the controls. Independent of any head: reusable across training seeds."""
    sources: dict[str, NoiseSource] = {"base": PriorNoise(base.spec.noise)}
    if controls:
        sources |= control_sources(base, layout)
    return {name: measure(base, task, source, seeds, on_episode=on_episode) for name, source in sources.items()}


def evaluation_episodes(task: TaskConfig, episodes: int, controls: bool, known: int = 0) -> int:
    """Episodes that `evaluate` plays: base, head, stochastic head and controls, but for `known` of these."""
    return (3 + 3 * controls - known) * episodes * len(task.uris)


def check_scenes(infos: Sequence[TaskInfo], episodes: int) -> None:
    """Refuse to measure on more episodes than there are: intervals would take each for several.

    Raises:
        DsrlError: so it is.
    """
    for info in infos:
        if info.scenes and episodes > info.scenes:
            words = f"at most {info.scenes}, for '{info.uri}' has no more initial states and would count them again"
            raise bad("episodes", words, episodes)


def evaluation_seeds(
    task: VectorTask,
    episodes: int,
    first_seed: int = seed_ranges.EVALUATION,
    known: Mapping[str, Measure] | None = None,
) -> list[int]:
    """The seeds of an evaluation's episodes.

    Raises:
        DsrlError: the task has not so many episodes, or `known` measures are of others and cannot be paired.
    """
    check_scenes(task.infos, episodes)
    seeds, uris = seed_ranges.block(first_seed, episodes), task.config.uris
    wanted = [(uri, seed) for uri in uris for seed in seeds]
    for name, found in (known or {}).items():
        if [(episode.task, episode.seed) for episode in found.episodes] != wanted:
            words = f"episodes of the seeds {seeds[0]} to {seeds[-1]} of {', '.join(uris)}, to be paired"
            raise bad(f"known, '{name}'", words, "others")
    return seeds


def evaluate(
    base: FrozenPolicy,
    head: SteeringHead,
    task: VectorTask,
    episodes: int = 100,
    controls: bool = True,
    first_seed: int = seed_ranges.EVALUATION,
    on_episode: Callable[[Episode], None] = lambda _: None,
    known: Mapping[str, Measure] | None = None,
) -> dict[str, Any]:
    """Measure a head against its base; return what ``eval.json`` holds.

    Args:
        known: measures of the base and of controls on these very seeds, from `measure_base`, not to be run again.

    Returns:
        ``{"task", "episodes", "seeds", "base", "steered", "steered_stochastic", "controls", "difference"}``;
        success in [0, 1], or return, ``ci95`` as [low, high]. Of several tasks: all their episodes pooled, and each
        task on its own under ``tasks``.

    Raises:
        DsrlError: `known` is of other episodes, or the task has not so many episodes. MismatchError: the head is for
            another base.
    """
    check_pair(head.config, base)
    seeds = evaluation_seeds(task, episodes, first_seed, known)
    found = dict(known or measure_base(base, task, head.layout, seeds, controls, on_episode))
    head.eval()
    steered = measure(base, task, HeadNoise(head), seeds, on_episode=on_episode)
    stochastic = measure(base, task, HeadNoise(head, deterministic=False), seeds, on_episode=on_episode)
    own = found.pop("base")
    more = {"steered_stochastic": stochastic.to_json()}
    return compared(base, task, seeds, own, steered, found) | more


def compared(
    base: FrozenPolicy,
    task: VectorTask,
    seeds: Sequence[int],
    own: Measure,
    steered: Measure,
    controls: Mapping[str, Measure],
) -> dict[str, Any]:
    """What ``eval.json`` holds of a way to steer: the base and it on the same episodes; and each of several tasks."""
    scenes = {"scenes": task.info.scenes} if task.info.scenes else {}
    return {
        "task": " + ".join(task.config.uris),
        "base_uri": base.spec.uri,
        "episodes": len(steered.episodes),
        "seeds": [seeds[0], seeds[-1]],
        "base": own.to_json(),
        "steered": steered.to_json(),
        "difference": paired_difference(own, steered),
        "controls": {name: m.to_json() for name, m in controls.items()},
        **scenes,
        **_each_task(own, steered, controls),
    }


def _each_task(own: Measure, steered: Measure, controls: Mapping[str, Measure]) -> dict[str, Any]:
    """``{"tasks": {uri: {"base", "steered", "difference", "controls"}}}`` of several tasks; nothing of one."""
    base, head = own.by_task(), steered.by_task()
    if len(base) < 2:
        return {}
    others = {name: m.by_task() for name, m in controls.items()}
    return {
        "tasks": {
            uri: {
                "base": base[uri].to_json(),
                "steered": head[uri].to_json(),
                "difference": paired_difference(base[uri], head[uri]),
                "controls": {name: m[uri].to_json() for name, m in others.items()},
            }
            for uri in base
        }
    }


def summary(result: dict[str, Any]) -> str:
    """The result in a line."""
    base, steered = result["base"], result["steered"]
    first, last = result["seeds"]
    return (
        f"{result['task']}: base {' '.join(shown(base))}, steered {' '.join(shown(steered))} over "
        f"{result['episodes']} held-out episodes (seeds {first} to {last})"
    )
