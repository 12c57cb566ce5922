"""On a GPU: an update is one CUDA graph that waits for nobody, and bases do what they do on a CPU. Skipped without."""

import json
import time

import numpy as np
import pytest
import torch
from dsrl_vla import SteeredPolicy, SteeringHead, draws, load_base, load_recipe, train
from dsrl_vla.critic import CriticConfig
from dsrl_vla.failsafe import FailSafe
from dsrl_vla.head import HeadConfig
from dsrl_vla.latent_sac import SACConfig
from dsrl_vla.learners import build_learner
from dsrl_vla.networks import NetworkConfig
from dsrl_vla.noise import NoiseLayout, NoiseSpace, generators
from dsrl_vla.noise_aliasing import NAConfig
from dsrl_vla.noise_bank import ACTION, BANK_ACTION, BANK_LATENT
from dsrl_vla.observation import batch, unsqueeze
from dsrl_vla.pairing import check_pair
from dsrl_vla.recorded import Recorded
from dsrl_vla.replay import Replay
from dsrl_vla.run_dir import load_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
LAYOUT = NoiseLayout(NoiseSpace(4, 2), "chunk")
STORED, BATCH = 500, 64


def build(algorithm="na", kind="transformer", device="cuda", **sac):
    torch.manual_seed(0)
    network = NetworkConfig(kind, width=32, layers=2)
    head = SteeringHead(HeadConfig(LAYOUT, 3, 5, 4, "test", "test:", network=network, action_dim=2))
    config = SACConfig(**({"batch": BATCH, "jitter": 0.1} | sac))
    made = build_learner(algorithm, None, head, CriticConfig(network), config, NAConfig(), (-9.0, 9.0), 0, device)
    made.fit_normaliser(filled())
    return made


def filled():
    rng, replay = np.random.default_rng(0), Replay(STORED, LAYOUT.latent_shape)
    uniform = lambda *shape: torch.from_numpy(rng.uniform(-1, 1, shape).astype(np.float32))
    numbers = replay.observe({"state": uniform(STORED, 3), "feature": uniform(STORED, 5)})
    bank = {ACTION: (4, 2), BANK_ACTION: (9, 4, 2), BANK_LATENT: (9, *LAYOUT.latent_shape)}
    replay.attach(numbers, {name: uniform(STORED, *shape) for name, shape in bank.items()})
    latents = uniform(STORED - 1, *LAYOUT.latent_shape)
    replay.add(numbers[:-1], latents, rng.normal(size=STORED - 1), np.full(STORED - 1, 0.9), numbers[1:])
    return replay


def batches(count, device="cuda", seed=0):
    return list(filled().batches(count, BATCH, np.random.default_rng(seed), torch.device(device)))


def weights(learner):
    return {k: v.cpu() for k, v in learner.tensors().items() if v.is_floating_point()}


def furthest(a, b):
    """The greatest difference of any tensor, of its greatest number."""
    return max(float((a[k] - b[k]).abs().max() / (1e-6 + b[k].abs().max())) for k in b)


@pytest.mark.parametrize("algorithm", ["sac", "na"])
@pytest.mark.parametrize("kind", ["transformer", "mlp"])
def test_recorded_updates_are_those_run_one_by_one(algorithm, kind):
    recorded, plain = build(algorithm, kind), build(algorithm, kind)
    plain._recorded = None
    for given in batches(12):
        said, expected = recorded.update(given), plain.update(given)
        assert said.keys() == expected.keys()
        for name in said:
            assert torch.allclose(said[name], expected[name], rtol=1e-3, atol=1e-5), name
    assert [take.graph is not None for take in recorded._recorded.takes.values()] == [True]
    assert furthest(weights(recorded), weights(plain)) < 1e-3


@pytest.mark.parametrize("algorithm", ["sac", "na"])
@pytest.mark.parametrize("kind", ["transformer", "mlp"])
def test_updates_are_those_of_a_cpu(algorithm, kind, monkeypatch):
    """With the same draws, which a GPU's generator does not make."""
    found = {}
    for device in ("cpu", "cuda"):
        stream = torch.Generator().manual_seed(0)
        monkeypatch.setattr(draws, "_draw", lambda draw, shape, _, there, g=stream: draw(shape, generator=g).to(there))
        learner = build(algorithm, kind, device)
        learner._recorded = None
        for given in batches(10, device):
            info = learner.update(given)
        found[device] = weights(learner) | info
    assert all(tensor.is_cuda for tensor in info.values())
    found = {k: {n: t.cpu() for n, t in v.items() if not n.startswith("optimizer")} for k, v in found.items()}
    said = [[v[name] for name in info] for v in found.values()]
    assert torch.allclose(*map(torch.stack, said), rtol=0.01, atol=1e-3)
    # Adam's first steps are as long for the least gradient as for the greatest, and so are their differences.
    assert furthest(found["cuda"], found["cpu"]) < 0.02


