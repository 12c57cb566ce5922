"""Gymnasium's environments as tasks, and training on what is measured by its return."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from dsrl_vla import load_recipe, make_task, train
from dsrl_vla.adapters.diffusion import DiffusionMLPConfig, clone_diffusion
from dsrl_vla.card import head_card
from dsrl_vla.episodes import Episode
from dsrl_vla.errors import DsrlError, UnknownNameError
from dsrl_vla.evaluation import Measure, paired_difference, summary
from dsrl_vla.measures import YARDSTICKS, shown, shown_gain
from dsrl_vla.plots import draw_curves
from dsrl_vla.rollout import TaskConfig, VectorTask
from dsrl_vla.run_dir import Metrics
from dsrl_vla.steerability import preflight
from dsrl_vla.tables import print_evaluation
from dsrl_vla.watch import Watch

STATE = "observation.state"


class Slide(gym.Env):
    """A point on a line is paid for where it is; it dies beyond -2.05 and is cut off beyond 2.05."""

    metadata = {"render_modes": ["rgb_array"]}
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(-0.5, 0.5, (1,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = float(self.np_random.uniform(-0.1, 0.1))
        return np.array([self.x, 1.0]), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.x += 0.2 * float(action[0])
        return np.array([self.x, 1.0]), self.x, self.x < -2.05, self.x > 2.05, {}

    def render(self):
        return np.full((8, 8, 3), int(100 + 20 * self.x), np.uint8)


@pytest.fixture(scope="module", autouse=True)
def registered():
    gym.register("Slide-v0", Slide, max_episode_steps=30)
    yield
    gym.registry.pop("Slide-v0")


@pytest.fixture
def slide_folder(tmp_path):
    """A clone of somebody who goes either way."""
    rng = np.random.default_rng(0)
    episodes = []
    for _ in range(60):
        actions = np.clip(rng.choice([-0.3, 0.3]) + 0.1 * rng.standard_normal((12, 1)), -0.5, 0.5)
        states = np.stack([np.cumsum(0.2 * actions[:, 0]) - 0.2 * actions[:, 0], np.ones(12)], 1)
        episodes.append((states.astype(np.float32), actions.astype(np.float32)))
    base = clone_diffusion(episodes, DiffusionMLPConfig(2, 1, chunk=3, width=32, layers=1), steps=400)
    base.save_pretrained(tmp_path / "slide")
    return tmp_path / "slide"


def slide_recipe(folder, **sac):
    small = {"network": {"kind": "mlp", "width": 32, "layers": 1}}
    return load_recipe(
        "demo",
        {
            "base": {"uri": f"diffusion:{folder}"},
            "task": {"uri": "gymnasium:Slide-v0", "max_episode_steps": 20, "num_envs": 4},
            "noise": {"layout": "chunk"},
            "head": small,
            "critic": small,
            "sac": {"batch": 64, "reward_offset": 0.0, "n_step": 2, **sac},
            "train": {"env_steps": 2000, "learning_starts": 80, "gradient_steps": 1.0, "validate_every": 500,
                      "validation_episodes": 5, "stop_at": None, "checkpoint_every": 1000},
            "eval": {"episodes": 8, "video_episodes": 0},
        },
    )  # fmt: skip


class Plain(gym.Env):
    """As short as an environment can be: it knows nothing of pictures."""

    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, **_):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 0.0, False, False, {}


def test_an_environment_without_pictures_is_a_task_with_black_ones(monkeypatch):
    gym.register("Plain-v0", Plain)
    task = make_task("gymnasium:Plain-v0", max_episode_steps=5)
    task.reset(seed=0)
    assert task.frame(32).shape == (32, 32, 3) and not task.frame(32).any()
    with pytest.raises(DsrlError, match="task.vector async: expected an environment that a process of its own can"):
        VectorTask(TaskConfig("gymnasium:Plain-v0", 5, 2, "async"), 2)
    gym.registry.pop("Plain-v0")


def test_an_episode_is_a_function_of_its_seed():
    task = make_task("gymnasium:Hopper-v5")
    assert task.info.max_episode_steps == 1000 and (task.info.state_dim, task.info.action_dim) == (11, 3)
    seen = []
    for seed in (3, 4, 3):
        task.begin(seed)
        rewards = [task.advance(np.full(3, 0.1, np.float32))[0] for _ in range(5)]
        seen.append((task.observe()[STATE], rewards))
    assert np.array_equal(seen[0][0], seen[2][0]) and seen[0][1] == seen[2][1]
    assert not np.array_equal(seen[0][0], seen[1][0]) and seen[0][0].dtype == np.float32
    task.close()


@pytest.mark.parametrize(
    ("push", "limit", "ended"), [(-9.0, 50, "terminated"), (9.0, 50, "truncated"), (0.0, 8, "truncated")]
)
def test_death_a_cut_and_the_time_limit_are_told_apart(push, limit, ended):
    chunked = make_task("gymnasium:Slide-v0", max_episode_steps=limit).chunked(3)
    chunked.reset(seed=0)
    over, steps, total = False, 0, 0.0
    while not over:
        _, reward, terminated, truncated, info = chunked.step(np.full((3, 1), push, np.float32))
        over, steps, total = terminated or truncated, steps + info["steps"], total + reward
    assert (terminated, truncated) == (ended == "terminated", ended == "truncated") and info["success"] is False
    assert steps == (8 if push == 0 else pytest.approx(21, abs=2)) and np.sign(total) == np.sign(push or total)
    assert chunked.env.frame(16).shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("uri", "kind", "words"),
    [
        ("gymnasium:Hoper-v5", UnknownNameError, "Did you mean 'Hopper-v5'"),
        ("gymnasium:Hopper-v1", UnknownNameError, "Did you mean 'Hopper-v"),
        ("gymnasium:not a name", UnknownNameError, "unknown Gymnasium environment 'not a name'"),
        ("gymnasium:CartPole-v1", DsrlError, "action: expected a Box with one axis, got Discrete"),
    ],
)
def test_what_is_no_such_task_is_refused(uri, kind, words):
    with pytest.raises(kind, match=words):
        make_task(uri)


def test_a_name_may_leave_out_its_version_or_name_its_module():
    """What registers it is imported first; its limit is the registered one's."""
    assert make_task("gymnasium:Pendulum").info.max_episode_steps == 200
    assert make_task("gymnasium:gymnasium.envs.classic_control:Pendulum-v1").info.max_episode_steps == 200


