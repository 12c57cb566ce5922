import os
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from dsrl_vla import SteeringHead, make_task
from dsrl_vla.collect import Collector
from dsrl_vla.episodes import run_episodes
from dsrl_vla.errors import DsrlError, UnknownNameError
from dsrl_vla.faults import Faults, TooManyFaultsError
from dsrl_vla.head import HeadConfig
from dsrl_vla.latent_sac import SACConfig
from dsrl_vla.networks import NetworkConfig
from dsrl_vla.noise import NoiseLayout
from dsrl_vla.replay import Replay
from dsrl_vla.rollout import TaskConfig, VectorTask
from dsrl_vla.sources import HeadNoise, LayoutNoise, PriorNoise, ZeroNoise
from dsrl_vla.tasks import ChunkEnv
from dsrl_vla.tasks.point import Fork
from dsrl_vla.workers.worker import _Noted

FORK = TaskConfig("point:fork", max_episode_steps=40, num_envs=4)


def outcomes(episodes):
    return {e.seed: (e.success, e.steps) for e in episodes}


def test_an_episode_is_a_function_of_its_seed(fork_base):
    source = PriorNoise(fork_base.spec.noise)
    with VectorTask(FORK, 4) as task:
        one = run_episodes(fork_base, task, source, range(12))
        two = run_episodes(fork_base, task, source, range(11, -1, -1))
        other = run_episodes(fork_base, task, source, range(12), trial=1)
    assert [e.seed for e in one] == list(range(12))
    assert outcomes(one) == outcomes(two)
    assert outcomes(one) != outcomes(other)
    assert 0 < sum(e.success for e in one) < 12


def test_sync_and_async_environments_agree(fork_base):
    source = PriorNoise(fork_base.spec.noise)
    runs = []
    for mode in ("sync", "async"):
        with VectorTask(TaskConfig("point:fork", 40, 2, mode), 4) as task:
            runs.append(outcomes(run_episodes(fork_base, task, source, range(5))))
    assert runs[0] == runs[1]


def test_every_source_gives_noise_of_the_bases_shape(fork_base, observation):
    from dsrl_vla.noise import generators
    from dsrl_vla.observation import batch

    layout = NoiseLayout(fork_base.spec.noise, "knots:2", 1.2)
    head = SteeringHead(HeadConfig.for_base(fork_base.spec, layout, NetworkConfig(width=16)))
    observations = batch([observation(fork_base, i) for i in range(3)])
    space = fork_base.spec.noise
    for source in (PriorNoise(space), PriorNoise(space, 1.2), ZeroNoise(space), LayoutNoise(layout), HeadNoise(head)):
        noise = source(observations, fork_base.encode(observations), generators([0, 1, 2]))
        assert noise.shape == (3, 1, *space.shape)
        if not (isinstance(source, PriorNoise) and source.clip is None):
            assert noise.abs().max() <= 1.2


def test_an_environment_without_a_seed_rests_and_idle_ones_play_nothing(fork_base, monkeypatch):
    stepped = []
    advance = Fork.advance
    monkeypatch.setattr(Fork, "advance", lambda self, action: stepped.append(1) or advance(self, action))
    with VectorTask(FORK, 4) as task:
        episodes = run_episodes(fork_base, task, PriorNoise(fork_base.spec.noise), range(9))
    assert len(stepped) == sum(e.steps for e in episodes)

    env = ChunkEnv(make_task("point:fork", max_episode_steps=8), 4)
    env.reset(seed=0)
    last = env.step(np.ones((4, 2), np.float32))[0]["observation.state"]
    assert env.reset()[0]["observation.state"] is last
    seen, reward, *over, _, info = env.step(np.ones((4, 2), np.float32))
    assert seen["observation.state"] is last
    assert (reward, over, info["steps"]) == (0, [False], 0)
    assert env.step(np.ones((4, 2), np.float32))[3] is False  # it has not come any nearer to its limit


def test_a_chunk_stops_where_the_episode_ends():
    env = ChunkEnv(make_task("point:fork", max_episode_steps=6), 4)
    env.reset(seed=0)
    still = np.zeros((4, 2), np.float32)
    *_, truncated, info = env.step(still)
    assert not truncated and info["steps"] == 4
    _, reward, terminated, truncated, info = env.step(still)
    assert truncated and not terminated and info["steps"] == 2
    assert reward == -2 and info["rewards"].tolist() == [-1, -1, 0, 0]


def test_a_reward_beyond_what_the_task_says_is_refused(monkeypatch):
    """0 and 1 under the defaults would make idling worth more than success."""
    monkeypatch.setattr(Fork, "advance", lambda *_: (1.0, True, True))
    env = make_task("point:fork").chunked(4)
    env.reset(seed=0)
    with pytest.raises(DsrlError, match=r"task point:fork: reward: expected within \[-1, 0\], got 1.0. Give 0.0 to"):
        env.step(np.zeros((4, 2), np.float32))