@pytest.mark.parametrize("algorithm", ["sac", "na"])
def test_an_update_waits_for_nothing(algorithm):
    learner, replay, rng = build(algorithm), filled(), np.random.default_rng(0)
    device, draw = learner.device, lambda: replay.batches(8, BATCH, rng, learner.device)
    for given in draw():
        learner.update(given)
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for given in draw():
            learner.update(given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert learner.updates == 16


def test_a_learner_that_was_saved_goes_on_as_it_would_have():
    learner, given = build(), batches(200)
    for each in given[:100]:
        learner.update(each)
    saved = {k: v.cpu().clone() for k, v in learner.tensors().items()}
    for each in given[100:]:
        learner.update(each)
    other = build()
    for each in batches(8, seed=3):
        other.update(each)
    other.load_tensors(saved, 100)
    for each in given[100:]:
        other.update(each)
    assert not other._recorded.fails and [take.graph is not None for take in other._recorded.takes.values()] == [True]
    assert furthest(weights(other), weights(learner)) < 1e-5


def test_batches_of_another_shape_are_recorded_anew():
    learner = build("sac")
    for given in batches(6):
        learner.update(given)
    for given in batches(6):
        learner.update(given.rows(slice(0, 32)))
    assert learner.updates == 12 and all(torch.isfinite(t).all() for t in weights(learner).values())


@pytest.mark.parametrize("algorithm", ["sac", "na"])
def test_a_run_whose_learner_is_on_the_gpu(algorithm, fork_folder, tmp_path):
    recipe = load_recipe("drawer-open", {
        "algorithm": algorithm, "name": "short",
        "base": {"uri": f"flow-mlp:{fork_folder}"},
        "task": {"uri": "point:fork", "max_episode_steps": 40, "num_envs": 8},
        "train": {"env_steps": 4000, "learning_starts": 64, "gradient_steps": 1.0, "validate_every": 1000,
                  "validation_episodes": 20, "device": "cuda", "checkpoint_every": 1000, "stop_at": None},
        "eval": {"episodes": 40, "video_episodes": 0},
    })  # fmt: skip
    done = train(recipe, tmp_path / "run")
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert result["steered"]["success"] > result["base"]["success"]
    assert {p.device.type for p in done.head.parameters()} == {"cpu"}
    check_pair(done.head.config, load_base(recipe.base.uri))  # what was learnt here may steer there
    assert "learner.average.start" in load_checkpoint(tmp_path / "run" / "checkpoints")[0]
    again = train(recipe, tmp_path / "run", resume=True)
    assert again.evaluation["steered"]["success"] == result["steered"]["success"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_does_what_it_does_on_a_cpu(dtype, observation):
    base, there = load_base("nano:", dtype=dtype), load_base("nano:", device="cuda", dtype=dtype)
    assert base.sha256() == there.sha256() and base.fingerprint().weights == there.fingerprint().weights
    seen = batch([observation(base, seed) for seed in range(3)])
    noise = base.spec.noise.sample(generators([0, 1, 2]), 8)
    tolerance = 1e-3 if dtype == "float32" else 0.1
    encoding = there.encode(seen)
    together = there.denoise(encoding, noise)
    assert together.device.type == "cpu"
    assert (together - base.denoise(base.encode(seen), noise)).abs().max() < tolerance
    apart = torch.cat([there.denoise(encoding, noise[:, k : k + 1]) for k in range(8)], 1)
    assert (together - apart).abs().max() < tolerance
    assert torch.equal(there.denoise(there.encode(seen), noise), together)
    assert not there._look.fails and not there._sampler.fails
    there.model.to("cpu"), there.model.to("cuda")  # its weights are elsewhere now
    assert torch.equal(there.denoise(there.encode(seen), noise), together)
    assert not there._look.fails and not there._sampler.fails
    there._look, there._sampler = there._look.function, there._sampler.function
    assert (there.denoise(there.encode(seen), noise) - together).abs().max() < tolerance
    kept = {name: tensor.cpu() for name, tensor in there.pack(encoding).items()}
    rows = {name: tensor.cuda() for name, tensor in kept.items()}
    assert (there.denoise(there.unpack(rows), noise) - together).abs().max() < tolerance


def test_steering_on_the_gpu(observation):
    """The head goes to where its base is, and may be on either side; switched off it is the base bit for bit."""
    base = load_base("nano:", device="cuda", dtype="bfloat16")
    layout = NoiseLayout(base.spec.noise, "repeat", 1.5)
    torch.manual_seed(0)
    head = SteeringHead(HeadConfig.for_base(base.spec, layout, NetworkConfig()))
    seen = unsqueeze(observation(base))
    expected = head.noise(seen, base.encode(seen), None)
    policy = SteeredPolicy(base, head, failsafe=FailSafe(deadline_s=20.0))  # in a thread of its own
    assert policy.head.start.is_cuda
    noise, reasons = policy.noise(seen, base.encode(seen), [0])
    assert reasons == [""] and noise.device.type == "cpu"
    assert torch.allclose(noise, expected, atol=1e-3)
    first, again = policy.act(observation(base)), policy.act(observation(base))
    assert first.abs().sum() > 0 and not policy.fallbacks and torch.equal(first, again)
    assert not policy.head._recorded.fails
    policy.head.cpu()
    assert torch.allclose(policy.act(observation(base)), again, atol=0.02)
    with policy.disabled():
        assert torch.equal(policy.act(observation(base), seed=5), base.act(observation(base), seed=5))


def test_a_head_that_is_late_while_it_is_recorded_is_asked_again(observation):
    base = load_base("nano:", device="cuda")
    torch.manual_seed(0)
    head = SteeringHead(HeadConfig.for_base(base.spec, NoiseLayout(base.spec.noise, "repeat", 1.5), NetworkConfig()))
    policy = SteeredPolicy(base, head, failsafe=FailSafe(deadline_s=0.02))
    until = time.monotonic() + 60
    while policy.last_fallback or policy.guard.decisions < 3:
        policy.act(observation(base))
        assert time.monotonic() < until, policy.last_fallback
    assert not policy.head._recorded.fails and not base._look.fails and not base._sampler.fails


def test_what_is_recorded_for_a_server_serves_a_program():
    """A server's thread may be in inference mode, and its caller not."""
    weight = torch.ones(1, device="cuda")
    doubling = Recorded(lambda held: {"y": held["x"] * 2}, "the doubling", lambda: weight)
    with torch.inference_mode():
        assert doubling({"x": weight.clone()})["y"].item() == 2
    assert doubling({"x": weight * 3})["y"].item() == 6 and not doubling.fails


def test_what_cannot_be_recorded_is_called_and_leaves_no_trace(caplog):
    weight, here = torch.ones(1, device="cuda"), torch.cuda.current_stream()
    peeking = Recorded(lambda held: {"y": held["x"] * held["x"].sum().item()}, "the peeking", lambda: weight)
    for number in range(1, 4):
        assert peeking({"x": torch.full((2,), float(number), device="cuda")})["y"].tolist() == [2.0 * number**2] * 2
    assert peeking.fails and len(caplog.records) == 1
    assert torch.cuda.current_stream() == here and torch.randn(1, device="cuda").isfinite()
    stream = torch.Generator("cuda").manual_seed(0)
    drawing = lambda held: {"y": held["x"] + torch.rand(2, device="cuda", generator=stream).sum().item()}
    rolling = Recorded(drawing, "the rolling", lambda: weight, repeatable=False, generator=stream)
    drawn = [rolling({"x": torch.zeros(2, device="cuda")})["y"][0].item() for _ in range(5)]
    assert rolling.fails and len(set(drawn)) == 5
    doubling = Recorded(lambda held: {"y": held["x"] * 2}, "the doubling", lambda: weight)
    assert doubling({"x": weight})["y"].item() == 2 and not doubling.fails


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_on_the_second_gpu_it_is_recorded_there(observation):
    base, there = load_base("nano:"), load_base("nano:", device="cuda:1")
    noise = base.spec.noise.sample(generators([0]), 2)
    for seed in range(3):
        seen = unsqueeze(observation(base, seed))
        assert (there.denoise(there.encode(seen), noise) - base.denoise(base.encode(seen), noise)).abs().max() < 1e-3
