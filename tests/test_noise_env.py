import dataclasses

import numpy as np
import pytest
import torch
from dsrl_vla import NoiseEnv, NoiseLayout, make_task
from dsrl_vla.errors import DsrlError
from dsrl_vla.noise import NoiseSpace
from gymnasium.utils.env_checker import check_env


@pytest.fixture
def env(fork_base):
    return NoiseEnv(fork_base, make_task("point:fork"), NoiseLayout(fork_base.spec.noise, "repeat", 1.5))


def test_it_is_a_gymnasium_environment(env):
    check_env(env, skip_render_check=True)
    assert env.render().shape == (256, 256, 3)


def test_its_action_is_the_noise_of_the_base(env, fork_base):
    seen, _ = env.reset(seed=3)
    latent = np.full(env.action_space.shape, 0.5, np.float32)
    after = env.step(latent)[0]
    task = make_task("point:fork")
    first = task.reset(seed=3)[0]
    noise = torch.full((1, 1, *fork_base.spec.noise.shape), 0.75)
    encoding = fork_base.encode({"observation.state": first["observation.state"][None], "task": [""]})
    for action in fork_base.denoise(encoding, noise)[0, 0, : fork_base.spec.executed_steps].numpy():
        task.advance(action)
    state = fork_base.spec.observation.state_dim
    assert np.array_equal(seen[:state], first["observation.state"])
    assert np.array_equal(after[:state], task.observe()["observation.state"])


def test_rewards_are_discounted_within_the_chunk_and_offset(fork_base):
    layout = NoiseLayout(fork_base.spec.noise, "repeat", 1.5)
    env = NoiseEnv(fork_base, make_task("point:fork"), layout, gamma=0.5, reward_offset=0.5)
    env.reset(seed=0)
    _, reward, _, _, info = env.step(env.action_space.sample() * 0)
    assert reward == pytest.approx(-0.5 * sum(0.5**i for i in range(info["steps"])))


def test_one_prefix_pass_per_decision(env):
    env.reset(seed=0)
    start = env.base_calls
    for decision in range(1, 4):
        env.step(env.action_space.sample())
        assert env.base_calls == start + decision


def test_what_does_not_fit_is_refused(fork_base):
    task = make_task("point:fork")
    with pytest.raises(DsrlError, match="gamma: expected above 0"):
        NoiseEnv(fork_base, task, NoiseLayout(fork_base.spec.noise, "repeat", 1.5), gamma=0.0)
    with pytest.raises(DsrlError, match="layout: expected one over the base's noise space"):
        NoiseEnv(fork_base, task, NoiseLayout(NoiseSpace(3, 2), "repeat", 1.5))


def test_a_robot_is_no_environment_of_noise(fork_base, monkeypatch):
    """Nobody would heed its operator."""
    task = make_task("point:fork")
    task.info = dataclasses.replace(task.info, live=True)
    with pytest.raises(DsrlError, match="NoiseEnv: expected a simulated task, got 'point:fork', where an operator"):
        NoiseEnv(fork_base, task)


def test_another_library_steers_it(env):
    """Stable-Baselines3's SAC, for as long as it takes to leave the base's coin flip behind."""
    sb3 = pytest.importorskip("stable_baselines3")
    play = lambda act: np.mean([_episode(env, act, seed) for seed in range(500, 530)])
    drawn = np.random.default_rng(0)
    before = play(lambda _: drawn.normal(size=env.action_space.shape).clip(-1, 1).astype(np.float32))
    model = sb3.SAC("MlpPolicy", env, seed=0, learning_starts=200, gamma=0.99**4, ent_coef=0.01, device="cpu",
                    policy_kwargs={"net_arch": [64, 64]})  # fmt: skip
    model.learn(1200)
    after = play(lambda seen: model.predict(seen, deterministic=True)[0])
    assert before < 0.75 and after >= 0.9


def _episode(env, act, seed):
    seen, over = env.reset(seed=seed)[0], False
    while not over:
        seen, _, terminated, truncated, info = env.step(act(seen))
        over = terminated or truncated
    return info["success"]


def test_a_layout_may_be_given_by_name(fork_base):
    env = NoiseEnv(fork_base, make_task("point:fork"), "chunk")
    assert env.layout == NoiseLayout(fork_base.spec.noise, "chunk", 1.5)