@pytest.mark.parametrize(
    ("method", "given", "words"),
    [
        ("observe", None, r"observe\(\): expected a dictionary, got NoneType"),
        ("observe", {"state": np.zeros(4)}, r"observe\(\): expected 'observation.state' in it, got state"),
        (
            "observe",
            {"observation.state": np.zeros(5)},
            r"observe\(\): observation.state: expected float32 of shape \(4,\), got float64",
        ),
        ("advance", (0.0, True), r"advance\(\): expected reward, success, terminated, got 2 values"),
    ],
)
def test_what_a_task_gives_back_is_checked(method, given, words, monkeypatch):
    monkeypatch.setattr(Fork, method, lambda *_: given)
    env = make_task("point:fork").chunked(4)
    with pytest.raises(DsrlError, match=f"task point:fork: {words}"):
        env.reset(seed=0)
        env.step(np.zeros((4, 2), np.float32))


def test_success_terminates_and_is_not_truncation():
    env = make_task("point:fork")
    env.reset(seed=0)
    env.position = env.goal - [0.0, 0.2]
    _, reward, terminated, truncated, info = env.step(np.array([0.0, 1.0]))
    assert (reward, terminated, truncated, info["success"]) == (0.0, True, False, True)


@pytest.fixture
def collector(fork_base):
    layout = NoiseLayout(fork_base.spec.noise, "repeat", 1.5)
    torch.manual_seed(0)
    head = SteeringHead(HeadConfig.for_base(fork_base.spec, layout, NetworkConfig(width=16)))
    with VectorTask(FORK, 4) as task:
        replay = Replay(5000, layout.latent_shape)
        yield Collector(fork_base, head, task, replay, sac=SACConfig(gamma=0.9, n_step=1), first_seed=0)


@pytest.mark.parametrize("how", ["waiting", "dead"])
def test_environments_that_do_not_come_to_their_end_are_ended(how):
    """Ctrl-C while one has answered and another has not; one that has died."""
    task = VectorTask(TaskConfig("point:fork", 40, 2, "async"), 4)
    task.reset([0, 1])
    processes = list(task.envs.processes)
    if how == "waiting":
        task.envs.step_async(np.zeros((2, 4, 2), np.float32))
        task.envs.parent_pipes[0].recv()
    else:
        processes[1].kill()
        with pytest.raises((EOFError, ConnectionError)):
            task.step(np.zeros((2, 4, 2), np.float32))
    start = time.monotonic()
    task.close()
    assert time.monotonic() - start < 20 and not any(process.is_alive() for process in processes)


STUCK = """
import time
import gymnasium as gym
import numpy as np

class Stuck(gym.Env):
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, width=4, **_):
        self.observation_space = gym.spaces.Box(-1, 1, (width,), np.float32)

    def reset(self, **_):
        return self.observation_space.low, {}

    def step(self, action):
        time.sleep(600)

gym.register("Stuck-v0", "stuck:Stuck")
gym.register("Wide-v0", "stuck:Stuck", kwargs={"width": 6})
"""
CHILD = """
import numpy as np
from dsrl_vla import rollout
from dsrl_vla.rollout import TaskConfig, VectorTask

if __name__ == "__main__":
    rollout._GRACE_S = 0.5
    task = VectorTask(TaskConfig("gymnasium:stuck:Stuck-v0", 40, 2, "async", more=MORE), 4)
    task.reset([0, 1])
    task.envs.step_async(np.zeros((2, 4, 2), np.float32))
    task.close()
"""


