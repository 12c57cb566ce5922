"""LeRobot's policies on a GPU do what they do on a CPU, steered and not. Skipped without one."""

import pytest
import tiny_lerobot
import torch
from dsrl_vla import SteeredPolicy, SteeringHead, load_base
from dsrl_vla.failsafe import FailSafe
from dsrl_vla.head import HeadConfig
from dsrl_vla.networks import NetworkConfig
from dsrl_vla.noise import NoiseLayout, generators
from dsrl_vla.observation import batch, unsqueeze
from test_lerobot_policies import own_batch, raw_batch

DEVICE = "cuda"
pytest.importorskip("lerobot.policies")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
IN_BFLOAT16 = ("pi0", "pi05", "smolvla", "xvla")


def tolerance(base):
    """Of numbers, as a part of the greatest. The backbones of these go by bfloat16 on a GPU, whatever is asked for."""
    return 0.05 if base.model.config.type in ("evo1", "vla_jepa") else 2e-3


@pytest.fixture(autouse=True)
def whole_float32():
    """Convolutions round as products do."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(params=tiny_lerobot.KINDS)
def both(request, lerobot_folder):
    """The same policy on the CPU and on the GPU."""
    with tiny_lerobot.sizes(request.param):
        return [load_base(f"lerobot:{lerobot_folder(request.param)}", device=device) for device in ("cpu", DEVICE)]


def random_head(base):
    torch.manual_seed(0)
    layout, network = NoiseLayout(base.spec.noise, "repeat", 1.0), NetworkConfig(width=16, layers=1)
    head = SteeringHead(HeadConfig.for_base(base.spec, layout, network, fingerprint=base.fingerprint()))
    tiny_lerobot.randomise(head, scale=0.5)
    return head


def test_it_does_what_it_does_on_a_cpu(both, observation):
    base, there = both
    assert there.device.type == DEVICE
    mine, theirs = base.fingerprint(), there.fingerprint()
    assert base.sha256() == there.sha256() and (mine.weights, mine.processors) == (theirs.weights, theirs.processors)
    seen = batch([observation(base, seed) for seed in range(3)])
    noise = base.spec.noise.sample(generators([0, 1, 2]), 4)
    expected, encoding = base.denoise(base.encode(seen), noise), there.encode(seen)
    together = there.denoise(encoding, noise)
    most = tolerance(base) * float(expected.abs().max())
    assert together.device.type == "cpu" and (together - expected).abs().max() < most
    feature = base.encode(seen).feature
    assert (encoding.feature.cpu() - feature).abs().max() < tolerance(base) * float(feature.abs().max())
    apart = torch.cat([there.denoise(encoding, noise[:, k : k + 1]) for k in range(4)], 1)
    assert (together - apart).abs().max() < most
    assert torch.equal(there.denoise(there.encode(seen), noise), together)
    rows = {name: tensor.cpu()[[2, 0]] for name, tensor in there.pack(encoding).items()}
    assert (there.denoise(there.unpack(rows), noise[[2, 0]]) - together[[2, 0]]).abs().max() < most


def test_the_policys_own_draw_gives_the_policys_own_actions(both, observation):
    base = both[1]
    seen, shape = observation(base), (1, 1, *base.spec.noise.shape)
    normal = base.spec.noise.prior == "normal"
    base.model.reset()
    torch.manual_seed(7)
    with torch.no_grad():
        own = [base.model.select_action(dict(own_batch(base, seen))) for _ in range(base.spec.executed_steps)]
    base.model.reset()
    torch.manual_seed(7)
    drawn = torch.randn(shape, device=DEVICE) if normal else torch.rand(shape, device=DEVICE) * 2 - 1
    ours = base.denoise(base.encode(unsqueeze(seen)), drawn.cpu())[0, 0, : base.spec.executed_steps]
    expected = base.postprocess(torch.stack(own, 1).float())[0].cpu()
    assert (ours - expected).abs().max() < 1e-3 * float(expected.abs().max())


def test_random_states_are_left_alone(both, observation):
    base = both[1]
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    base.act(observation(base), seed=0)
    after = torch.get_rng_state(), torch.cuda.get_rng_state()
    assert all(map(torch.equal, before, after))


def test_a_head_of_the_cpus_base_steers_there(both, observation):
    base, there = both
    head = random_head(base)
    expected = head.noise(unsqueeze(observation(base)), base.encode(unsqueeze(observation(base))), None)
    policy = SteeredPolicy(there, head, failsafe=FailSafe(deadline_s=20.0))
    assert policy.head.start.device.type == DEVICE
    seen = observation(there)
    noise, reasons = policy.noise(unsqueeze(seen), there.encode(unsqueeze(seen)), [0])
    assert reasons == [""] and torch.allclose(noise, expected, atol=2 * tolerance(base))
    first, again = policy.act(seen), policy.act(seen)
    assert torch.equal(first, again) and not policy.fallbacks and not torch.equal(first, there.act(seen, seed=0))
    with policy.disabled():
        assert torch.equal(policy.act(seen, seed=5), there.act(seen, seed=5))


@pytest.mark.parametrize("kind", IN_BFLOAT16)
def test_in_bfloat16(kind, lerobot_folder, observation):
    with tiny_lerobot.sizes(kind):
        base, there = (
            load_base(f"lerobot:{lerobot_folder(kind)}", device=DEVICE, dtype=dtype)
            for dtype in ("float32", "bfloat16")
        )
    seen, noise = unsqueeze(observation(base)), base.spec.noise.sample(generators([0]), 8)
    expected, found = base.denoise(base.encode(seen), noise), there.denoise(there.encode(seen), noise)
    assert (found - expected).abs().max() < 0.1 * float(expected.abs().max())
    assert (found - found.mean(1, keepdim=True)).abs().max() > 1e-3  # it listens to its noise


def test_an_exported_policy_runs_there(lerobot_folder, observation, tmp_path):
    """LeRobot's server loads it, and says where it shall be only then."""
    pytest.importorskip("lerobot_policy_dsrl")
    from lerobot_policy_dsrl import DsrlPolicy
    from lerobot_policy_dsrl.export import write_policy

    base = load_base(f"lerobot:{lerobot_folder('smolvla')}")
    write_policy(tmp_path / "steered", random_head(base), base)
    policy = DsrlPolicy.from_pretrained(tmp_path / "steered")
    seen = raw_batch(observation(base))
    expected = policy.predict_action_chunk(seen)
    policy.to(DEVICE)
    assert policy.base.device.type == policy.head.start.device.type == DEVICE
    there = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in seen.items()}
    found = policy.predict_action_chunk(there)
    assert not policy.source.policy.fallbacks
    assert (found.cpu() - expected).abs().max() < 5e-3 * float(expected.abs().max())
