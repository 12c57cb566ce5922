"""One battery over every base: whatever an adapter wraps, this is what the rest of the package relies on."""

import pytest
import tiny_lerobot
import torch
from dsrl_vla import SteeredPolicy, SteeringHead, load_base, probe
from dsrl_vla.errors import DsrlError
from dsrl_vla.head import HeadConfig
from dsrl_vla.inversion import invert
from dsrl_vla.networks import NetworkConfig
from dsrl_vla.noise import NoiseLayout, generators
from dsrl_vla.observation import batch, unsqueeze

BASES = ["nano", "tiny_pi0", "tiny_pi0_bf16", "fork_base", "tiny_diffusion", "dppo_base"]
# A float32 and a bfloat16 one of each framework, a π0 and a π0.5 of each dtype; skipped where openpi is not.
BASES += [
    "openpi_jax_pi0_float32",
    "openpi_jax_pi05_bfloat16",
    "openpi_torch_pi0_bfloat16",
    "openpi_torch_pi05_float32",
]
BASES += ["remote_pi0", "remote_fork"]
BASES += [f"lerobot:{kind}" for kind in tiny_lerobot.KINDS]  # skipped where LeRobot is not installed


@pytest.fixture(params=BASES)
def base(request):
    if request.param.startswith("openpi_"):
        return request.getfixturevalue("openpi_zoo").base(request.param)
    name, _, kind = request.param.partition(":")
    return request.getfixturevalue("lerobot_base")(kind) if kind else request.getfixturevalue(name)


@pytest.fixture
def tolerance(base):
    return 1e-5 if base.spec.dtype == "float32" else 0.1


def draw(base, batch_size=1, count=1, seed=0):
    return base.spec.noise.sample(generators(range(seed, seed + batch_size)), count)


def test_shapes_and_dtypes(base, observation):
    encoding = base.encode(batch([observation(base, i) for i in range(3)]))
    actions = base.denoise(encoding, draw(base, 3, 2))
    assert actions.shape == (3, 2, base.spec.noise.horizon, base.spec.action_dim)
    assert actions.dtype == torch.float32
    assert encoding.feature.shape == (3, base.spec.feature_dim) and encoding.feature.dtype == torch.float32
    assert 1 <= base.spec.executed_steps <= base.spec.noise.horizon


def test_k_noises_equal_k_calls(base, observation, tolerance):
    observations = batch([observation(base, i) for i in range(2)])
    noise = draw(base, 2, 8)
    together = base.denoise(base.encode(observations), noise)
    apart = [base.denoise(base.encode(observations), noise[:, k : k + 1].contiguous()) for k in range(8)]
    assert (together - torch.cat(apart, 1)).abs().max() <= tolerance


def test_a_batch_equals_its_singles(base, observation, tolerance):
    singles = [observation(base, i) for i in range(3)]
    noise = draw(base, 3)
    together = base.denoise(base.encode(batch(singles)), noise)
    apart = [base.denoise(base.encode(unsqueeze(o)), noise[i : i + 1]) for i, o in enumerate(singles)]
    assert (together - torch.cat(apart)).abs().max() <= tolerance


def test_an_encoding_can_be_used_again(base, observation):
    encoding = base.encode(unsqueeze(observation(base)))
    first = base.denoise(encoding, draw(base, count=4))
    base.denoise(encoding, draw(base, count=2, seed=9))
    assert torch.equal(first, base.denoise(encoding, draw(base, count=4)))


def test_a_packed_encoding_gives_the_same_actions(base, observation, tolerance):
    encoding = base.encode(batch([observation(base, i) for i in range(3)]))
    noise = draw(base, 3, 2)
    expected = base.denoise(encoding, noise)
    if not base.state_dict():  # elsewhere, and so is its prefix
        with pytest.raises(DsrlError, match="expected one that does without the base in its update"):
            base.pack(encoding)
        return
    rows = {name: tensor[[2, 0]] for name, tensor in base.pack(encoding).items()}
    assert (base.denoise(base.unpack(rows), noise[[2, 0]]) - expected[[2, 0]]).abs().max() <= tolerance


