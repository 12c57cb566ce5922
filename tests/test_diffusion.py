import json

import numpy as np
import pytest
import torch
from dsrl_vla import load_base
from dsrl_vla.adapters.diffusion import DiffusionMLP, DiffusionMLPConfig, clone_diffusion, shipped_bases
from dsrl_vla.errors import DsrlError, NotSteerableError
from dsrl_vla.measures import shown
from dsrl_vla.noise import generators
from dsrl_vla.observation import unsqueeze

STATE = "observation.state"


def test_a_saved_base_is_the_same_base(tiny_diffusion, tmp_path, observation):
    tiny_diffusion.save_pretrained(tmp_path / "base")
    again = load_base(f"diffusion:{tmp_path / 'base'}")
    seen = observation(tiny_diffusion)
    assert torch.equal(again.act(seen, seed=1), tiny_diffusion.act(seen, seed=1))
    assert again.fingerprint() == tiny_diffusion.fingerprint() and again.spec.sampler_steps == 5
    assert again.processors()["scheduler"]["beta_schedule"] == "squaredcos_cap_v2"
    path = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    told = json.loads(path.read_text())
    path.write_text(
        json.dumps({k: v for k, v in told.items() if k not in ("beta_end", "steps_offset", "clip_sample")})
    )
    least = load_base(f"diffusion:{tmp_path / 'base'}")  # diffusers notes which defaults it took, in any order
    assert least.fingerprint() == tiny_diffusion.fingerprint()


def test_a_shipped_base_is_the_one_its_heads_were_trained_on():
    assert load_base("diffusion:hopper").fingerprint().processors == {"scheduler": "fca05726e6d816e9"}


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [("DDPMScheduler", "got a DDPM scheduler"), ("EulerAncestralDiscreteScheduler", "expected a DDIMScheduler")],
)
def test_a_sampler_that_draws_more_noise_is_refused(tiny_diffusion, tmp_path, scheduler, words):
    tiny_diffusion.save_pretrained(tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": scheduler}))
    with pytest.raises(NotSteerableError, match=words):
        load_base(f"diffusion:{tmp_path}")


def test_what_is_not_there_is_said(tmp_path, tiny_diffusion):
    with pytest.raises(DsrlError, match="a folder with a config.json, or one of .*hopper"):
        load_base("diffusion:nothing")
    tiny_diffusion.save_pretrained(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(DsrlError, match="expected a scheduler/scheduler_config.json"):
        load_base(f"diffusion:{tmp_path}")


def test_a_clone_has_both_modes_of_its_demonstrations_and_noise_decides_which():
    rng = np.random.default_rng(0)
    episodes = []
    for _ in range(100):
        side = rng.choice([-0.8, 0.8])
        actions = side + 0.05 * rng.standard_normal((8, 1))
        episodes.append((rng.standard_normal((8, 2)).astype(np.float32), actions.astype(np.float32)))
    base = clone_diffusion(episodes, DiffusionMLPConfig(2, 1, chunk=2, width=64, layers=1), steps=1500)
    encoding = base.encode({STATE: np.zeros((1, 2), np.float32)})
    actions = base.denoise(encoding, base.spec.noise.sample(generators([0]), 200))[0, :, 0, 0]
    assert 0.25 < (actions > 0.5).float().mean() < 0.75 and 0.25 < (actions < -0.5).float().mean() < 0.75
    same_side = torch.full((1, 1, 2, 1), 1.5)
    assert base.denoise(encoding, same_side).mean() > 0.5 and base.denoise(encoding, -same_side).mean() < -0.5


@pytest.mark.parametrize("name", sorted(shipped_bases()))
def test_shipped_bases_are_small_and_have_a_card_with_their_figures(name):
    folder = shipped_bases()[name]
    base = load_base(f"diffusion:{name}")
    assert isinstance(base, DiffusionMLP) and (folder / "model.safetensors").stat().st_size < 2e6
    measured, card = json.loads((folder / "eval.json").read_text())["measures"], (folder / "README.md").read_text()
    assert all(f"| {key} | {' | '.join(shown(m))} |" in card for key, m in measured.items())
    chunk = base.act({STATE: np.zeros(base.spec.observation.state_dim, np.float32)}, seed=0)
    assert chunk.shape == (4, base.spec.action_dim) and chunk.abs().max() <= 1 + 1e-6
    assert base.encode(unsqueeze({STATE: np.zeros(base.spec.observation.state_dim, np.float32)})).batch == 1
