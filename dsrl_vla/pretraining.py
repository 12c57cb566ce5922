"""``dsrl-vla pretrain``: demonstrations, behaviour cloning, measurement, and a folder in Hub format."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tqdm import tqdm

from . import seeds as seed_ranges
from .bases import load_base
from .entry_points import load
from .errors import at_least, bad
from .evaluation import measure
from .nano.clone import CloneConfig
from .nano.demos import DemoConfig, Demos, collect
from .nano.model import NanoConfig
from .observation import IMAGE_PREFIX, PROMPT, Observations
from .plain import from_plain, read_sections
from .policy import Encoding, FrozenPolicy
from .recipes import shipped
from .rollout import TaskConfig, VectorTask
from .run_dir import make_folder, write_json, write_text
from .sources import PriorNoise

GROUP = "dsrl_vla.architectures"
_CLONED = "cloned.json"
"""There while a base has been cloned and not yet measured: what measuring needs to know."""


@dataclass(frozen=True)
class PretrainRecipe:
    """A nano base, as data."""

    name: str = "nano"
    architecture: str = "pi0"
    """pi0 (transformers) or smolvla (LeRobot); an entry point of the group ``dsrl_vla.architectures``."""
    description: str = ""
    demos: DemoConfig = field(default_factory=DemoConfig)
    clone: CloneConfig = field(default_factory=CloneConfig)
    model: NanoConfig = field(default_factory=NanoConfig)
    episodes: int = 100
    """Episodes per task and condition of the measurement that goes on the card."""
    threads: int = 1

    def __post_init__(self) -> None:
        at_least(1, self, "recipe", "episodes", "threads")


def load_pretrain_recipe(source: str | Path) -> PretrainRecipe:
    """Read a pretraining recipe: a shipped name or a YAML file.

    Raises:
        DsrlError: no such recipe, no YAML, an unknown key, a value of the wrong type or out of range.
    """
    path = shipped().get(str(source), Path(source))
    if not path.is_file():
        raise bad("recipe", "a YAML file or the name of a shipped pretraining recipe", f"'{source}'")
    tree = read_sections(path, f"recipe '{source}'")
    if {"extends", "task", "train"} & set(tree):
        raise bad(f"recipe '{source}'", "one that makes a base", "one to steer by", "Use: dsrl-vla train.")
    return from_plain(PretrainRecipe, tree, "")


def pretrain(recipe: PretrainRecipe, out: Path) -> FrozenPolicy:
    """Clone a nano base and measure it; leave a Hub-format folder at `out`.

    A base that had been cloned when this was broken off is measured.

    Raises:
        DsrlError: `out` already holds a base, an unknown task or architecture, or tasks too wide for the model.
    """
    torch.set_num_threads(recipe.threads)
    text, cloned = yaml.safe_dump(json.loads(json.dumps(asdict(recipe))), sort_keys=False), out / _CLONED
    if cloned.exists() and (out / "pretrain.yaml").read_text() == text:
        known = json.loads(cloned.read_text())
        base = load_base(known["uri"])
    elif (out / "config.json").exists():
        raise bad(str(out), "a new folder", "one that holds a base")
    else:
        make_folder(out)
        base, demos = _clone(recipe, out)
        write_text(out / "pretrain.yaml", text)
        known = {"uri": base.spec.uri, "prompts": demos.prompts, "expert_success": demos.expert_success}
        write_json(cloned, known)
    write_results(out, recipe, base, tuple(known["prompts"]), known["expert_success"])
    cloned.unlink()
    return base


def _clone(recipe: PretrainRecipe, out: Path) -> tuple[FrozenPolicy, Demos]:
    """Demonstrations, and a base cloned from them, written to `out`."""
    with tqdm(
        total=len(recipe.demos.tasks) * recipe.demos.episodes, desc="demonstrations", unit="episode", disable=None
    ) as bar:
        demos = collect(recipe.demos, lambda *_: bar.update())
    check_widths(recipe.model, demos)
    with tqdm(total=recipe.clone.steps, desc="behaviour cloning", unit="step", disable=None) as bar:

        def report(_: int, losses: dict[str, float]) -> None:
            bar.update()
            bar.set_postfix({k: f"{v:.3f}" for k, v in losses.items()}, refresh=False)

        base = load(GROUP, "architecture", recipe.architecture)(demos, recipe.clone, recipe.model, out, report)
    return base, demos


def check_widths(model: NanoConfig, demos: Demos) -> None:
    """Refuse demonstrations that the model has not enough columns for, before it is cloned."""
    at_least(demos.actions.shape[1], model, "model", "max_action_dim")
    at_least(demos.states.shape[1], model, "model", "max_state_dim")


def write_results(
    out: Path, recipe: PretrainRecipe, base: FrozenPolicy, prompts: tuple[str, ...], expert_success: dict[str, float]
) -> None:
    """Measure a base; write ``eval.json`` and the model card."""
    results = measure_nano(base, recipe, prompts)
    results["demonstrations_success"] = expert_success
    write_json(out / "eval.json", results)
    write_text(out / "README.md", model_card(recipe, results, base))


class Swapped(FrozenPolicy):
    """A base that is shown another prompt, or the image of another episode, to see how far each matters."""

    def __init__(self, base: FrozenPolicy, prompt: str | None = None, shuffle_images: bool = False):
        self.base, self.spec, self.prompt, self.shuffle = base, base.spec, prompt, shuffle_images

    def _encode(self, observations: Observations, batch: int) -> Encoding:
        changed = dict(observations)
        if self.prompt is not None:
            changed[PROMPT] = [self.prompt] * batch
        if self.shuffle:
            for name in self.spec.observation.cameras:
                changed[IMAGE_PREFIX + name] = np.roll(observations[IMAGE_PREFIX + name], 1, axis=0)
        return self.base.encode(changed)

    def _denoise(self, encoding: Encoding, noise: torch.Tensor) -> torch.Tensor:
        return self.base.denoise(encoding, noise)

    def state_dict(self) -> Any:
        return self.base.state_dict()


def measure_nano(base: FrozenPolicy, recipe: PretrainRecipe, prompts: tuple[str, ...]) -> dict[str, Any]:
    """Success per task: as it is, with the next task's prompt where that is another, with another episode's image."""
    tasks = recipe.demos.tasks
    seeds = seed_ranges.block(seed_ranges.EVALUATION, recipe.episodes)
    source = PriorNoise(base.spec.noise)
    results: dict[str, Any] = {"episodes": recipe.episodes, "seeds": [seeds[0], seeds[-1]], "tasks": {}}
    variety = 3 if len(set(prompts)) > 1 else 2
    with tqdm(total=variety * len(tasks) * recipe.episodes, desc="measuring", unit="episode", disable=None) as bar:
        for index, uri in enumerate(tasks):
            other = prompts[(index + 1) % len(tasks)]
            variants: dict[str, FrozenPolicy] = {"base": base, "another_image": Swapped(base, shuffle_images=True)}
            if other != prompts[index]:
                variants["another_prompt"] = Swapped(base, prompt=other)
            config = TaskConfig(uri, recipe.demos.max_episode_steps)
            with VectorTask(config, base.spec.executed_steps) as task:
                found = {
                    k: measure(p, task, source, seeds, on_episode=lambda _: bar.update()) for k, p in variants.items()
                }
            results["tasks"][uri] = {k: m.to_json() for k, m in found.items()} | {"other_prompt": other}
    return results


def model_card(recipe: PretrainRecipe, results: dict[str, Any], base: Any) -> str:
    """The card of a nano base: what it is, how it was made, how it was measured."""
    rows = [
        "| task | its own prompt and image | another task's prompt | another episode's image | demonstrations |",
        "|---|---|---|---|---|",
    ]
    for name, found in results["tasks"].items():
        cells = [
            f"{found[k]['success']:.2f} [{found[k]['ci95'][0]:.2f}, {found[k]['ci95'][1]:.2f}]" if k in found else "–"
            for k in ("base", "another_prompt", "another_image")
        ]
        rows.append(f"| {name} | {' | '.join(cells)} | {results['demonstrations_success'][name]:.2f} |")
    template = resources.files("dsrl_vla.data").joinpath("nano_card.md").read_text()
    share = recipe.clone.wait_share if len(results["tasks"]) > 1 else 0.0
    return template.format(
        r=recipe,
        waiting=f"{share:.0%} of the training samples carry another task's prompt, for which the demonstration is to "
        "hold still."
        if share
        else "There is one task, and nothing to tell by its prompt.",
        library=base.spec.adapter,
        kind=type(base.model).__name__,
        episodes=results["episodes"],
        seeds=results["seeds"],
        table="\n".join(rows),
    )