def test_the_probe_accepts_it_and_sees_what_matters(base, observation):
    report = probe(base, observation(base))
    assert report.deterministic and report.noise_effect > 0
    assert len(report.per_column) == base.spec.noise.dim
    assert (report.image_effect is None) == (not base.spec.observation.cameras)
    if base.spec.observation.cameras:
        assert report.image_effect > 0
    assert (report.prompt_effect is None) == (not base.spec.observation.prompt)
    if base.spec.observation.prompt:
        assert report.prompt_effect > 0


def test_bad_noise_and_bad_observations_are_refused(base, observation):
    encoding = base.encode(unsqueeze(observation(base)))
    with pytest.raises(DsrlError, match="noise: expected shape"):
        base.denoise(encoding, torch.zeros(1, 1, base.spec.noise.horizon + 1, base.spec.noise.dim))
    broken = observation(base)
    broken["observation.state"][0] = float("nan")
    with pytest.raises(DsrlError, match="expected a finite number"):
        base.encode(unsqueeze(broken))


def test_nothing_is_trainable_and_the_hash_is_stable(base, observation):
    before = base.sha256()
    base.act(observation(base), seed=0)
    assert base.sha256() == before
    assert not any(weight.requires_grad for weight in base.state_dict().values())


def test_a_head_steers_and_disabled_is_the_base_bit_for_bit(base, observation):
    layout = NoiseLayout(base.spec.noise, "repeat", 1.0)
    torch.manual_seed(0)
    head = SteeringHead(HeadConfig.for_base(base.spec, layout, NetworkConfig(width=16, layers=1)))
    policy, seen = SteeredPolicy(base, head), observation(base)
    steered = policy.act(seen, seed=3)
    assert steered.shape == (base.spec.executed_steps, base.spec.action_dim)
    assert torch.equal(steered, policy.act(seen, seed=4))  # the deterministic head needs no seed
    assert not torch.equal(
        policy.act(seen, seed=3, deterministic=False), policy.act(seen, seed=4, deterministic=False)
    )
    with policy.disabled():
        assert torch.equal(policy.act(seen, seed=3), base.act(seen, seed=3))
    assert torch.equal(policy.act(seen, seed=3), steered)


def test_the_noise_behind_its_own_action_is_found(base, observation):
    """By nothing but its sampler, whatever that is made of; so that demonstrations can be imitated."""
    layout = NoiseLayout(base.spec.noise, "repeat", 1.0)
    encoding = base.encode(batch([observation(base, i) for i in range(2)]))
    chosen = layout.sample(generators([3, 4])) * 0.5
    chunk = base.denoise(encoding, layout.expand(chosen))[:, 0, : base.spec.executed_steps]
    steps = torch.full((2,), base.spec.executed_steps)
    found = invert(base, encoding, layout, chunk, steps, generators([0, 1]))
    assert found.reach.min() > 0.9 and found.latent.abs().max() <= 1


def test_the_same_seed_gives_the_same_action(base, observation):
    seen = observation(base)
    assert torch.equal(base.act(seen, seed=1), base.act(seen, seed=1))
    assert not torch.equal(base.act(seen, seed=1), base.act(seen, seed=2))


@pytest.mark.parametrize(("text", "found"), [("[]", "a JSON object, got list"), ("{", "JSON, got JSONDecodeError")])
@pytest.mark.parametrize("adapter", ["nano", "transformers", "lerobot", "diffusion", "flow-mlp"])
def test_a_config_that_is_none_is_named(adapter, text, found, tmp_path):
    if adapter == "lerobot":
        pytest.importorskip("lerobot")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(DsrlError, match=f"config.json: expected {found}"):
        load_base(f"{adapter}:{tmp_path}")
