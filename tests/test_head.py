import copy
import json

import pytest
import torch
from dsrl_vla import SteeringHead
from dsrl_vla.critic import CriticConfig, CriticEnsemble
from dsrl_vla.errors import DsrlError
from dsrl_vla.head import HeadConfig, shrink
from dsrl_vla.networks import NetworkConfig, build
from dsrl_vla.noise import NoiseLayout, NoiseSpace, generators
from dsrl_vla.observation import batch

SPACE = NoiseSpace(6, 5, live=(True,) * 3 + (False,) * 2)
KINDS = ["transformer", "mlp"]


def config(kind="transformer", layout="repeat", **more):
    network = NetworkConfig(kind, width=16, layers=2)
    return HeadConfig(NoiseLayout(SPACE, layout), 4, 7, 6, "test", "test:base", network=network, **more)


def inputs(n=5, cameras=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = {"state": torch.randn(n, 4, generator=generator), "feature": torch.randn(n, 7, generator=generator)}
    return made | {f"image.{c}": torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8) for c in cameras}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["repeat", "chunk", "knots:2"])
def test_latents_have_the_layouts_shape_and_stay_in_the_box(kind, layout):
    head = SteeringHead(config(kind, layout))
    latent, log_prob = head.sample(inputs())
    assert latent.shape == (5, *head.layout.latent_shape) and log_prob.shape == (5,)
    assert latent.abs().max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_log_density_matches_torchs_tanh_gaussian(kind):
    head = SteeringHead(config(kind, "knots:2"))
    latent, log_prob = head.sample(inputs(), torch.Generator().manual_seed(1))
    mean, log_std = head.distribution(inputs())
    normal = torch.distributions.Normal(mean, log_std.exp())
    reference = torch.distributions.TransformedDistribution(normal, torch.distributions.transforms.TanhTransform())
    expected = reference.log_prob(latent.clamp(-0.999999, 0.999999)).flatten(1).sum(1)
    assert torch.allclose(log_prob, expected, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_an_ensemble_is_its_members_run_alone(kind):
    members, sizes, vectors = 3, [4, 7], (2, 3)
    network = NetworkConfig(kind, width=16)
    stack = build(network, members, sizes, vectors, 1, 1)
    state, feature, latent = *inputs().values(), torch.rand(5, 2, 3)
    together = stack([state, feature], latent)
    for i in range(members):
        alone = build(network, 1, sizes, vectors, 1, 1)
        alone.load_state_dict({k: v[i : i + 1] for k, v in stack.state_dict().items()})
        assert torch.allclose(alone([state, feature], latent)[0], together[i], atol=1e-6)
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_weight(kind):
    made = config(kind, "knots:2", cameras=("front",))
    head, critic = SteeringHead(made), CriticEnsemble(CriticConfig(made.network), made)
    seen = inputs(cameras=("front",))
    latent, log_prob = head.sample(seen)
    (critic(seen, latent).sum() + log_prob.sum()).backward()
    for name, parameter in [*head.named_parameters(), *critic.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("reduction", ["min", "mean"])
def test_the_ensemble_speaks_with_one_voice(reduction):
    critic = CriticEnsemble(CriticConfig(NetworkConfig(width=16), 4, reduction), config())
    latent = torch.rand(5, 1, 3)
    q = critic(inputs(), latent)
    assert q.shape == (4, 5)
    assert torch.equal(critic.value(inputs(), latent), q.min(0).values if reduction == "min" else q.mean(0))


def test_the_normaliser_centres_and_damps_a_wide_feature():
    head = SteeringHead(config())
    made = inputs(500)
    sample = {"state": made["state"] * 3 + 10, "feature": made["feature"] * 5 - 2}
    sample["state"][:, 3] = 7.0  # a column that never varies
    head.eyes.normalise.fit(sample)
    state, feature = head.eyes.normalise(sample)
    assert state[:, :3].mean().abs() < 0.05 and (state[:, :3].std(0) - 1).abs().max() < 0.05
    assert (state[:, 3] == 0).all()
    assert abs(feature.norm(dim=1).square().mean() - 1) < 0.1


def test_columns_of_a_state_may_have_other_units():
    """Encoder ticks beside metres: what is small for the one is all there is of the other."""
    head, made = SteeringHead(config()), inputs(500)
    made["state"] = made["state"] * torch.tensor([300.0, 0.05, 1.0, 0.0]) + torch.tensor([2000.0, 0.0, 0.0, 0.3])
    head.eyes.normalise.fit(made)
    state = head.eyes.normalise(made)[0]
    assert (state[:, :3].std(0) - 1).abs().max() < 0.05 and (state[:, 3].abs() < 1e-5).all()


@pytest.mark.parametrize("jitter", [1e-5, 1.5e-4])
def test_a_column_that_was_still_is_seen_when_it_moves(jitter):
    """An object that nobody had touched yet: its height is not to be cut off at five of its jitters."""
    head, made = SteeringHead(config()), inputs(500)
    made["state"] = made["state"] * torch.tensor([0.3, 0.3, 0.3, jitter]) + torch.tensor([0.0, 0.0, 0.0, 0.02])
    head.eyes.normalise.fit(made)
    seen = {"state": torch.tensor([[0.0, 0.0, 0.0, 0.12], [0.0, 0.0, 0.0, 0.22]]), "feature": torch.zeros(2, 7)}
    low, high = head.eyes.normalise(seen)[0][:, 3]
    assert high - low == pytest.approx(0.1, abs=1e-4)


def test_a_single_observation_is_no_scale():
    """Of one row a deviation is 0, and not NaN."""
    head = SteeringHead(config())
    head.eyes.normalise.fit(inputs(1))
    assert all((vector == 0).all() for vector in head.eyes.normalise(inputs(1)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_head_is_the_same_head(kind, tmp_path):
    head = SteeringHead(config(kind, "knots:3", cameras=("front",)))
    head.eyes.normalise.fit(inputs(50))
    head.save_pretrained(tmp_path)
    loaded = SteeringHead.from_pretrained(tmp_path)
    assert loaded.config == head.config
    seen = inputs(cameras=("front",))
    assert torch.equal(loaded.latent(seen, None), head.eval().latent(seen, None))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["head.safetensors", "head_config.json"]


def test_a_head_that_does_not_fit_its_config_is_refused(tmp_path):
    SteeringHead(config()).save_pretrained(tmp_path)
    path = tmp_path / "head_config.json"
    good = json.loads(path.read_text())
    path.write_text(json.dumps(good | {"state_dim": 5}))
    with pytest.raises(DsrlError, match="expected the weights that head_config.json describes") as caught:
        SteeringHead.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
    path.write_text(json.dumps(good | {"surprise": 1}))
    with pytest.raises(DsrlError, match="surprise"):
        SteeringHead.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(DsrlError, match="expected a file head_config.json"):
        SteeringHead.from_pretrained(tmp_path)


def test_a_head_can_look_at_small_images_itself(tiny_pi0, observation):
    spec = tiny_pi0.spec
    layout = NoiseLayout(spec.noise, "chunk")
    head = SteeringHead(HeadConfig.for_base(spec, layout, NetworkConfig(width=16), cameras=("wrist",), image_size=24))
    seen = batch([observation(tiny_pi0, size=(40, 56))])
    read = head.read(seen, tiny_pi0.encode(seen))
    assert read["image.wrist"].shape == (1, 24, 24, 3) and read["image.wrist"].dtype == torch.uint8
    assert head.noise(seen, tiny_pi0.encode(seen), generators([0])).shape == (1, 1, *spec.noise.shape)


def test_shrinking_keeps_the_mean():
    image = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    assert abs(shrink(image, 32).float().mean() - image.float().mean()) < 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "cnn"}, "network.kind: expected transformer or mlp"),
        ({"width": 30}, "network.width: expected a multiple of network.heads=4"),
        ({"layers": 0}, "network.layers"),
    ],
)
def test_bad_networks_are_refused(fields, message):
    with pytest.raises(DsrlError, match=message):
        NetworkConfig(**fields)


def test_a_copy_of_a_head_chooses_by_its_own_weights():
    """What is recorded on a GPU is found by where it is, and belongs to one head."""
    torch.manual_seed(0)
    head, given = SteeringHead(config()), inputs()
    copied = copy.deepcopy(head)
    with torch.no_grad():
        before = head.latent(given, None)
        copied.start += 0.5
        assert torch.equal(head.latent(given, None), before)
        assert (copied.latent(given, None) > before).all()
    assert copied._recorded.function.__self__ is copied
    assert copied._recorded.weight() is next(copied.network.parameters())
