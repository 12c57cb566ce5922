"""What the README shows is run."""

import os
import re
import shlex
from dataclasses import replace
from pathlib import Path

import dsrl_vla
import pytest
import torch
from dsrl_vla.cli import COMMANDS, main
from dsrl_vla.recipes import shipped

README = Path(__file__).parents[1] / "README.md"


def blocks(language, marked=False):
    """Fenced blocks of a language; `marked` ones follow a line <!-- run: … --> and are run in order, as one story."""
    pattern = rf"(<!-- run: \w+ -->\n)?```{language}\n(.*?)```"
    return [text for mark, text in re.findall(pattern, README.read_text(), re.S) if bool(mark) == marked]


def stories():
    """Marked blocks by story: name -> [(language, text)]."""
    found = {}
    for name, language, text in re.findall(r"<!-- run: (\w+) -->\n```(\w+)\n(.*?)```", README.read_text(), re.S):
        found.setdefault(name, []).append((language, text))
    return found


QUICK = {
    "preflight": "--episodes 4 --best-of 2 --layouts repeat chunk --bounds 1.5 --task.num_envs 4 "
    "--task.max_episode_steps 40",
    "train": "--train.env_steps 400 --train.learning_starts 48 --train.gradient_steps 0.2 --train.validate_every 200 "
    "--train.validation_episodes 4 --eval.episodes 6 --eval.video_episodes 1 --head.network.width 16 "
    "--critic.network.width 16",
    "eval": "--episodes 6",
}
"""What makes a story quick; the words of the README come first and are run as they stand."""


def tell(language, text, names):
    """Run a block: shell lines through the command line's own entry, Python as it is."""
    if language == "python":
        exec(compile(text, "README.md", "exec"), names)
        return
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(os.path.expandvars(line), comments=True)
        if words[:1] == ["export"]:
            os.environ.update({k: os.environ.get(k, v) for k, _, v in (word.partition("=") for word in words[1:])})
        elif words:
            assert words[0] == "dsrl-vla", f"a story holds dsrl-vla and export, not {words[0]}"
            argv = words[1:] + ([] if "--resume" in words else shlex.split(QUICK.get(words[1], "")))
            assert main(argv) == 0, line


def test_its_stories_are_true(fork_folder, tmp_path, monkeypatch):
    """On a light base and task; the README's variables are kept from taking hold by being set already."""
    assert stories()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BASE", f"flow-mlp:{fork_folder}")
    monkeypatch.setenv("TASK", "point:fork")
    for told in stories().values():
        names: dict = {}
        for language, text in told:
            tell(language, text, names)


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
    mine = names["make"]("push", uri="mine:push").chunked(8)  # the task that it shows how to write
    assert mine.reset(seed=0)[0]["observation.state"].shape == (7,) and mine.step(names["chunk"].numpy())[1] == -8
    assert torch.equal(dsrl_vla.SteeredPolicy(names["base"], names["head"]).act(names["observation"]), names["chunk"])


@pytest.mark.parametrize(
    "line", [line for m in (False, True) for b in blocks("bash", m) for line in b.splitlines() if "dsrl-vla " in line]
)
def test_its_commands_and_recipes_exist(line):
    words = shlex.split(line, comments=True)
    assert words[:1] != ["dsrl-vla"] or words[1] in COMMANDS
    if words[:1] == ["dsrl-vla"] and words[1] in ("train", "preflight"):
        assert words[2] in shipped() or words[2].endswith(".yaml")


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
