"""A recipe: everything a run needs, as data. YAML in, validated frozen dataclasses out.

A recipe may say ``extends: <name>`` and then only what differs. Unknown keys are refused with the nearest
name; every value is checked when the dataclass that holds it is built, and choices between words when the recipe is.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from .bases import load_base
from .critic import CriticConfig
from .errors import at_least, bad, unknown
from .latent_sac import SACConfig
from .learners import Algorithm
from .networks import NetworkConfig
from .noise import NoiseLayout, NoiseSpace
from .noise_aliasing import NAConfig
from .offline import OfflineConfig
from .plain import check_choices, from_plain, read_sections
from .policy import FrozenPolicy
from .recipes import shipped
from .rollout import TaskConfig
from .workers.config import RolloutConfig

AUTO = "auto"


@dataclass(frozen=True)
class BaseConfig:
    """Which frozen policy."""

    uri: str = "nano:"
    """``<adapter>:<source>``; see ``dsrl-vla adapters``."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    options: dict[str, Any] = field(default_factory=dict)
    """What else the adapter's `load` takes: for lerobot:, say, ``cameras: {<of the task>: <of the policy>}``."""

    def __post_init__(self) -> None:
        for name in ("dtype", "device", "uri", "source"):
            if name in self.options:
                raise bad("base.options", f"no '{name}', which the other fields of base say", self.options)
        if "api_key" in self.options:
            raise bad("base.options", "no secrets, for a recipe is written down and shared", "an api_key",
                      "Set DSRL_VLA_API_KEY.")  # fmt: skip

    def load(self, **instead: Any) -> FrozenPolicy:
        """Load it, some options replaced; raises what `dsrl_vla.load_base` raises."""
        return load_base(self.uri, **{"dtype": self.dtype, "device": self.device} | self.options | instead)


@dataclass(frozen=True)
class NoiseConfig:
    """How the head's latent becomes noise."""

    layout: str = "repeat"
    """repeat, chunk or knots:<n>; or auto: preflight measures them first and its recommendation is taken, layout
    and bound."""
    bound: float = 1.5
    """Greatest absolute noise a head may pick."""
    columns: Literal["live", "all"] = "live"
    """Steer the columns of real actions, the padding fixed at zero; or all of them."""

    def over(self, space: NoiseSpace) -> NoiseLayout:
        """This layout over a base's noise space; raises what `NoiseLayout` raises."""
        if self.layout == AUTO:
            raise bad("noise.layout", "a layout by name here", "auto", "`dsrl-vla preflight` recommends one.")
        return NoiseLayout(space, self.layout, self.bound, self.columns)


