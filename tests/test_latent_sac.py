import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from dsrl_vla import SteeringHead
from dsrl_vla.critic import CriticConfig
from dsrl_vla.errors import DsrlError
from dsrl_vla.head import HeadConfig
from dsrl_vla.latent_sac import LatentSAC, SACConfig, actor_loss, critic_loss
from dsrl_vla.networks import NetworkConfig
from dsrl_vla.noise import NoiseLayout, NoiseSpace
from dsrl_vla.replay import Batch

BOUNDS = (-100.0, 100.0)


def learner(kind="transformer", seed=0, **sac):
    torch.manual_seed(seed)
    network = NetworkConfig(kind, width=32, layers=1)
    layout = NoiseLayout(NoiseSpace(4, 2), "repeat")
    head = SteeringHead(HeadConfig(layout, 3, 5, 4, "test", "test:", network=network))
    return LatentSAC(head, CriticConfig(network), SACConfig(**({"batch": 64} | sac)), BOUNDS, seed)


def batch(n=64, discount=0.9, seed=0):
    g = torch.Generator().manual_seed(seed)
    inputs = lambda: {"state": torch.randn(n, 3, generator=g), "feature": torch.randn(n, 5, generator=g)}
    latent = torch.rand(n, 1, 2, generator=g) * 2 - 1
    return Batch(inputs(), latent, torch.randn(n, generator=g), torch.full((n,), discount), inputs())


def test_the_reward_of_a_chunk_is_discounted_over_the_executed_steps_only():
    config = SACConfig(gamma=0.5, reward_offset=1.0, reward_scale=2.0)
    rewards = np.array([[-1.0, -1.0, 0.0, 0.0], [0.0, -1.0, -1.0, 3.0]])
    found = config.chunk_reward(rewards, np.array([3, 4]))
    assert np.allclose(found, [2 * 0.25, 2 * (1 + 4 * 0.125)])


def test_value_bounds_are_what_the_reward_adds_up_to():
    assert SACConfig(gamma=0.5, reward_offset=0.0).value_bounds((-1.0, 0.0)) == (-2.0, 0.0)
    assert SACConfig(gamma=0.5).value_bounds((-1.0, 0.0)) == (0.0, 2.0)
    assert SACConfig(backup_entropy=True).value_bounds((-1.0, 0.0)) == (-math.inf, math.inf)  # entropy may go beyond


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("reward_scale", -1.0, "above 0"),
        ("reward_scale", 0.0, "above 0"),
        ("reward_scale", math.inf, "a finite number"),
        ("reward_offset", math.nan, "a finite number"),
        ("target_entropy", -math.inf, "a finite number"),
        ("target_entropy", 0.7, r"a finite number below ln 2 = 0\.693"),
        ("actor_lr", math.inf, "a finite number"),
        ("actor_lr", math.nan, "above 0"),
        ("jitter", math.nan, "a finite number, 0 or more"),
        ("jitter", math.inf, "a finite number, 0 or more"),
    ],
)
def test_settings_that_would_make_every_target_one_number_are_refused(name, value, words):
    with pytest.raises(DsrlError, match=f"sac.{name}: expected {words}"):
        SACConfig(**{name: value})


def test_every_row_bootstraps_by_its_own_discount():
    sac = learner()
    mixed = replace(batch(), discount=torch.tensor([0.0, 0.9, 0.5, 1.0]).repeat(16)[: len(batch().reward)])
    source = lambda: torch.Generator().manual_seed(0)
    loss, info = critic_loss(sac.critic, sac.target, sac.head, torch.tensor(0.1), mixed, BOUNDS, False, source())
    latent, _ = sac.head.sample(mixed.next_inputs, source())
    value = torch.minimum(*sac.target(mixed.next_inputs, latent))
    y = (mixed.reward + mixed.discount * value).clamp(*BOUNDS)
    assert torch.allclose(info["target"], y.mean(), atol=1e-6)
    assert torch.allclose(loss, (sac.critic(mixed.inputs, mixed.latent) - y).square().mean(1).sum(), atol=1e-5)


@pytest.mark.parametrize("past", [0.0, 0.9])
def test_the_average_is_that_of_the_actor_over_its_updates(past):
    """Young ones forget faster: after n updates the newest actor's weight is 1 / n at least."""
    sac = learner(actor_average=past)
    expected = None
    for number in range(1, 15):
        sac.update(batch(seed=number))
        newest, weight = sac.flat["head"].vector.detach().clone(), max(1 - past, 1 / number)
        expected = newest if expected is None else expected + weight * (newest - expected)
        assert torch.allclose(sac.flat["average"].vector, expected, atol=1e-6)
    assert torch.equal(sac.flat["average"].vector, newest) == (past == 0)


def test_entropy_enters_the_target_only_when_asked_for():
    sac, data = learner(), batch()
    target = lambda backup: critic_loss(
        sac.critic, sac.target, sac.head, torch.tensor(0.5), data, BOUNDS, backup, torch.Generator().manual_seed(0)
    )[1]["target"]
    assert not torch.equal(target(True), target(False))


def test_targets_stay_within_the_bounds():
    sac, data = learner(), batch()
    info = critic_loss(sac.critic, sac.target, sac.head, torch.tensor(0.1), data, (0.3, 0.3), False, sac.generator)[1]
    assert info["target"] == pytest.approx(0.3)


def test_losses_change_nothing():
    sac, data = learner(), batch()
    before = {k: v.clone() for k, v in sac.tensors().items() if k != "generator"}
    alpha, generator = torch.tensor(0.1), torch.Generator()
    critic_loss(sac.critic, sac.target, sac.head, alpha, data, BOUNDS, False, generator)
    actor_loss(sac.critic, sac.head, alpha, data, generator)
    assert all(torch.equal(sac.tensors()[k], v) for k, v in before.items())


