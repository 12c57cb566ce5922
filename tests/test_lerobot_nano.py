"""The miniature SmolVLA: cloned by `dsrl-vla pretrain`, and a LeRobot policy directory like any other."""

import importlib.util
from pathlib import Path

import pytest
import torch
import yaml
from dsrl_vla import load_base, probe
from dsrl_vla.cli import main
from dsrl_vla.errors import UnknownNameError
from dsrl_vla.pretraining import load_pretrain_recipe, pretrain

pytest.importorskip("lerobot.policies")
if not importlib.util.find_spec("metaworld"):  # an import would choose a renderer too early
    pytest.skip("needs MetaWorld", allow_module_level=True)

RECIPE = {
    "name": "tiny",
    "architecture": "smolvla",
    "demos": {"tasks": ["metaworld:drawer-open-v3"], "episodes": 2, "max_episode_steps": 16},
    "clone": {"steps": 40, "batch": 8},
    "episodes": 1,
    "model": {"vision_width": 32, "vision_layers": 1, "vlm_width": 32, "expert_width": 32, "head_dim": 8, "layers": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("nano")
    (made / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    assert main(["pretrain", str(made / "recipe.yaml"), "--out", str(made / "base")]) == 0
    return made / "base"


def test_pretrain_leaves_a_base_with_its_card(folder):
    base = load_base(f"lerobot:{folder}")
    assert base.spec.noise.shape == (8, 8) and base.spec.noise.live == (True,) * 4 + (False,) * 4
    assert list(base.spec.observation.cameras) == ["behindGripper"] and base.spec.feature_dim == 32
    card = (folder / "README.md").read_text()
    assert "SmolVLAPolicy" in card and "library_name: lerobot" in card and "drawer-open-v3" in card


def test_lerobot_itself_loads_it_offline_and_acts_alike(folder, observation, monkeypatch, tmp_path):
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    monkeypatch.chdir(tmp_path)
    policy = SmolVLAPolicy.from_pretrained(folder)
    before, after = make_pre_post_processors(policy.config, str(folder))
    base = load_base(f"lerobot:{folder}")
    seen, noise = observation(base), torch.randn(1, 8, 8)
    image = torch.from_numpy(seen["observation.images.behindGripper"]).permute(2, 0, 1).float() / 255
    batch = before(
        {
            "observation.images.behindGripper": image,
            "observation.state": torch.from_numpy(seen["observation.state"]),
            "task": seen["task"],
        }
    )
    own = after(policy.predict_action_chunk(batch, noise=noise))[0]
    ours = base.denoise(base.encode({k: [v] for k, v in seen.items()}), noise[None])[0, 0]
    assert torch.equal(own, ours)


def test_the_one_in_the_repository_loads_from_anywhere(observation, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    base = load_base(f"lerobot:{Path(__file__).parents[1] / 'benchmarks' / 'assets' / 'nano-smolvla'}")
    report = probe(base, observation(base))
    assert report.deterministic and report.noise_effect > 0 and report.image_effect > 0


def test_cloning_learns_and_is_deterministic(tmp_path):
    from dsrl_vla.adapters.lerobot.nano import clone_smolvla
    from dsrl_vla.nano.demos import collect

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    recipe = load_pretrain_recipe(tmp_path / "recipe.yaml")
    demos, losses, hashes = collect(recipe.demos), [], []
    for name in ("one", "two"):
        base = clone_smolvla(
            demos, recipe.clone, recipe.model, tmp_path / name, lambda _, m: losses.append(m["flow_loss"])
        )
        hashes.append(base.sha256())
    assert sum(losses[30:40]) < 0.9 * sum(losses[:10]) and hashes[0] == hashes[1]


def test_an_unknown_architecture_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"architecture": "smolvl"}))
    with pytest.raises(UnknownNameError, match="Did you mean 'smolvla'"):
        pretrain(load_pretrain_recipe(tmp_path / "recipe.yaml"), tmp_path / "base")
