"""What the README shows is run."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import dsrl_vla
import pytest
import torch
from dsrl_vla.cli import COMMANDS
from dsrl_vla.recipes import shipped

README = Path(__file__).parents[1] / "README.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.S)


def test_the_python_api_does_what_it_shows(tmp_path, monkeypatch):
    real = dsrl_vla.load_recipe

    def quick(*arguments):
        recipe = real(*arguments)
        train = replace(recipe.train, env_steps=400, learning_starts=20, validate_every=400, validation_episodes=1)
        task = replace(recipe.task, num_envs=2, max_episode_steps=16)
        return replace(recipe, train=train, task=task, eval=replace(recipe.eval, episodes=2, video_episodes=0))

    monkeypatch.setattr(dsrl_vla, "load_recipe", quick, raising=False)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert torch.equal(names["plain"], names["base"].act(names["observation"], seed=0))
    assert names["chunk"].shape == (8, 4)
    assert torch.equal(dsrl_vla.SteeredPolicy(names["base"], names["head"]).act(names["observation"]), names["chunk"])


@pytest.mark.parametrize(
    "line", [line for b in blocks("bash") for line in b.splitlines() if line.startswith("dsrl-vla")]
)
def test_its_commands_and_recipes_exist(line):
    words = shlex.split(line, comments=True)
    assert words[1] in COMMANDS
    if words[1] in ("train", "preflight"):
        assert words[2] in shipped()


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