@pytest.mark.parametrize(("more", "end"), [((), 0), (("gymnasium:stuck:Wide-v0",), 1)])
def test_processes_that_heed_no_sigterm_keep_nobody_from_its_end(more, end, tmp_path):
    """A step without an end; and a vector that could not be made whole, whose error holds it to the end."""
    (tmp_path / "stuck.py").write_text(STUCK)
    (tmp_path / "child.py").write_text(CHILD.replace("MORE", repr(more)))
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(tmp_path / "child.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == end and ("same observation" in done.stderr) == bool(end), done.stderr


def test_what_is_not_finite_ends_an_episode_at_once_and_a_return_is_not_made_up(fork_base, monkeypatch):
    begin, observe, advance, stepped = Fork.begin, Fork.observe, Fork.advance, []

    def ill_advance(self, action):
        stepped.append(self.seed)
        return (float("nan"), *advance(self, action)[1:]) if self.seed == 2 else advance(self, action)

    def ill_observe(self):
        seen = observe(self)
        return seen | {"observation.state": seen["observation.state"] * np.nan} if self.seed == 3 else seen

    monkeypatch.setattr(Fork, "begin", lambda self, seed: setattr(self, "seed", seed) or begin(self, seed))
    monkeypatch.setattr(Fork, "advance", ill_advance)
    monkeypatch.setattr(Fork, "observe", ill_observe)
    prior, faults = PriorNoise(fork_base.spec.noise), Faults()
    with VectorTask(FORK, 4) as task:
        episodes = run_episodes(fork_base, task, prior, range(9), faults=faults)
        assert [e.seed for e in episodes] == list(range(9)) and faults.counts == {"episode": 2}
        assert not episodes[2].success and not episodes[3].success and episodes[2].steps == 4
        assert np.isfinite([e.reward for e in episodes]).all()
        assert 3 not in stepped and stepped.count(2) == 4
        with pytest.raises(TooManyFaultsError, match="got 2 x episode"):
            run_episodes(fork_base, task, prior, range(9), faults=Faults(2))
        task.infos = [replace(info, measure="return") for info in task.infos]
        with pytest.raises(DsrlError, match="episode of seed 3: expected finite rewards and observations, for its"):
            run_episodes(fork_base, task, prior, range(9))


def test_a_collector_that_is_resumed_counts_no_fault_twice(collector, monkeypatch):
    """It is made, and plays its first resets, before it is set to where it was."""
    observe, begin = Fork.observe, Fork.begin
    monkeypatch.setattr(Fork, "begin", lambda self, seed: begin(self, seed) or setattr(self, "ill", seed == 1))
    ill = lambda seen: seen | {"observation.state": np.full_like(seen["observation.state"], np.nan)}
    monkeypatch.setattr(Fork, "observe", lambda self: ill(observe(self)) if self.ill else observe(self))
    make = lambda: Collector(
        collector.base, collector.head, collector.task, Replay(500, (1, 2)), sac=collector.sac, first_seed=0
    )
    first = make()
    first.step(warm_up=True)
    tensors, state = first.tensors(), first.state()
    again = make()
    again.resume(tensors, state)
    assert first.faults.counts == again.faults.counts == {"reset": 1} and first.episodes == again.episodes == 5
    noted = _Noted(20)
    noted.add("reset", "at a start that is undone")
    noted.set({})
    assert noted.take() == []


def test_collected_transitions_are_linked(collector):
    """The next observation of a transition is what the next decision of that episode saw."""
    for step in range(60):
        collector.step(warm_up=step < 30)
    replay = collector.replay
    states, discounts = replay.inputs["state"], replay.discount[: replay.added]
    assert 0 < (discounts == 0).sum() < replay.added  # some episodes succeed
    for i in range(replay.added):
        now, then = replay.index[i].tolist()
        if discounts[i] == 0:
            assert now == then and replay.reward[i] > 0
        else:
            assert torch.equal(states[now, 2:], states[then, 2:])  # the goal of the same episode
            assert now != then and (states[now, :2] - states[then, :2]).norm() < 0.6
            steps = round(float(torch.log(discounts[i]) / np.log(0.9)))
            assert 1 <= steps <= 4 and replay.reward[i] == 0
    assert collector.decisions == 240
    assert abs(replay.added - 240) <= 4  # all but those still open
    assert collector.env_steps <= 960


def collected(base, head, n_step, decisions):
    """A collector that has warmed up on episodes 50 and on."""
    with VectorTask(FORK, 4) as task:
        sac = SACConfig(gamma=0.9, n_step=n_step, reward_offset=0.0)
        made = Collector(base, head, task, Replay(2000, (1, 2)), sac=sac, first_seed=50)
        for _ in range(decisions):
            made.step(warm_up=True)
    return made


def test_returns_over_three_decisions_are_what_the_single_ones_add_up_to(fork_base, collector):
    """The same episodes, collected with n_step 1 and 3: R = r + d r' + d d' r'', discount d d' d''."""
    found = {}
    for n in (1, 3):
        replay = collected(fork_base, collector.head, n, decisions=40).replay
        rows = zip(replay.index.tolist(), replay.reward.tolist(), replay.discount.tolist(), strict=True)
        found[n] = {now: (reward, discount, then) for (now, then), reward, discount in list(rows)[: replay.added]}
    single = found[1]
    assert any(discount == 0 for _, discount, _ in single.values()) and len(found[3]) > 100
    cut = 0
    for now, (reward, discount, then) in found[3].items():
        total, weight, at, taken = 0.0, 1.0, now, 0
        while taken < 3 and weight and at in single:
            own_reward, own_discount, following = single[at]
            total, weight = total + weight * own_reward, weight * own_discount
            at, taken = following, taken + 1
        assert (reward, discount) == pytest.approx((total, weight), abs=1e-5)
        assert not weight or then == at
        cut += bool(weight) and taken < 3
    assert cut  # some starts near a timeout bootstrap sooner


def test_no_return_reaches_from_an_episode_that_is_dropped_into_the_next(fork_base, collector, monkeypatch):
    begin, advance = Fork.begin, Fork.advance
    monkeypatch.setattr(Fork, "begin", lambda self, seed: begin(self, seed) or vars(self).update(seed=seed, count=0))

    def ill(self, action):
        self.count += 1
        reward, *more = advance(self, action)
        return (float("nan") if self.seed % 3 == 0 and self.count == 9 else reward), *more

    monkeypatch.setattr(Fork, "advance", ill)
    made = collected(fork_base, collector.head, 3, decisions=30)
    replay = made.replay
    goals, index = replay.inputs["state"][:, 2:], replay.index[: replay.added]
    assert made.faults.counts["episode"] > 3 and replay.added > 50
    assert torch.equal(goals[index[:, 0]], goals[index[:, 1]])


@pytest.mark.parametrize("where", ["at a timeout", "on the way"])
def test_what_the_base_sees_and_is_not_finite_is_not_learnt_from(fork_base, collector, monkeypatch, where):
    """A NaN in the feature alone, whatever the state says."""
    encode, over = fork_base._encode, []

    def ill(observations, batch):
        encoding = encode(observations, batch)
        if (where == "at a timeout") == (batch < 4) and len(over) < 3:
            over.append(batch)
            encoding = replace(encoding, feature=encoding.feature.clone())
            encoding.feature[0] = torch.nan
        return encoding

    for _ in range(9):
        collector.step(warm_up=True)
    before = collector.replay.observed
    monkeypatch.setattr(fork_base, "_encode", ill)
    for _ in range(12):
        collector.step(warm_up=True)
    monkeypatch.undo()
    assert over and collector.faults.counts == {"episode": len(over)}
    features, index = collector.replay.inputs["feature"], collector.replay.index[: collector.replay.added]
    made_up = [n for n in range(before, collector.replay.observed) if (features[n] == 0).all()]
    assert made_up and not set(made_up) & set(index.flatten().tolist())


def test_one_prefix_pass_per_decision(collector, monkeypatch):
    calls = []
    encode = collector.base._encode
    monkeypatch.setattr(collector.base, "_encode", lambda o, b: calls.append(b) or encode(o, b))
    for _ in range(25):
        collector.step(warm_up=True)
    assert calls.count(4) == 25  # the rest are last observations of episodes that timed out


def test_collection_is_repeatable(fork_base):
    runs = []
    for _ in range(2):
        layout = NoiseLayout(fork_base.spec.noise)
        torch.manual_seed(0)
        head = SteeringHead(HeadConfig.for_base(fork_base.spec, layout, NetworkConfig(width=16)))
        with VectorTask(FORK, 4) as task:
            replay = Replay(500, layout.latent_shape)
            made = Collector(fork_base, head, task, replay, sac=SACConfig(), first_seed=0)
            for step in range(30):
                made.step(warm_up=step < 10)
        runs.append(replay.tensors())
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("fork", r"task: expected '<family>:<name>'"),
        ("piont:fork", "unknown task family 'piont'. Did you mean 'point'"),
        ("point:frok", "unknown point task 'frok'. Did you mean 'fork'"),
    ],
)
def test_unknown_tasks_are_refused_with_the_nearest(uri, message):
    with pytest.raises((DsrlError, UnknownNameError), match=message):
        make_task(uri)


