"""The adapter against the policies' own paths: every tiny real LeRobot policy that can be built offline."""

import inspect

import numpy as np
import pytest
import tiny_lerobot
import torch
from dsrl_vla import load_base, probe
from dsrl_vla.errors import DsrlError, NotSteerableError
from dsrl_vla.noise import generators
from dsrl_vla.observation import batch, unsqueeze

pytest.importorskip("lerobot.policies")

HONOURS_NOISE = ("pi0", "pi05", "smolvla", "diffusion")


@pytest.fixture(params=tiny_lerobot.KINDS)
def base(request, lerobot_base):
    return lerobot_base(request.param)


def raw_batch(seen):
    """What LeRobot's evaluation hands to the policy's preprocessing."""
    made = {"observation.state": torch.from_numpy(seen["observation.state"])[None], "task": [seen.get("task", "")]}
    for key, image in seen.items():
        if "images" in key:
            made[key] = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    return made


def own_batch(base, seen):
    """What LeRobot's evaluation hands to the policy."""
    return base.preprocess(raw_batch(seen))


def drawn(base, seed):
    """The noise that the policy draws for itself after `torch.manual_seed(seed)`."""
    torch.manual_seed(seed)
    shape = (1, *base.spec.noise.shape)
    return torch.randn(shape) if base.spec.noise.prior == "normal" else torch.rand(shape) * 2 - 1


def test_the_policys_own_draw_gives_the_policys_own_actions(base, observation):
    seen, policy = observation(base), base.model
    policy.reset()
    torch.manual_seed(7)
    with torch.no_grad():
        own = [policy.select_action(dict(own_batch(base, seen))) for _ in range(base.spec.executed_steps)]
    policy.reset()
    expected = base.postprocess(torch.stack(own, 1).float())[0]
    ours = base.denoise(base.encode(unsqueeze(seen)), drawn(base, 7)[:, None])[0, 0, : base.spec.executed_steps]
    exact = base.spec.noise.prior == "normal"  # a uniform draw is stretched and squeezed on the way
    assert torch.equal(ours, expected) if exact else torch.allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("kind", HONOURS_NOISE)
def test_where_noise_is_an_argument_it_means_the_same(kind, lerobot_base, observation):
    base = lerobot_base(kind)
    seen, noise = observation(base, 1), drawn(base, 3)
    prepared = base.split.batch(dict(own_batch(base, seen)))
    with torch.no_grad():
        own = base.postprocess(base.model.predict_action_chunk(prepared, noise=noise).float())[0]
    ours = base.denoise(base.encode(unsqueeze(seen)), noise[:, None])[0, 0]
    assert torch.equal(ours[: len(own)], own)


def test_the_global_random_state_is_left_alone(base, observation):
    before = torch.get_rng_state()
    base.act(observation(base), seed=0)
    assert torch.equal(before, torch.get_rng_state())


def test_a_prefix_is_made_once_for_all_noises(base, observation):
    """Row k of K noises is the chunk of noise k alone, and no call of the encoder is made for it."""
    encoding = base.encode(batch([observation(base, i) for i in range(2)]))
    noise = base.spec.noise.sample(generators([0, 1]), 3)
    together = base.denoise(encoding, noise)
    base.split.reach = base.split.encode = None  # would raise if called
    try:
        apart = torch.cat([base.denoise(encoding, noise[:, k : k + 1]) for k in range(3)], 1)
    finally:
        del base.split.reach, base.split.encode
    assert (together - apart).abs().max() <= 1e-5


def test_dead_columns_are_declared(base, observation):
    report = probe(base, observation(base))
    for effect, live in zip(report.per_column, base.spec.noise.live, strict=True):
        assert effect > 0 or not live


def test_an_interface_that_has_changed_is_refused(base, monkeypatch):
    path = next(iter(base.split.interface))
    owner, name = base.split._find(path)
    monkeypatch.setattr(type(owner), name, lambda self, renamed: None)
    with pytest.raises(DsrlError, match=rf"lerobot \d.*{name}: expected parameters .* got renamed. This adapter"):
        type(base.split)(base.model)