def episodes(*returns):
    return Measure(tuple(Episode(i, False, 10, r, "t", "return") for i, r in enumerate(returns)))


def test_returns_are_measured_with_bootstrap_intervals():
    low, high = episodes(1000.0, 1200.0, 1100.0, 900.0), episodes(2000.0, 2100.0, 2200.0, 1900.0)
    written = low.to_json()
    assert written["return"] == 1050.0 and "success" not in written
    assert 900 <= written["ci95"][0] < 1050 < written["ci95"][1] <= 1200
    assert shown(written)[0] == "1050" and shown({"success": 0.5, "ci95": [0.4, 0.6]}) == ("0.50", "[0.40, 0.60]")
    assert paired_difference(low, high)["mean"] == 1000.0


def test_small_returns_are_not_rounded_away():
    found, zero = episodes(*(np.linspace(0.3, 0.45, 100))), episodes(*np.zeros(100))
    low, high = found.to_json()["ci95"]
    assert 0.36 < low < found.mean < high < 0.39
    assert shown(found.to_json()) == ("0.375", f"[{low:.3f}, {high:.3f}]")
    written = {"base": zero.to_json(), "difference": paired_difference(zero, found)}
    assert shown_gain(written)[0] == "+0.375"
    assert shown(episodes(3128.2, 3151.1, 3182.0).to_json())[0] == "3154"


def test_the_watch_judges_a_return_by_its_own_scale():
    rows = lambda *values: [{"env_steps": 1000 * (i + 1), "validation_return": v} for i, v in enumerate(values)]
    watch = Watch(-0.5, 10, 10_000, YARDSTICKS["return"])
    assert not [w for row in rows(-300.0, 1100.0, 1000.0, 2000.0, 1800.0, 1900.0) for w in watch.see(row)]
    assert "validation return fell to 900 from its best, 2000" in watch.see({"env_steps": 7000} | rows(900.0)[0])[0]
    watch = Watch(-0.5, 10, 3000, YARDSTICKS["return"])
    said = [w for row in rows(1100.0, 1000.0, 1120.0) for w in watch.see(row)]
    assert len(said) == 1 and "validation return has not risen (first 1100, best 1100)" in said[0]


def test_a_head_is_trained_chosen_and_shown_by_return(slide_folder, tmp_path, capsys):
    run = train(slide_recipe(slide_folder), tmp_path / "run")
    result = run.evaluation
    assert result["steered"]["return"] > result["base"]["return"] + 2 and "success" not in result["base"]
    rows = Metrics(tmp_path / "run" / "metrics.jsonl").rows()
    assert max(r["validation_return"] for r in rows if "validation_return" in r) > result["base"]["return"]
    assert not any("success" in key for row in rows for key in row)
    print_evaluation(result)
    assert "return" in capsys.readouterr().out and "steered" in summary(result)
    draw_curves(tmp_path / "c.png", rows, result)
    assert shown_gain(result)[0].startswith("+") and (tmp_path / "c.png").stat().st_size > 1000
    assert "| noise | return | 95 % interval |" in head_card(run.head.config, tmp_path / "run")


def test_preflight_and_stop_at_want_success(slide_folder, tmp_path):
    recipe = slide_recipe(slide_folder)
    with VectorTask(TaskConfig("gymnasium:Slide-v0", 20, 2), 3) as task, pytest.raises(DsrlError, match="can succeed"):
        preflight(recipe.base.load(), task)
    from dataclasses import replace

    with pytest.raises(DsrlError, match="train.stop_at: expected none for gymnasium:Slide-v0"):
        train(replace(recipe, train=replace(recipe.train, stop_at=0.9)), tmp_path / "run")


def test_terminal_timeouts_leave_nothing_to_bootstrap(slide_folder, tmp_path):
    """The reference takes an episode that ran out of time for one that ended; here that is a field."""
    from dsrl_vla.collect import Collector
    from dsrl_vla.head import HeadConfig, SteeringHead
    from dsrl_vla.replay import Replay

    base = slide_recipe(slide_folder).base.load()
    last = {}
    for timeouts in ("bootstrap", "terminal"):
        recipe = slide_recipe(slide_folder, timeouts=timeouts, n_step=1)
        layout = recipe.noise.over(base.spec.noise)
        torch.manual_seed(0)
        head = SteeringHead(HeadConfig.for_base(base.spec, layout, recipe.head.network))
        replay = Replay(100, layout.latent_shape)
        with VectorTask(recipe.task, base.spec.executed_steps) as task:
            collector = Collector(base, head, task, replay, sac=recipe.sac, first_seed=1)
            for _ in range(8):  # 20 steps in chunks of 3, the last of 2
                collector.step(warm_up=True)
        last[timeouts] = replay.discount[: replay.added].tolist()
    assert last["terminal"].count(0.0) == 4 and 0.0 not in last["bootstrap"]
    assert min(last["bootstrap"]) == pytest.approx(0.99**3)
