from dataclasses import replace

import numpy as np
import pytest
import torch
from dsrl_vla.collect import Collector
from dsrl_vla.critic import CriticConfig
from dsrl_vla.errors import DsrlError
from dsrl_vla.head import HeadConfig, SteeringHead
from dsrl_vla.latent_sac import LatentSAC, SACConfig
from dsrl_vla.learners import build_learner
from dsrl_vla.networks import NetworkConfig
from dsrl_vla.noise import NoiseLayout
from dsrl_vla.noise_aliasing import NAConfig, action_critic_loss, distillation_loss
from dsrl_vla.noise_bank import ACTION, BANK_ACTION, BANK_LATENT, BankConfig
from dsrl_vla.observation import batch
from dsrl_vla.replay import Replay
from dsrl_vla.rollout import TaskConfig, VectorTask

BOUNDS = (0.0, 10.0)


@pytest.fixture(params=["na", "na-exact"])
def algorithm(request):
    return request.param


def build(base, algorithm, seed=0, bank=4, pairs=1):
    torch.manual_seed(seed)
    network = NetworkConfig(width=16, layers=1)
    head = SteeringHead(HeadConfig.for_base(base.spec, NoiseLayout(base.spec.noise, "repeat", 1.5), network))
    na = NAConfig(BankConfig(bank), pairs)
    return build_learner(algorithm, base, head, CriticConfig(network), SACConfig(batch=32), na, BOUNDS, seed)


@pytest.fixture
def collected(fork_base, algorithm):
    """A learner, and a replay that its keeper has filled."""
    learner = build(fork_base, algorithm)
    replay = Replay(1000, learner.head.layout.latent_shape)
    with VectorTask(TaskConfig("point:fork", 40, 4), fork_base.spec.executed_steps) as task:
        collector = Collector(
            fork_base, learner.head, task, replay, sac=learner.config, first_seed=0, keeper=learner.keeper()
        )
        for step in range(40):
            collector.step(warm_up=step < 20)
    learner.fit_normaliser(replay)
    return learner, replay


def test_the_scale_of_actions_is_that_of_actions(collected):
    """An observation that an episode ran out at has none: its empty row is not to count."""
    learner, replay = collected
    begun = {int(number) for number in replay.index[: len(replay), 0]}
    assert len(begun) < replay.observed and (replay.extras[ACTION][: replay.observed] == 0).flatten(1).all(1).any()
    held = replay.held(ACTION)
    assert len(held) == len(begun) and not (held == 0).flatten(1).all(1).any()
    assert torch.allclose(learner.action_critic.action_mean, held.flatten(0, 1).mean(0), atol=1e-5)


@pytest.mark.parametrize("algorithm", ["na"], indirect=True)
def test_the_bank_tells_the_truth_and_starts_with_what_was_executed(collected, fork_base):
    learner, replay = collected
    found = replay.sample(16, np.random.default_rng(0))
    latents, actions = found.extras[BANK_LATENT], found.extras[BANK_ACTION]
    assert latents.shape == (16, 5, 1, 2) and actions.shape == (16, 5, fork_base.spec.executed_steps, 2)
    assert torch.equal(latents[:, 0], found.latent) and torch.equal(actions[:, 0], found.extras[ACTION])
    assert latents.abs().max() <= 1 and latents[:, 1:].abs().max() > 0.9
    states = found.inputs["state"].numpy()
    encoding = fork_base.encode(batch([{"observation.state": s} for s in states]))
    again = fork_base.denoise(encoding, learner.head.layout.expand(latents))
    assert torch.allclose(again[:, :, : fork_base.spec.executed_steps], actions, atol=1e-5)


def test_pairs_and_values_are_those_of_the_observations_they_stand_beside(collected, fork_base, algorithm):
    """The base, asked anew about the states of the batch: none is of another row, or of the wrong end of a chunk."""
    learner, replay = collected
    found = replay.sample(16, np.random.default_rng(0))
    executed = fork_base.spec.executed_steps

    def asked(inputs, latent):
        encoding = fork_base.encode(batch([{"observation.state": state} for state in inputs["state"].numpy()]))
        return fork_base.denoise(encoding, learner.head.layout.expand(latent).unsqueeze(1))[:, 0, :executed]

    with torch.no_grad():
        inputs, latent, action = learner._pairs(found)
        assert torch.allclose(asked(inputs, latent), action, atol=1e-5)
        latent = torch.rand(found.latent.shape) * 2 - 1
        for parameter in learner.target.parameters():  # or it agrees with the critic it is a copy of
            parameter.mul_(1.1)
        value = learner._next_value(found, latent)
        if algorithm == "na":
            expected = learner.target(found.next_inputs, latent)
        else:
            expected = learner.action_target(found.next_inputs, asked(found.next_inputs, latent))
        assert torch.allclose(value, expected.amin(0), atol=1e-5)


@pytest.mark.parametrize("sign", [True, False])
@pytest.mark.parametrize("algorithm", ["na"], indirect=True)
def test_entropy_enters_the_action_critics_target_only_when_asked_for(collected, monkeypatch, sign):
    from dsrl_vla import noise_aliasing

    learner, replay = collected
    learner.config = replace(learner.config, backup_entropy=sign)
    found, seen, alpha = replay.sample(16, np.random.default_rng(0)), [], torch.tensor(0.5)
    real = noise_aliasing.action_critic_loss
    monkeypatch.setattr(noise_aliasing, "action_critic_loss", lambda c, v, *more: seen.append(v) or real(c, v, *more))
    state = learner.generator.get_state()
    learner._update_critics(found, alpha)
    learner.generator.set_state(state)
    with torch.no_grad():
        latent, log_prob = learner.head.sample(found.next_inputs, learner.draws)
    bonus = seen[0] - learner.target.value(found.next_inputs, latent)
    assert torch.allclose(bonus, -0.5 * log_prob * sign, atol=1e-5) and log_prob.abs().max() > 0.1


