"""LeRobot's environments, made by its own factory and really stepped."""

import importlib.util

import numpy as np
import pytest
from dsrl_vla import make_task
from dsrl_vla.errors import DsrlError, MissingExtraError, UnknownNameError
from dsrl_vla.tasks.base import ChunkEnv

pytest.importorskip("lerobot.envs")


@pytest.fixture(scope="module", params=["pusht", "metaworld/drawer-open-v3"])
def task(request):
    package = {"pusht": "gym_pusht", "metaworld": "metaworld"}[request.param.partition("/")[0]]
    if not importlib.util.find_spec(package):  # an import would choose a renderer too early
        pytest.skip(f"needs {package}")
    made = make_task(f"lerobot-env:{request.param}", max_episode_steps=20)
    yield made
    made.close()


def test_observations_are_as_declared_and_change(task):
    first, _ = task.reset(seed=3)
    assert task.observation_space.contains(first)
    middle = (task.action_space.low + task.action_space.high) / 2
    after, reward, terminated, truncated, info = task.step(middle + 0.3 * (task.action_space.high - middle))
    assert task.observation_space.contains(after) and reward == -1.0 and not (terminated or truncated)
    assert not np.array_equal(first["observation.state"], after["observation.state"])
    assert not np.array_equal(first["observation.images.image"], after["observation.images.image"])
    assert info == {"success": False}


def test_an_episode_is_a_function_of_its_seed(task):
    def play(seed):
        seen, _ = task.reset(seed=seed)
        end = task.step(task.action_space.high)[0]
        return np.concatenate(
            [seen["observation.state"], end["observation.state"], end["observation.images.image"].ravel()]
        )

    first, other = play(5), play(6)
    assert np.array_equal(first, play(5)) and not np.array_equal(first, other)


def test_liberos_initial_states_go_by_the_seed(task, monkeypatch):
    """Its environment takes them in turn, whatever seed it is given: paired episodes would begin otherwise."""
    inner = task.env.unwrapped
    begun = []
    monkeypatch.setattr(inner, "init_state_id", 0, raising=False)
    reset = task.env.reset
    monkeypatch.setattr(task.env, "reset", lambda **more: begun.append(inner.init_state_id) or reset(**more))
    for seed in (7, 8, 7):
        task.begin(seed)
        inner.init_state_id += 1  # as LIBERO's reset does
    assert begun == [7, 8, 7]
    from dsrl_vla.tasks.lerobot_env import _scenes

    assert task.info.scenes is None
    monkeypatch.setattr(inner, "_init_states", [0] * 50, raising=False)
    assert _scenes(task.env) == 50  # however many seeds there are


def test_a_chunk_stops_at_the_limit_and_frames_are_for_people(task):
    env = ChunkEnv(task, 15)
    env.reset(seed=0)
    rest = np.tile((task.action_space.low + task.action_space.high) / 2, (15, 1)).astype(np.float32)
    assert env.step(rest)[4]["steps"] == 15
    _, _, terminated, truncated, info = env.step(rest)
    assert info["steps"] == 5 and truncated and not terminated
    assert task.frame(64).shape == (64, 64, 3)


def test_the_environment_says_what_to_do_and_in_which_units(task):
    if "metaworld" in task.info.uri:
        assert "drawer" in task.info.prompt.lower() and task.info.action_dim == 4
    else:
        assert task.action_space.high.tolist() == [512, 512] and task.info.action_dim == 2


@pytest.mark.parametrize(
    ("uri", "error", "words"),
    [
        ("lerobot-env:pushtt", UnknownNameError, "Did you mean 'pusht'"),
        ("lerobot-env:metaworld/drawer-opn-v3", DsrlError, "expected a task that the environment knows"),
        ("lerobot-env:metaworld/drawer-open-v3/7", DsrlError, "expected an index from 0 to 0"),
        ("lerobot-env:metaworld/drawer-open-v3/x", DsrlError, "with a number for index"),
        ("lerobot-env:isaaclab_arena", DsrlError, "runs code from the Hub"),
        ("lerobot-env:robocasa", MissingExtraError, "pip install 'lerobot"),
    ],
)
def test_what_is_missing_is_said_in_one_line(uri, error, words):
    with pytest.raises(error, match=words) as raised:
        make_task(uri)
    assert "\n" not in str(raised.value)


def test_a_package_that_asks_on_the_terminal_does_not_hang(monkeypatch):
    import lerobot.envs.factory as factory

    monkeypatch.setattr(factory, "make_env", lambda *_, **__: input("Where are the assets? "))
    with pytest.raises(DsrlError, match="got a question on the terminal"):
        make_task("lerobot-env:pusht")


def test_missing_assets_are_named(monkeypatch):
    import lerobot.envs.factory as factory

    def fail(*_, **__):
        raise FileNotFoundError("libero_tabletop_base_style.xml")

    monkeypatch.setattr(factory, "make_env", fail)
    with pytest.raises(DsrlError, match="assets on this machine, got libero_tabletop"):
        make_task("lerobot-env:pusht")
