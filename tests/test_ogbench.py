import sys

import numpy as np
import pytest
from dsrl_vla import make_task
from dsrl_vla.errors import DsrlError, MissingExtraError, UnknownNameError
from dsrl_vla.nano.clone import CloneConfig, clone
from dsrl_vla.nano.demos import DemoConfig, collect
from dsrl_vla.nano.model import NanoConfig

IMAGE = "observation.images.front_pixels"


@pytest.fixture(scope="module")
def cube():
    env = make_task("ogbench:cube-single-task2", max_episode_steps=100)
    yield env
    env.close()


def roll(env, seed, steps=12):
    env.begin(seed)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        env.advance(rng.uniform(-1, 1, 5))
    return env.observe()


def test_a_seed_names_an_episode_dynamics_included(cube):
    first, other, again = (roll(cube, seed) for seed in (3, 4, 3))
    assert all(np.array_equal(first[k], again[k]) for k in first)
    assert not np.array_equal(first["observation.state"], other["observation.state"])
    assert not np.array_equal(first[IMAGE], other[IMAGE])


def test_observations_fit_and_hold_the_target(cube):
    observation, _ = cube.reset(seed=0)
    assert cube.observation_space.contains(observation) and cube.info.state_dim == 31
    goal = observation["observation.state"][-3:] / 10 + [0.425, 0, 0]
    assert np.allclose(goal, cube.sim.cur_task_info["goal_xyzs"][0], atol=1e-6)
    assert cube.frame(300).shape == (300, 300, 3) and cube.frame().std() > 10


@pytest.mark.parametrize(("name", "widest"), [("cube-single-task5", 100), ("cube-double-task1", 200)])
def test_the_expert_succeeds_and_a_miscalibrated_one_does_not(name, widest):
    env = make_task(f"ogbench:{name}", max_episode_steps=widest)
    won = {0.0: False, 0.08: False}
    for shift in won:
        env.begin(0)
        expert = env.expert()
        assert env.whereabouts().shape == (6,)
        for _ in range(widest):
            reward, success, terminated = env.advance(expert(shift))
            assert reward == success - 1.0 and terminated == success
            won[shift] |= success
            if success:
                break
    env.close()
    assert won == {0.0: True, 0.08: False}


def test_a_nano_base_is_cloned_on_it():
    demos = collect(DemoConfig(tasks=("ogbench:cube-single-task2",), episodes=1, max_episode_steps=30, offset=0.03))
    sizes = NanoConfig(vision_width=32, vision_layers=1, vlm_width=32, expert_width=32, layers=2, heads=2, head_dim=16)
    model, tokenizer, statistics = clone(demos, CloneConfig(steps=3, batch=4, draws=1), sizes)
    assert statistics.cameras == ("front_pixels",) and len(statistics.actions_mean) == 5
    assert tokenizer.unk_token_id not in tokenizer(demos.prompts[0])["input_ids"]
    assert model.config.chunk_size == 8


def test_tasks_of_two_families_have_no_camera_in_common():
    with pytest.raises(DsrlError, match="demos.tasks: expected tasks seen by the same camera"):
        collect(DemoConfig(("ogbench:cube-single-task1", "metaworld:push-v3"), episodes=1, max_episode_steps=2))
    with pytest.raises(DsrlError, match=r"demos.tasks\[0\]: expected a task with an expert"):
        collect(DemoConfig(("point:fork",), episodes=1))


def test_unknown_tasks_and_a_missing_package_are_refused(monkeypatch):
    with pytest.raises(UnknownNameError, match="Did you mean 'cube-single-task"):
        make_task("ogbench:cube-singel-task2")
    with pytest.raises(DsrlError, match="task.max_episode_steps"):
        make_task("ogbench:cube-single-task2", max_episode_steps=0)
    monkeypatch.setitem(sys.modules, "ogbench.manipspace.envs.cube_env", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'dsrl-vla\[ogbench\]'"):
        make_task("ogbench:cube-single-task2")