@pytest.mark.parametrize("kind", ["transformer", "mlp"])
def test_an_update_moves_head_critic_target_and_temperature(kind):
    sac = learner(kind)
    before = {k: v.clone() for k, v in sac.tensors().items()}
    info = sac.update(batch())
    after = sac.tensors()
    for part in ("head.network", "critic.network", "target.network"):
        moved = [k for k in before if k.startswith(part) and not torch.equal(before[k], after[k])]
        assert len(moved) > 3, part
    assert not torch.equal(before["log_alpha"], after["log_alpha"])
    assert all(torch.is_tensor(v) for v in info.values())  # nothing was copied to Python


def test_equal_seeds_give_equal_learners_and_a_saved_one_goes_on_bit_for_bit():
    straight, stopped = learner(), learner()
    for i in range(10):
        straight.update(batch(seed=i))
    for i in range(5):
        stopped.update(batch(seed=i))
    resumed = learner(seed=9)
    resumed.load_tensors({k: v.clone() for k, v in stopped.tensors().items()}, stopped.updates)
    for i in range(5, 10):
        resumed.update(batch(seed=i))
    assert resumed.updates == 10
    for key, value in straight.tensors().items():
        assert torch.equal(value, resumed.tensors()[key]), key


@pytest.mark.parametrize("kind", ["transformer", "mlp"])
def test_it_learns_which_latent_pays(kind):
    """A contextual bandit: the reward peaks where the latent equals a function of the state."""
    sac = learner(kind, actor_lr=1e-3, critic_lr=1e-3, target_entropy=-2.0, reward_offset=0.0)
    g = torch.Generator().manual_seed(1)
    best = lambda state: torch.stack([0.8 * state[:, 0].tanh(), -0.8 * state[:, 1].tanh()], 1)[:, None]
    for _ in range(700):
        inputs = {"state": torch.randn(64, 3, generator=g), "feature": torch.randn(64, 5, generator=g)}
        latent = torch.rand(64, 1, 2, generator=g) * 2 - 1
        reward = -(latent - best(inputs["state"])).square().sum((1, 2))
        sac.update(Batch(inputs, latent, reward, torch.zeros(64), inputs))
    inputs = {"state": torch.randn(500, 3, generator=g), "feature": torch.randn(500, 5, generator=g)}
    error = (sac.head.latent(inputs, None) - best(inputs["state"])).abs().mean()
    assert error < 0.15  # choosing zero gives 0.45


@pytest.mark.parametrize(
    ("field", "value"),
    [("gamma", 1.0), ("tau", 0.0), ("batch", 0), ("actor_lr", 0.0), ("alpha_init", -1.0), ("jitter", -0.1)],
)
def test_hyper_parameters_out_of_range_are_named(field, value):
    with pytest.raises(DsrlError, match=f"sac.{field}: expected"):
        SACConfig(**{field: value})


def test_a_critic_needs_members_and_a_known_reduction():
    with pytest.raises(DsrlError, match="critic.members"):
        CriticConfig(members=0)
    with pytest.raises(DsrlError, match=r"critic.reduction: expected min or mean, got 'max'"):
        CriticConfig(reduction="max")


def test_a_checkpoint_of_other_optimisers_is_refused():
    state = learner().tensors() | {"optimizer.actor.0.step": torch.tensor(1.0)}
    with pytest.raises(
        DsrlError, match="checkpoint: expected optimisers of alpha, head, critic, got an optimiser 'ac"
    ):
        learner().load_tensors(state, 1)


def test_a_discount_per_chunk_sums_within_it_as_the_reference_does():
    """Facts of the reference: reward = sum over the chunk of (r - offset), gamma once per chunk."""
    rewards, steps = np.array([[1.0, 2.0, 3.0], [1.0, 0.0, 0.0]]), np.array([3, 1])
    ours = SACConfig(gamma=0.5, reward_offset=0.0)
    theirs = SACConfig(gamma=0.5, reward_offset=0.0, discount="chunk")
    assert ours.chunk_reward(rewards, steps).tolist() == [2.75, 1.0]
    assert theirs.chunk_reward(rewards, steps).tolist() == [6.0, 1.0]
    assert ours.chunk_discount(steps).tolist() == [0.125, 0.5] and theirs.chunk_discount(steps).tolist() == [0.5, 0.5]
    assert theirs.value_bounds((-1.0, 2.0), chunk=3) == (-6.0, 12.0)


def test_jitter_moves_states_by_so_many_of_their_deviations_and_nothing_else():
    sac, data = learner(jitter=0.2), batch(4096)
    sac.head.eyes.normalise.state_std.copy_(torch.tensor([1.0, 5.0, 0.1]))
    moved = sac._jittered(data)
    for before, after in ((data.inputs, moved.inputs), (data.next_inputs, moved.next_inputs)):
        away = (after["state"] - before["state"]).std(0)
        assert torch.allclose(away, 0.2 * torch.tensor([1.0, 5.0, 0.1]), rtol=0.1)
        assert after["feature"] is before["feature"]
    assert moved.latent is data.latent and moved.reward is data.reward


def test_a_learner_with_jitter_learns_from_the_jittered_batch():
    seen = []
    sac = learner(jitter=0.2)
    sac._update_actor = lambda data, alpha: seen.append(data) or {"entropy": torch.tensor(0.0)}
    data = batch()
    sac.update(data)
    assert not torch.equal(seen[0].inputs["state"], data.inputs["state"])