def test_a_method_that_is_gone_is_refused(base, monkeypatch):
    path = next(iter(base.split.interface))
    owner, name = base.split._find(path)
    monkeypatch.delattr(next(c for c in type(owner).__mro__ if name in vars(c)), name)
    with pytest.raises(DsrlError, match="no such method"):
        type(base.split)(base.model)


def by_reading():
    from dsrl_vla.adapters.lerobot.experts import Groot, MolmoAct2
    from dsrl_vla.adapters.lerobot.standing_in import WallX

    return {
        Groot: ("lerobot.policies.groot.groot_n1_7", "GR00TN17ActionHead"),
        MolmoAct2: ("lerobot.policies.molmoact2.molmoact2_hf_model.modeling_molmoact2", "MolmoAct2Model"),
        WallX: ("lerobot.policies.wall_x.modeling_wall_x", "Qwen2_5_VLMoEForAction"),
    }


@pytest.mark.parametrize("index", range(3))
def test_splits_made_by_reading_fit_the_installed_classes(index):
    split, (module, name) = list(by_reading().items())[index]
    owner = getattr(pytest.importorskip(module), name)
    for path, wanted in split.interface.items():
        found = inspect.signature(getattr(owner, path.rpartition(".")[2])).parameters
        assert set(wanted) <= set(found), path


def test_a_sampler_that_draws_nothing_is_refused():
    from dsrl_vla.adapters.lerobot.seam import injected

    with (
        pytest.raises(NotSteerableError, match="expected its sampler to draw noise"),
        injected(torch.zeros(1, 2), "x"),
    ):
        torch.randn(1, 3)


def test_a_policy_that_never_comes_to_its_seam_is_refused():
    from dsrl_vla.adapters.lerobot.seam import arguments_at

    with pytest.raises(DsrlError, match="expected the policy to call it"):
        arguments_at(torch.nn.Linear(1, 1), "forward", lambda: None)


def test_xvla_grippers_are_not_live(tmp_path):
    tiny_lerobot.save("xvla", tmp_path, action_mode="ee6d", **tiny_lerobot.features(actions=20))
    base = load_base(f"lerobot:{tmp_path}")
    assert base.spec.noise.shape == (6, 20)
    assert [i for i, live in enumerate(base.spec.noise.live) if not live] == [9, 19]


def test_evo1_is_uniform(lerobot_base):
    space = lerobot_base("evo1").spec.noise
    noise = space.sample(generators([0]), 64)
    assert space.prior == "uniform" and noise.abs().max() <= 1 and noise.std() > 0.5


def test_relative_actions_count_from_the_state_of_their_own_observation(tmp_path, observation):
    absolute, relative = tmp_path / "absolute", tmp_path / "relative"
    same = {"chunk_size": 4, "n_action_steps": 4, **tiny_lerobot.features(state=3)}
    with pytest.MonkeyPatch.context() as patch:
        statistics = tiny_lerobot.statistics
        patch.setattr(tiny_lerobot, "statistics", lambda: statistics(state=3))
        tiny_lerobot.save("pi0", absolute, **same)
        tiny_lerobot.save("pi0", relative, **same, use_relative_actions=True, relative_exclude_joints=[])
    with tiny_lerobot.sizes("pi0"):
        bases = [load_base(f"lerobot:{folder}") for folder in (absolute, relative)]
    seen = [observation(bases[0], i) for i in range(2)]
    noise = bases[0].spec.noise.sample(generators([0, 1]), 2)
    encodings = [base.encode(batch(seen)) for base in bases]
    bases[1].encode(unsqueeze(observation(bases[1], 5)))  # what was seen last is not what counts
    absolute, relative = (b.denoise(e, noise) for b, e in zip(bases, encodings, strict=True))
    states = torch.from_numpy(np.stack([o["observation.state"] for o in seen]))
    assert torch.allclose(relative, absolute + states[:, None, None], atol=1e-5)
