import gc
import subprocess
import sys

import numpy as np
import pytest
from dsrl_vla import make_task
from dsrl_vla.episodes import run_episodes
from dsrl_vla.errors import DsrlError, MissingExtraError, UnknownNameError
from dsrl_vla.rollout import TaskConfig, VectorTask
from dsrl_vla.sources import PriorNoise
from dsrl_vla.tasks.metaworld import prompts

IMAGE = "observation.images.behindGripper"


@pytest.fixture(scope="module")
def drawer():
    env = make_task("metaworld:drawer-open-v3")
    yield env
    env.close()


@pytest.fixture(scope="module")
def push():
    env = make_task("metaworld:push-v3", max_episode_steps=5)
    yield env
    env.close()


def test_a_seed_names_an_episode(drawer):
    first, _ = drawer.reset(seed=7)
    other, _ = drawer.reset(seed=8)
    again, _ = drawer.reset(seed=7)
    assert all(np.array_equal(first[k], again[k]) for k in first)
    assert not np.array_equal(first[IMAGE], other[IMAGE])


def test_fixtures_must_be_seen_and_loose_objects_are_tracked(drawer, push):
    assert (drawer.reset(seed=1)[0]["observation.state"][4:] == 0).all()
    state = push.reset(seed=1)[0]["observation.state"]
    assert np.allclose(state[4:7], push.raw[4:7]) and np.allclose(state[18:21], push.raw[36:39])


def test_observations_fit_their_space_and_pictures_their_size(drawer):
    observation, _ = drawer.reset(seed=0)
    assert drawer.observation_space.contains(observation)
    assert observation[IMAGE].std() > 10
    assert drawer.frame(128).shape == (128, 128, 3)


def test_actions_are_clipped_and_episodes_time_out(push):
    push.reset(seed=0)
    ends = []
    for _ in range(5):
        _, reward, terminated, truncated, _ = push.step(np.full(4, 9.0))
        assert reward == -1 and not terminated
        ends.append(truncated)
    assert ends == [False] * 4 + [True]


def test_every_task_has_a_prompt_of_its_own_object():
    assert len(prompts()) == 50 and len(set(prompts().values())) >= 48


def test_unknown_tasks_and_bad_limits_are_refused():
    with pytest.raises(UnknownNameError, match="Did you mean 'drawer-open-v3'"):
        make_task("metaworld:drawer-opn-v3")
    with pytest.raises(DsrlError, match="task.max_episode_steps: expected 1 to 500"):
        make_task("metaworld:push-v3", max_episode_steps=501)


def test_a_missing_simulator_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "metaworld.env_dict", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'dsrl-vla\[metaworld\]'"):
        make_task("metaworld:push-v3")


def test_a_simulator_may_be_started_before_the_base_is_loaded():
    """Triton after Mesa's LLVM is a segmentation fault, with torch's default build for Linux."""
    code = (
        "from dsrl_vla import load_base, make_task; make_task('metaworld:push-v3').reset(seed=0); load_base('nano:')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


def test_the_embedded_base_runs_on_it(nano):
    with VectorTask(TaskConfig("metaworld:drawer-open-v3", 120, 3), nano.spec.executed_steps) as task:
        nano.check_task(task.info)
        episodes = run_episodes(nano, task, PriorNoise(nano.spec.noise), range(6))
    assert all(e.success or e.steps == 120 for e in episodes)


def test_a_picture_does_not_depend_on_who_was_drawn_before():
    """These two tasks' models have the same meshes and textures, and put them on otherwise."""
    draw = lambda env: (env.begin(3), env.observe()["observation.images.behindGripper"])[1]
    alone = make_task("metaworld:button-press-wall-v3", max_episode_steps=50)
    wanted = draw(alone)
    alone.close()
    del alone
    gc.collect()
    first, second = (
        make_task(f"metaworld:button-press-{t}-v3", max_episode_steps=50) for t in ("topdown-wall", "wall")
    )
    draw(first)
    assert np.array_equal(draw(second), wanted)
    first.close()
    second.close()


def test_environments_share_a_canvas_and_pictures_are_mujocos_own():
    """Geoms out of sight are left out, and meshes uploaded once; no pixel differs from the plain renderer's."""
    import mujoco
    from dsrl_vla.tasks.metaworld import CAMERA, IMAGE_SIZE

    one, other = (make_task("metaworld:drawer-open-v3", max_episode_steps=50) for _ in range(2))
    rng = np.random.default_rng(0)
    for episode, env in enumerate((one, other, one)):
        env.begin(episode)
        for _ in range(3):
            for _ in range(8):
                env.advance(rng.uniform(-1, 1, 4))
            seen = env.observe()[f"observation.images.{CAMERA}"]
            plain = mujoco.Renderer(env.sim.model, IMAGE_SIZE, IMAGE_SIZE)
            plain.update_scene(env.sim.data, camera=CAMERA)
            for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                plain.scene.flags[flag] = 0
            assert np.array_equal(seen, plain.render())
            plain.close()
            assert env._render._out_of_sight(env.sim.data).sum() > 3
    assert one._render.canvases[IMAGE_SIZE] is other._render.canvases[IMAGE_SIZE]
    one.close()
    other.close()