@pytest.mark.parametrize("algorithm", ["sac", "na", "na-exact"], indirect=True)
def test_how_often_an_update_calls_the_base(collected, fork_base, monkeypatch):
    learner, replay = collected
    calls = []
    for name in ("_encode", "_denoise"):
        real = getattr(fork_base, name)
        monkeypatch.setattr(fork_base, name, lambda *a, real=real, name=name: calls.append(name) or real(*a))
    for _ in range(5):
        learner.update(replay.sample(32, np.random.default_rng(0)))
    assert calls == (["_denoise"] * 10 if learner.__class__.__name__ == "ExactNoiseAliasing" else [])


def test_an_update_moves_every_network_and_the_noise_critic_follows_its_teacher(collected):
    learner, replay = collected
    before = {k: v.clone() for k, v in learner.tensors().items()}
    rng = np.random.default_rng(0)
    for _ in range(300):
        info = learner.update(replay.sample(32, rng))
    after = learner.tensors()
    for part in ("head.network", "average.network", "critic.network", "target.network", "action_critic.network"):
        assert any(not torch.equal(before[k], after[k]) for k in before if k.startswith(part)), part
    assert {"q", "target", "critic_loss", "distillation_loss", "entropy", "alpha"} <= set(info)
    found = replay.sample(256, rng)
    with torch.no_grad():
        inputs, latent, action = learner._pairs(found)
        taught, told = learner.action_critic(inputs, action), learner.critic(inputs, latent)
    assert torch.corrcoef(torch.stack([taught.flatten(), told.flatten()]))[0, 1] > 0.9


def test_a_saved_learner_goes_on_bit_for_bit(collected, fork_base, algorithm):
    stopped, replay = collected
    rng = lambda: np.random.default_rng(1)
    stopped.update(replay.sample(32, rng()))
    resumed = build(fork_base, algorithm, seed=5)
    resumed.load_tensors({k: v.clone() for k, v in stopped.tensors().items()}, stopped.updates)
    for learner in (stopped, resumed):
        learner.update(replay.sample(32, rng()))
    for key, value in stopped.tensors().items():
        assert torch.equal(value, resumed.tensors()[key]), key


@pytest.mark.parametrize("algorithm", ["na"], indirect=True)
def test_each_member_of_the_noise_critic_has_its_own_teacher(collected):
    learner, replay = collected
    found = replay.sample(8, np.random.default_rng(0))
    latent, action = found.extras[BANK_LATENT][:, 1], found.extras[BANK_ACTION][:, 1]
    loss, _ = distillation_loss(learner.critic, learner.action_critic, found.inputs, latent, action)
    difference = learner.critic(found.inputs, latent) - learner.action_critic(found.inputs, action)
    assert torch.allclose(loss, difference.square().mean(1).sum())
    loss.backward()
    assert all(p.grad is None for p in learner.action_critic.parameters())


@pytest.mark.parametrize("algorithm", ["na"], indirect=True)
def test_the_action_critic_bootstraps_and_keeps_to_the_reward(collected):
    learner, replay = collected
    found = replay.sample(64, np.random.default_rng(0))
    value = torch.full((64,), 3.0)
    _, info = action_critic_loss(learner.action_critic, value, found, BOUNDS)
    assert torch.allclose(info["target"], (found.reward + found.discount * 3.0).mean())
    _, info = action_critic_loss(learner.action_critic, value * 100, found, BOUNDS)
    assert info["target"] <= BOUNDS[1]


def test_pairs_are_different_ones_of_the_same_observation(fork_base):
    learner = build(fork_base, "na", bank=4, pairs=3)
    bank = torch.arange(10.0).view(2, 5, 1, 1)
    found = replay_batch(bank)
    inputs, latent, action = learner._pairs(found)
    assert latent.shape == (6, 1, 1) and torch.equal(latent * 10, action)
    rows = latent.view(2, 3)
    assert all(len(set(row.tolist())) == 3 for row in rows)
    assert torch.equal(inputs["state"][:, 0], (rows.flatten() >= 5).float())


def replay_batch(bank):
    from dsrl_vla.replay import Batch

    inputs = {"state": torch.tensor([[0.0], [1.0]])}
    extras = {BANK_LATENT: bank, BANK_ACTION: bank * 10}
    return Batch(inputs, bank[:, 0], torch.zeros(2), torch.zeros(2), inputs, extras)


def test_what_a_replay_with_a_bank_saves_comes_back(collected):
    _, replay = collected
    copy = Replay(1000, (1, 2))
    copy.load_tensors(replay.tensors(), replay.observed, replay.added)
    one, two = (r.sample(20, np.random.default_rng(3)) for r in (replay, copy))
    assert one.extras and all(torch.equal(one.extras[k], two.extras[k]) for k in one.extras)


def test_sac_keeps_nothing(fork_base):
    learner = build(fork_base, "sac")
    assert type(learner) is LatentSAC
    assert learner.keeper().observed(fork_base, None) == {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BankConfig(0), r"na\.bank\.size: expected 1 or more, got 0"),
        (lambda: BankConfig(actor_share=2.0), r"na\.bank\.actor_share"),
        (lambda: NAConfig(BankConfig(2), pairs=4), r"na\.pairs: expected from 1 to na\.bank\.size \+ 1 = 3, got 4"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(DsrlError, match=message):
        make()
