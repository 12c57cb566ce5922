from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from dsrl_vla import load_base, pretraining
from dsrl_vla.cli import main
from dsrl_vla.errors import DsrlError, UnknownNameError
from dsrl_vla.nano.clone import CloneConfig, Sampler, clone
from dsrl_vla.nano.demos import DemoConfig, collect
from dsrl_vla.nano.model import NanoConfig, build_tokenizer

TINY = NanoConfig(vision_width=32, vision_layers=1, vlm_width=32, expert_width=32, layers=2, heads=2, head_dim=16)
DEMOS = DemoConfig(tasks=("metaworld:drawer-open-v3", "metaworld:push-v3"), episodes=2, max_episode_steps=30)


@pytest.fixture(scope="module")
def demos():
    return collect(DEMOS)


def test_demonstrations_are_a_function_of_their_seeds(demos):
    again = collect(DEMOS)
    for name in ("images", "states", "actions", "objects", "task", "last"):
        assert np.array_equal(getattr(demos, name), getattr(again, name)), name
    assert set(demos.task) == {0, 1} and len(demos) == demos.last.max() + 1
    assert np.abs(demos.actions).max() <= 1


def test_half_calibrated_operators_see_the_object_elsewhere():
    right = collect(DemoConfig(tasks=("metaworld:push-v3",), episodes=2, max_episode_steps=20, offset_share=0.0))
    wrong = collect(DemoConfig(tasks=("metaworld:push-v3",), episodes=2, max_episode_steps=20, offset_share=1.0))
    assert np.array_equal(right.images[0], wrong.images[0])
    assert not np.array_equal(right.actions, wrong.actions)


def test_cloning_lowers_the_loss_and_repeats(demos):
    losses, runs = [], []
    for _ in range(2):
        model, _, _ = clone(
            demos, CloneConfig(steps=100, batch=16, draws=2), TINY, lambda _, m: losses.append(m["flow_loss"])
        )
        runs.append(model.state_dict())
    assert np.mean(losses[80:100]) < 0.8 * np.mean(losses[:5])
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])


def test_nobody_is_taught_to_hold_still_at_its_own_prompt(demos):
    same = replace(demos, task=np.arange(len(demos)) % 3, prompts=("open", "push", "open"))
    sampler = Sampler(same, 4, 0.5, np.random.default_rng(0))
    still = told = 0
    for _ in range(40):
        rows = np.random.default_rng()  # the sampler's own next rows, looked at before it draws them
        rows.bit_generator.state = sampler.rng.bit_generator.state
        own = [same.prompts[i] for i in same.task[rows.integers(len(same), size=64)]]
        observations, actions, _ = sampler(64)
        held = (actions[:, :, :-1] == 0).all(2).all(1).numpy()
        other = np.array([a != b for a, b in zip(own, observations["task"], strict=True)])
        assert (held | ~other).all()
        still, told = still + (held & ~other).sum(), told + other.sum()
    assert told > 500 and still < told / 10


def test_the_tokenizer_tells_the_tasks_apart():
    from dsrl_vla.tasks.metaworld import prompts

    tokenizer = build_tokenizer(prompts().values())
    encoded = {tuple(tokenizer(text)["input_ids"]) for text in prompts().values()}
    assert len(encoded) == len(set(prompts().values()))
    assert tokenizer.unk_token_id not in {i for ids in encoded for i in ids}


def test_pretrain_leaves_a_base_that_loads_and_measures_one_that_was_not(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    recipe = {
        "name": "tiny", "demos": {"tasks": ["metaworld:drawer-open-v3"], "episodes": 2, "max_episode_steps": 24},
        "clone": {"steps": 5, "batch": 8, "draws": 2}, "episodes": 2,
        "model": {"vision_width": 32, "vision_layers": 1, "vlm_width": 32, "expert_width": 32, "layers": 2},
    }  # fmt: skip
    path, out = tmp_path / "tiny.yaml", tmp_path / "base"
    path.write_text(yaml.safe_dump(recipe))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretraining, "measure_nano", interrupted)
        pretraining.pretrain(pretraining.load_pretrain_recipe(str(path)), out)
    assert not (out / "eval.json").exists()
    weights = (out / "model.safetensors").read_bytes()
    assert main(["pretrain", str(path), "--out", str(out)]) == 0  # measures what was cloned
    assert (out / "model.safetensors").read_bytes() == weights and not (out / "cloned.json").exists()
    base = load_base(f"nano:{out}")
    assert base.spec.noise.shape == (8, 8) and base.spec.noise.live == (True,) * 4 + (False,) * 4
    card = (out / "README.md").read_text()
    assert "drawer-open-v3" in card and "library_name: transformers" in card
    assert "There is one task" in card and "| – |" in card  # no other task's prompt to show
    assert (out / "eval.json").exists() and (out / "pretrain.yaml").exists()
    assert main(["pretrain", str(path), "--out", str(out)]) == 2  # does not overwrite


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("demos: {tasks: []}", "demos.tasks: expected at least one"),
        ("demos: {episodes: 0}", "demos.episodes: expected 1 or more, got 0"),
        ("demos: {offset_share: 2}", "demos.offset_share: expected from 0 to 1, got 2"),
        ("clone: {batch: 0}", "clone.batch: expected 1 or more, got 0"),
        ("clone: {lr: 0}", "clone.lr: expected above 0, got 0"),
        ("model: {layers: 0}", "model.layers: expected 1 or more, got 0"),
        ("model: {image_size: 65}", "model.image_size: expected a multiple of model.patch_size=16, got 65"),
        ("episodes: 0", "recipe.episodes: expected 1 or more, got 0"),
        ("demos: [", "expected YAML in UTF-8, got while parsing"),
    ],
)
def test_a_bad_pretraining_recipe_is_refused_in_words(tmp_path, capsys, text, words):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert main(["pretrain", str(path), "--out", str(tmp_path / "base")]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "base").exists()


def test_demonstrations_too_wide_for_the_model_are_refused_before_it_is_cloned(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    demos = {"tasks": ["metaworld:drawer-open-v3"], "episodes": 1, "max_episode_steps": 8}
    path.write_text(yaml.safe_dump({"demos": demos, "model": {"max_action_dim": 2}}))
    assert main(["pretrain", str(path), "--out", str(tmp_path / "base")]) == 2
    assert "model.max_action_dim: expected 4 or more, got 2" in capsys.readouterr().err


def test_bad_demonstrations_are_refused():
    with pytest.raises(DsrlError, match="max_episode_steps: expected 1 to 500 steps, got 600"):
        collect(DemoConfig(tasks=("metaworld:push-v3",), max_episode_steps=600))
    with pytest.raises(UnknownNameError, match="Did you mean 'push-v3'"):
        collect(DemoConfig(tasks=("metaworld:psh-v3",), episodes=1))


def test_a_folder_without_a_base_is_refused(tmp_path):
    with pytest.raises(DsrlError, match="expected a folder made by `dsrl-vla pretrain`"):
        load_base(f"nano:{tmp_path}")


def test_the_embedded_base_says_how_it_was_made_and_measured(nano):
    import json
    from importlib import resources

    folder = resources.files("dsrl_vla.nano").joinpath("base")
    results = json.loads(folder.joinpath("eval.json").read_text())
    card = folder.joinpath("README.md").read_text()
    assert len(results["tasks"]) >= 5 and results["episodes"] >= 100
    for name, found in results["tasks"].items():
        assert name in card and f"{found['base']['success']:.2f}" in card
    assert sum(p.numel() for p in nano.model.parameters()) < 2_000_000
