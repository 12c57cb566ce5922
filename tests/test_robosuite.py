"""robosuite's real simulator; left out where it is not installed (it holds numpy below 2)."""

import importlib.util

import numpy as np
import pytest
from dsrl_vla import make_task
from dsrl_vla.errors import DsrlError, MissingExtraError, UnknownNameError

INSTALLED = importlib.util.find_spec("robosuite") is not None
needs_robosuite = pytest.mark.skipif(not INSTALLED, reason="robosuite is not installed")


@pytest.fixture(scope="module")
def lift():
    env = make_task("robosuite:Lift", max_episode_steps=60)
    yield env
    env.close()


def roll(env, seed, steps=10):
    env.begin(seed)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        env.advance(rng.uniform(-1, 1, 7))
    return env.observe()["observation.state"]


@pytest.mark.skipif(INSTALLED, reason="robosuite is installed")
def test_without_robosuite_the_extra_is_named():
    with pytest.raises(MissingExtraError, match=r"dsrl-vla\[robosuite\]"):
        make_task("robosuite:Lift")


@needs_robosuite
def test_a_seed_names_an_episode_dynamics_included(lift):
    first, other, again = (roll(lift, seed) for seed in (3, 4, 3))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@needs_robosuite
def test_the_state_is_robomimics(lift):
    lift.begin(5)
    state, data = lift.observe()["observation.state"], lift.sim
    assert state.shape == (19,) and state.dtype == np.float32
    hand, cube = state[:3], state[9:12]
    assert np.allclose(cube, data.sim.data.body_xpos[data.cube_body_id], atol=1e-4)
    assert np.allclose(state[16:19], hand - cube, atol=1e-4)


@needs_robosuite
def test_the_operator_lifts_and_success_ends_the_episode(lift):
    lift.begin(100_000)
    act, rewards, success = lift.expert(), [], False
    while not success and len(rewards) < 60:
        reward, terminated, success = lift.advance(act(0.0))
        rewards.append(reward)
    assert success and terminated and set(rewards[:-1]) == {-1.0} and rewards[-1] == 0.0


@needs_robosuite
@pytest.mark.parametrize(
    ("seed", "shift"),
    [(0, 0.0), (100_901, 0.0), (100_902, 0.0), (0, 0.045)],
    ids=["handle-ahead", "handle-left", "handle-right", "mis-calibrated"],
)
def test_the_operator_threads_the_nut_unless_it_sees_it_elsewhere(seed, shift):
    env = make_task("robosuite:Square", max_episode_steps=180)
    env.begin(seed)
    act, steps, success = env.expert(), 0, False
    while not success and steps < 180:
        success = env.advance(act(shift))[1]
        steps += 1
    env.close()
    assert success == (shift == 0.0)


@needs_robosuite
def test_names_and_options_are_checked():
    with pytest.raises(UnknownNameError, match="Lift"):
        make_task("robosuite:Lifft")
    with pytest.raises(UnknownNameError, match="agentview"):
        make_task("robosuite:Lift?cameras=agentveiw")
    with pytest.raises(DsrlError, match="image_size"):
        make_task("robosuite:Lift?image_size=0")
