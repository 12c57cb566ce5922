"""Preflight: is this base steerable on this task, in which layout, and how much is there to gain?

Everything is measured in success on seeded episodes: the base under its own noise, constant zero noise, the
prior cut at several bounds, and every layout at random, K times. What at least one of K draws in a layout
solves is a floor under what a head in that layout can reach; a layout in which chance solves nothing (repeated
noise breaks some policies) leaves a head nothing to learn from.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from . import seeds as seed_ranges
from .episodes import Episode
from .errors import bad
from .evaluation import Measure, check_scenes, measure
from .measures import YARDSTICKS, wilson
from .noise import NoiseLayout, NoiseSpace, generators
from .policy import FrozenPolicy
from .probing import probe
from .rollout import VectorTask
from .sources import LayoutNoise, NoiseSource, PriorNoise, ZeroNoise
from .training import example

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreflightConfig:
    """How much to measure."""

    episodes: int = 30
    """Episodes per condition."""
    best_of: int = 4
    """Noise draws per episode behind the best-of-K headroom of the base and of every layout."""
    layouts: tuple[str, ...] = ("repeat", "knots:2", "knots:4", "chunk")
    bounds: tuple[float, ...] = (1.0, 1.5, 2.0)
    columns: Literal["live", "all"] = "live"
    """Noise columns that are steered, as in a recipe."""

    def __post_init__(self) -> None:
        if self.episodes < 1 or self.best_of < 2:
            got = (self.episodes, self.best_of)
            raise bad("preflight.episodes and preflight.best_of", "1 or more, and 2 draws or more to choose from", got)
        if not self.layouts or not self.bounds:
            raise bad("preflight.layouts and preflight.bounds", "at least one of each", "none")
        if min(self.bounds) <= 0:
            raise bad("preflight.bounds", "above 0", min(self.bounds))

    def within(self, space: NoiseSpace) -> PreflightConfig:
        """Without the bounds and layouts that a noise space has no room for: bounds above the edge of a uniform
        prior, more knots than the chunk has steps."""
        knots = lambda name: name.removeprefix("knots:")
        fits = lambda name: not (knots(name).isdigit() and int(knots(name)) > space.horizon)
        bounds = tuple(b for b in self.bounds if b <= space.limit) or (space.limit,)
        return replace(self, bounds=bounds, layouts=tuple(filter(fits, self.layouts)) or ("repeat",))

    def total_episodes(self, base: FrozenPolicy) -> int:
        """Episodes of the whole preflight of one task."""
        config = self.within(base.spec.noise)
        return self.episodes * (len(conditions(base, config)) + (self.best_of - 1) * (1 + len(config.layouts)))

    @property
    def middle(self) -> float:
        """The bound at which layouts are measured."""
        return sorted(self.bounds)[len(self.bounds) // 2]

    def layout(self, space: NoiseSpace, name: str, bound: float = 1.0) -> NoiseLayout:
        """A layout as it is measured."""
        return NoiseLayout(space, name, bound, self.columns)


def conditions(base: FrozenPolicy, config: PreflightConfig) -> dict[str, NoiseSource]:
    """The noise sources that preflight compares, by the name its table shows."""
    space = base.spec.noise
    found: dict[str, NoiseSource] = {"base": PriorNoise(space), "zero": ZeroNoise(space)}
    if space.prior == "normal":
        found |= {f"clipped {b:g}": PriorNoise(space, clip=b) for b in config.bounds}
    for name in config.layouts:
        found[f"layout {name}"] = LayoutNoise(config.layout(space, name, config.middle))
    return found


def preflight(
    base: FrozenPolicy,
    task: VectorTask,
    config: PreflightConfig | None = None,
    on_episode: Callable[[str, Episode], None] = lambda *_: None,
) -> dict[str, Any]:
    """Measure a base on a task; return what ``preflight.json`` holds.

    Raises:
        NotSteerableError: the base fails the probe.
    """
    asked = config or PreflightConfig()
    config = asked.within(base.spec.noise)
    _say_what_is_left_out(asked, config, base)
    for info in task.infos:
        base.check_task(info)
        if info.measure != "success":
            measured = f"{info.uri}, measured by its {info.measure}"
            raise bad("preflight", "a task that can succeed", measured, YARDSTICKS[info.measure].search)
    check_scenes(task.infos, config.episodes)
    observation = example(task)
    report = probe(base, observation)
    seeds = seed_ranges.block(seed_ranges.PREFLIGHT, config.episodes)

    def run(name: str, source: NoiseSource, trial: int = 0) -> Measure:
        return measure(base, task, source, seeds, trial=trial, on_episode=lambda episode: on_episode(name, episode))

    sources = conditions(base, config)
    found = {name: run(name, source) for name, source in sources.items()}
    headroom = {}
    for name in ("base", *(f"layout {name}" for name in config.layouts)):
        more = [run(f"{name}, try {trial + 1}", sources[name], trial) for trial in range(1, config.best_of)]
        headroom[name] = _headroom([found[name], *more])
    advice = recommend(base, found, headroom, config)
    limit = min(info.max_episode_steps for info in task.infos)
    if all(e.steps >= limit and not e.success for m in found.values() for e in m.episodes):
        words = f"No episode ended before task.max_episode_steps {limit}: does the task need more?"
        advice["words"] = f"{words} {advice['words']}"
    return {
        "base": base.spec.uri,
        "task": " + ".join(task.config.uris),
        "episodes": len(found["base"].episodes),
        "seeds": [seeds[0], seeds[-1]],
        "conditions": {name: m.to_json() for name, m in found.items()},
        "best_of": {"k": config.best_of, **headroom},
        "noise_sensitivity": _sensitivity(base, observation),
        "probe": {
            "noise_effect": report.noise_effect,
            "per_column": list(report.per_column),
            "image_effect": report.image_effect,
            "prompt_effect": report.prompt_effect,
        },
        "recommendation": advice,
        **({"scenes": task.info.scenes} if task.info.scenes else {}),
    }


def _say_what_is_left_out(asked: PreflightConfig, config: PreflightConfig, base: FrozenPolicy) -> None:
    """In words, unless they are the defaults, which are for any base."""
    default, space = {f.name: f.default for f in fields(asked)}, base.spec.noise
    why = {
        "bounds": f"'{base.spec.uri}' takes noise up to {space.limit:g}",
        "layouts": f"a chunk of '{base.spec.uri}' has {space.horizon} steps",
    }
    for name, words in why.items():
        wanted, measured = getattr(asked, name), getattr(config, name)
        out = [each for each in wanted if each not in measured]
        if out and wanted != default[name]:
            told = (", ".join(map(str, each)) for each in (out, measured))
            log.warning("%s: %s %s left out; measured: %s", words, name, *told)


def _headroom(tries: Sequence[Measure]) -> dict[str, Any]:
    """Share of episodes that at least one of K noise draws solves: a floor under what choosing noise can give."""
    won = np.asarray([[e.success for e in m.episodes] for m in tries]).max(axis=0)
    low, high = wilson(int(won.sum()), len(won))
    return {"success": float(won.mean()), "ci95": [round(low, 4), round(high, 4)]}


def _sensitivity(base: FrozenPolicy, observation: dict[str, Any], draws: int = 32) -> float:
    """Deviation of the executed actions across noise draws on one observation, in environment units."""
    from .observation import unsqueeze

    noise = base.spec.noise.sample(generators([1]), draws)
    actions = base.denoise(base.encode(unsqueeze(observation)), noise)[0, :, : base.spec.executed_steps]
    return float(actions.std(0).mean())


def typical_bound(dims: int) -> float:
    """The bound at which the box's corners lie on the sphere that holds 95 % of N(0, I) draws in `dims` dimensions.

    A head ends up in the corners. In 4 dimensions they may be at 1.5 deviations a coordinate; in 32 dimensions no
    draw that the base has been trained on is as far out as that. (Wilson and Hilferty's chi-square quantile.)
    """
    spread = 2 / (9 * dims)
    return float((1 - spread + 1.645 * np.sqrt(spread)) ** 1.5)


def recommend(
    base: FrozenPolicy, found: dict[str, Measure], headroom: dict[str, Any], config: PreflightConfig
) -> dict[str, Any]:
    """Layout and bound from measured success, and whether to steer at all, in words.

    The smallest layout in which best-of-K solves about as much as in any (within one standard error of a
    difference) is taken, since fewer dimensions are learnt faster. Of the harmless bounds, the one that keeps
    closest to where the base's own noise lies (`typical_bound`).
    """
    own, n = found["base"].mean, len(found["base"].episodes)
    error = np.sqrt(max(own * (1 - own), 0.25 / n) * 2 / n)
    shapes = {name: config.layout(base.spec.noise, name).latent_shape for name in config.layouts}
    reach = {name: headroom[f"layout {name}"]["success"] for name in config.layouts}
    most = max(reach.values())
    spread = np.sqrt(max(most * (1 - most), 0.25 / n) * 2 / n)
    layout = min((name for name in config.layouts if reach[name] >= most - spread), key=lambda name: shapes[name][0])
    bounds = {b: found[f"clipped {b:g}"].mean for b in config.bounds if f"clipped {b:g}" in found}
    harmless = [b for b, success in bounds.items() if success >= max(bounds.values()) - error]
    vectors, columns = shapes[layout]
    bound = min(harmless, key=lambda b: abs(b - typical_bound(vectors * columns)), default=config.middle)
    words = []
    zero, best = found["zero"].mean, headroom["base"]["success"]
    saturated, hopeless = own >= 0.95, max(best, zero, most) <= own + 0.02
    if saturated:
        words.append(f"The base already succeeds in {own:.0%} of episodes: steering has next to nothing to gain.")
    elif hopeless:
        words.append(
            f"{config.best_of} noise draws solve no more episodes than one does ({own:.0%}), in any layout: steering "
            "has nothing to gain here. The base needs more or other demonstrations."
        )
    elif best > own:
        words.append(f"Choosing among {config.best_of} draws would give at least {best:.0%} (base {own:.0%}).")
    elif most > own:
        words.append(f"Choosing among {config.best_of} draws in a layout would give {most:.0%} (base {own:.0%}).")
    if zero > own + error:
        words.append(f"Constant zero noise already gives {zero:.0%}: a head has to beat that, not the base.")
    if most < own:
        words.append(
            f"In every layout, {config.best_of} draws solve less than the base's own noise does; '{layout}' comes "
            "closest. Expect slow learning."
        )
    return {
        "layout": layout,
        "bound": float(bound),
        "worth_steering": not (saturated or hopeless),
        "words": " ".join(words),
    }
