"""Our update against Stable-Baselines3's own `SAC.train`, run on our networks with our weights and noise.

Where the definitions agree, losses and parameters have to. Where ours differ on purpose:

- losses: SB3 halves the squared error; ours does not. Adam does not see the factor (with its eps halved too).
- log density: SB3 adds 1e-6 inside the logarithm of tanh's slope; ours has the exact softplus form. The wrapper
  uses ours; the two are compared on their own.
- temperature: SB3's is log(alpha) (log pi + H), summed over dimensions; ours is alpha (H - H_target), per
  dimension, and is stepped last. Held fixed here; the direction of the step is compared on its own.
- entropy stays out of our target unless asked for (`backup_entropy`), targets are clamped to what the reward can
  give, gradients are clipped: all three are switched to SB3's behaviour here.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from dsrl_vla.critic import CriticConfig
from dsrl_vla.head import HeadConfig, SteeringHead
from dsrl_vla.latent_sac import LatentSAC, SACConfig
from dsrl_vla.networks import NetworkConfig
from dsrl_vla.noise import NoiseLayout, NoiseSpace
from dsrl_vla.replay import Batch

sb3 = pytest.importorskip("stable_baselines3")

GAMMA, TAU, ALPHA, LR, N = 0.95, 0.02, 0.05, 3e-4, 64
INFINITE = (-float("inf"), float("inf"))


def ours(kind, backup_entropy=True, alpha_lr=1e-12):
    torch.manual_seed(0)
    network = NetworkConfig(kind, width=32, layers=2)
    head = SteeringHead(HeadConfig(NoiseLayout(NoiseSpace(4, 2), "repeat"), 3, 0, 4, "test", "test:", network=network))
    config = SACConfig(
        gamma=GAMMA, tau=TAU, actor_lr=LR, critic_lr=LR, alpha_lr=alpha_lr, alpha_init=ALPHA, batch=N,
        backup_entropy=backup_entropy, max_grad_norm=1e9,
    )  # fmt: skip
    learner = LatentSAC(head, CriticConfig(network), config, INFINITE, seed=0)
    for module in learner.modules.values():
        module.double()  # so that only definitions can differ
    return learner


def transitions(seed):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    latent, done = draw(N, 1, 2).tanh(), (torch.rand(N, generator=g) < 0.2).float()
    return Batch({"state": draw(N, 3)}, latent, draw(N), GAMMA * (1 - done), {"state": draw(N, 3)}), done


class Actor(torch.nn.Module):
    """SB3's actor interface over our head; `generators` holds the one to draw with, by observation."""

    def __init__(self, head, generators):
        super().__init__()
        self.head, self.generators = head, generators
        self.optimizer = torch.optim.Adam(head.parameters(), LR)

    def action_log_prob(self, states):
        latent, log_prob = self.head.sample({"state": states}, self.generators[states.data_ptr()].clone_state())
        return latent.flatten(1), log_prob


class Critic(torch.nn.Module):
    """SB3's critic interface over our ensemble."""

    def __init__(self, critic):
        super().__init__()
        self.critic = critic
        trained = [p for p in critic.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained or [torch.zeros(1)], LR, eps=0.5e-8)

    def forward(self, states, actions):
        return tuple(self.critic({"state": states}, actions.view(len(actions), 1, 2)).unsqueeze(-1))


def theirs(learner):
    """A real SB3 SAC whose networks are copies of ours, and which reads its batches from `feed`."""
    model = sb3.SAC("MlpPolicy", "Pendulum-v1", gamma=GAMMA, tau=TAU, ent_coef=ALPHA, learning_rate=LR, device="cpu")
    generators, feed = {}, []
    model.actor = Actor(copy.deepcopy(learner.head), generators)
    model.critic = Critic(copy.deepcopy(learner.critic))
    model.critic_target = Critic(copy.deepcopy(learner.target))
    model.batch_norm_stats, model.batch_norm_stats_target = [], []
    model.replay_buffer = SimpleNamespace(sample=lambda *_, **__: feed.pop(0))
    model.set_logger(sb3.common.logger.Logger(folder=None, output_formats=[]))
    model.policy.set_training_mode = lambda _: None
    return model, generators, feed


def step_both(learner, model, generators, feed, seed):
    batch, done = transitions(seed)
    generator = learner.generator.clone_state()
    for inputs in (batch.next_inputs, batch.inputs):  # the order in which ours draws
        generators[inputs["state"].data_ptr()] = generator.clone_state()
        torch.randn(N, 1, 2, generator=generator)
    feed.append(
        SimpleNamespace(
            observations=batch.inputs["state"],
            next_observations=batch.next_inputs["state"],
            actions=batch.latent.flatten(1),
            rewards=batch.reward.unsqueeze(1),
            dones=done.unsqueeze(1),
            discounts=None,
        )
    )
    info = learner.update(batch)
    model.train(1, N)
    return info, {name.removeprefix("train/"): value for name, value in model.logger.name_to_value.items()}


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_losses_and_parameters_agree_after_one_and_ten_updates(kind):
    learner = ours(kind)
    model, generators, feed = theirs(learner)
    for update in range(10):
        info, log = step_both(learner, model, generators, feed, seed=update)
        assert float(info["critic_loss"]) * learner.critic.config.members / 2 == pytest.approx(
            log["critic_loss"], abs=1e-5
        )
        assert float(info["actor_loss"]) == pytest.approx(log["actor_loss"], abs=1e-5)
        if update in (0, 9):
            pairs = ((learner.head, model.actor.head), (learner.critic, model.critic.critic))
            for mine, other in (*pairs, (learner.target, model.critic_target.critic)):
                for (name, a), b in zip(mine.named_parameters(), other.parameters(), strict=True):
                    assert torch.allclose(a, b, atol=1e-5), (update, name, (a - b).abs().max())


def test_the_log_density_agrees_with_sb3s_squashed_gaussian():
    learner = ours("mlp")
    batch, _ = transitions(0)
    latent, log_prob = learner.head.sample(batch.inputs, torch.Generator().manual_seed(3))
    mean, log_std = (x.flatten(1) for x in learner.head.distribution(batch.inputs))
    distribution = sb3.common.distributions.SquashedDiagGaussianDistribution(2).proba_distribution(mean, log_std)
    assert torch.allclose(distribution.log_prob(latent.flatten(1)), log_prob, atol=1e-3)


def test_without_entropy_in_the_target_ours_differs_on_purpose():
    learner = ours("mlp", backup_entropy=False)
    model, generators, feed = theirs(learner)
    info, log = step_both(learner, model, generators, feed, seed=0)
    assert abs(float(info["critic_loss"]) - log["critic_loss"]) > 1e-4


def test_the_temperature_moves_the_same_way():
    for target_entropy in (-3.0, 0.69):
        learner = ours("mlp", alpha_lr=1e-3)
        batch, _ = transitions(0)
        with torch.no_grad():
            learner.head.network.read.bias -= 1.0  # entropy between the two
            _, log_prob = learner.head.sample(batch.inputs, torch.Generator().manual_seed(0))
        log_alpha = learner.log_alpha.detach().clone().requires_grad_()
        loss = -(log_alpha * (log_prob + 2 * target_entropy)).mean()  # SB3's, over two dimensions
        loss.backward()
        learner.config = SACConfig(**{**vars(learner.config), "target_entropy": target_entropy})
        before = float(learner.log_alpha.detach())
        learner.update(batch)
        assert (float(learner.log_alpha.detach()) - before) * float(log_alpha.grad) < 0