def test_bad_task_fields_are_named():
    with pytest.raises(DsrlError, match="task.num_envs"):
        TaskConfig(num_envs=0)
    with pytest.raises(DsrlError, match="task.vector: expected sync or async"):
        TaskConfig(vector="threads")
    with pytest.raises(DsrlError, match="task.max_episode_steps: expected 1 or more, got 0"):
        TaskConfig(max_episode_steps=0)
    with pytest.raises(DsrlError, match="task.more: expected other tasks than task.uri, each once, got point:fork"):
        TaskConfig("point:fork", more=("point:fork",))


def test_a_base_refuses_a_task_it_does_not_fit(fork_base, nano):
    info = make_task("point:fork").info
    fork_base.check_task(info)
    with pytest.raises(DsrlError, match="expected actions of width 4, got 2"):
        nano.check_task(info)
    seen = nano.spec.observation
    cameras = {name: shape or (64, 64, 3) for name, shape in seen.cameras.items()}
    info = replace(info, action_dim=4, state_dim=seen.state_dim, cameras=cameras)
    nano.check_task(info)
    for change, words in (
        ({"state_dim": 4}, f"expected a state of width {seen.state_dim}, got 4"),
        ({"cameras": {"wrist": (64, 64, 3)}}, f"expected a camera '{next(iter(cameras))}', got wrist"),
        ({"cameras": {}}, "got no camera"),
    ):
        with pytest.raises(DsrlError, match=words):
            nano.check_task(replace(info, **change))