@dataclass(frozen=True)
class HeadSection:
    """The steering head."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    cameras: tuple[str, ...] = ()
    """Cameras the head looks at itself, beside the base's feature."""
    image_size: int = 32

    def __post_init__(self) -> None:
        at_least(15, self, "head", "image_size")  # what its convolutions leave something of


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    env_steps: int = 15_000
    """Environment steps of collection; validation episodes are counted apart. 0: offline data alone."""
    learning_starts: int = 300
    """Decisions of random noise in the layout before the first update: not the base's own noise, see preflight."""
    warm_start: Literal["none", "ticket"] = "none"
    """ticket: search the best constant noise first (its steps count), and let the head start there. It is validated as
    soon as it learns, so that the best head is no worse."""
    gradient_steps: float = 3.0
    """Updates per decision."""
    replay_capacity: int = 50_000
    replay_on_disk: bool = False
    """Keep what was observed in files of the run's directory: for images beyond what memory holds."""
    validate_every: int = 2_500
    """Environment steps between validations, which choose the best head."""
    validation_episodes: int = 20
    finalists: int = 1
    """The best heads by validation that play as many fresh episodes in the end, before the best of them is kept."""
    stop_at: float | None = None
    """Stop before `env_steps` once two validations in a row reach this success."""
    checkpoint_every: int = 5_000
    """Environment steps between checkpoints."""
    max_faults: int = 20
    """The run stops at the so-many-th loss, reward, observation or action that is not finite; others are skipped."""
    seed: int = 0
    device: str = "cpu"
    """Where head and critics learn: cpu, cuda or cuda:<n>, of which base.device is independent."""
    threads: int = 1
    """Torch threads; small networks are fastest, and repeatable, on one."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"

    def __post_init__(self) -> None:
        counts = ("learning_starts", "replay_capacity", "validate_every", "validation_episodes", "finalists")
        at_least(1, self, "train", *counts, "checkpoint_every", "max_faults", "threads")
        if self.stop_at is not None and not 0 < self.stop_at <= 1:
            raise bad("train.stop_at", "above 0 and at most 1", self.stop_at)
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise bad("train.device", "cpu, cuda or cuda:<n>", f"'{self.device}'")
        if not 0 < self.gradient_steps < math.inf:
            raise bad("train.gradient_steps", "above 0, and finite", self.gradient_steps)
        at_least(0, self, "train", "env_steps", "seed")


@dataclass(frozen=True)
class EvalConfig:
    """The paired evaluation that ends a run."""

    episodes: int = 100
    controls: bool = True
    """Also measure zero, clipped and random-in-layout noise on the same seeds."""
    baselines: tuple[Literal["ticket", "best-of-k"], ...] = ()
    """Noise search to compare with: the best constant noise, and (na, na-exact) the best of 8 draws by Q^A."""
    video_episodes: int = 2

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise bad("eval.episodes", "1 or more", self.episodes)
        if self.video_episodes < 0:
            raise bad("eval.video_episodes", "0 or more", self.video_episodes)


@dataclass(frozen=True)
class Recipe:
    """A whole run."""

    name: str = "unnamed"
    description: str = ""
    base: BaseConfig = field(default_factory=BaseConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    head: HeadSection = field(default_factory=HeadSection)
    critic: CriticConfig = field(default_factory=CriticConfig)
    algorithm: Algorithm = "sac"
    """sac, na (noise bank) or na-exact (denoises in the update; small bases only)."""
    sac: SACConfig = field(default_factory=SACConfig)
    na: NAConfig = field(default_factory=NAConfig)
    offline: OfflineConfig = field(default_factory=OfflineConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        check_choices(self)
        if "best-of-k" in self.eval.baselines and self.algorithm == "sac":
            raise bad("eval.baselines best-of-k", "algorithm na or na-exact, which have a Q^A", "sac")
        if self.train.env_steps == 0 and not (self.offline.source and self.offline.updates):
            raise bad("train.env_steps", "1 or more, or offline.source and offline.updates", 0)
        if self.algorithm == "na-exact" and self.train.device != "cpu":
            raise bad("train.device", "cpu for na-exact, whose time goes into its base", self.train.device)
        if self.algorithm == "na-exact" and self.rollout.backend != "inline":
            raise bad("algorithm", "sac or na with workers: the prefixes are too much to send", "na-exact")
        if self.rollout.backend == "ray" and self.base.device.startswith("cuda") and not self.rollout.gpus:
            fix = "0.25 lets four workers share one."
            raise bad("rollout.gpus", f"above 0 for a base on '{self.base.device}', or Ray gives it none", 0, fix)
        if self.offline.updates and not self.offline.source:
            raise bad("offline.updates", "offline.source to go with it", f"{self.offline.updates} and no source")
        if self.offline.source and self.algorithm == "sac" and not self.sac.imitate:
            raise bad("offline.source", "algorithm na or na-exact, which learn from actions, or sac.imitate", "sac")
        held = 2 * (self.sac.n_step + 1) * self.task.num_envs * self.rollout.workers
        if self.train.replay_capacity < held:
            least = f"{held} or more, for returns over sac.n_step = {self.sac.n_step} decisions in every environment"
            raise bad("train.replay_capacity", least, self.train.replay_capacity)
        if not self.offline.updates and self.train.env_steps <= self.train.learning_starts:
            least = (
                f"more than the {self.train.learning_starts} decisions of train.learning_starts, each a step or more"
            )
            raise bad("train.env_steps", least, self.train.env_steps)

    @property
    def warm_up(self) -> tuple[int, str]:
        """After how many decisions there is an update, at the latest, and which fields say so."""
        starts, returns = self.train.learning_starts, self.sac.n_step * self.task.num_envs * self.rollout.workers
        if self.offline.source or starts >= returns:
            return starts, "train.learning_starts"
        workers = " of rollout.workers" if self.rollout.workers > 1 else ""
        return returns, f"the first returns over sac.n_step in task.num_envs environments{workers}"

    def to_yaml(self) -> str:
        """The resolved recipe, every field written out."""
        return yaml.safe_dump(_plain(dataclasses.asdict(self)), sort_keys=False)


def load_recipe(source: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Load a shipped recipe by name, or a YAML file.

    Args:
        overrides: nested, applied last: ``{"sac": {"gamma": 0.999}}``.

    Raises:
        UnknownNameError: no such recipe or key; names the nearest. DsrlError: a value of the wrong type or
            out of range.
    """
    tree = _read(source)
    tree = _merge(tree, dict(overrides or {}))
    tree.setdefault("name", Path(str(source)).stem)
    if {"demos", "clone"} & set(tree):
        raise bad(f"recipe '{source}'", "one to steer by", "one that makes a base", "Use: dsrl-vla pretrain.")
    return from_plain(Recipe, tree, "")


def base_beside(folder: Path) -> BaseConfig:
    """What the resolved recipe in a head's folder says of the base; the defaults where there is none.

    The rest of it, which another version may have written, is not looked at.

    Raises:
        DsrlError: it is not YAML, or says of the base what cannot be.
    """
    path = folder / "recipe.yaml"
    return from_plain(BaseConfig, _read(path).get("base", {}), "base") if path.is_file() else BaseConfig()


def task_beside(folder: Path) -> TaskConfig:
    """What it says of the task, as `base_beside`; raises what that does."""
    return from_plain(TaskConfig, _read(folder / "recipe.yaml").get("task", {}), "task")


def differing(one: Recipe, other: Recipe) -> list[str]:
    """Names of the fields in which two recipes differ, as options have them."""
    before = flat(dataclasses.asdict(other))
    now = flat(dataclasses.asdict(one))
    names = [name for name in before | now if name not in ("name", "description")]
    return [name for name in names if now.get(name) != before.get(name)]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A recipe's tree as ``{"section.field": value}``."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return found


def _read(source: str | Path, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        known = shipped()
        if str(source) not in known:
            raise unknown("recipe", str(source), known)
        path = known[str(source)]
    if not path.is_file():
        raise bad("recipe", "an existing YAML file or the name of a shipped recipe", f"'{source}'")
    if str(path) in seen:
        raise bad(f"{path.name}: extends", "recipes that do not extend each other in a circle", " -> ".join(seen))
    tree = read_sections(path, f"recipe '{source}'")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    local = path.parent / str(parent)
    return _merge(_read(local if local.is_file() else parent, (*seen, str(path))), tree)


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        both = both and (key != "options" or bool(value))  # of another base: {} clears them
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _plain(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    return [_plain(item) for item in tree] if isinstance(tree, (list, tuple)) else tree
