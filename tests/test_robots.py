"""Robots as tasks: guards, pacing, operators, the loop, its journal. The robot is a simulated task's, for real."""

import json
import os
import pty
import sys
from pathlib import Path
from time import sleep

import numpy as np
import pytest
import torch
import yaml
from dsrl_vla.errors import DsrlError, UnknownNameError
from dsrl_vla.robots.config import read_robot_file
from dsrl_vla.robots.connect import make
from dsrl_vla.robots.guards import Guards, GuardsConfig
from dsrl_vla.robots.operators import ScriptedOperator, TeleopOperator, Unattended
from dsrl_vla.robots.pacing import Pacer
from dsrl_vla.robots.rehearsal import TaskRobot, place
from dsrl_vla.robots.rewards import ByFunction, ByKey
from dsrl_vla.robots.rig import Rig
from dsrl_vla.robots.task import RobotTask
from dsrl_vla.robots.terminal import TerminalOperator
from dsrl_vla.tasks.live import Ending

FREE = GuardsConfig(limits={"a*": [-1.0, 1.0]}, rest={"a*": 0.0}, hold_after_s=60)


class Time:
    """A clock that passes only while somebody sleeps, or works."""

    def __init__(self):
        self.now = 0.0

    def sleep(self, seconds):
        self.now += seconds


class Arm:
    """Joints that go where they are told, as a position-controlled arm's do."""

    observation_features = {"x.pos": float, "y.pos": float, "front": (4, 6, 3)}
    action_features = {"x.pos": float, "y.pos": float}

    def __init__(self):
        self.at, self.is_connected, self.commands = {"x.pos": 0.0, "y.pos": 10.0}, False, []

    def connect(self, calibrate=True):
        self.is_connected = True

    def get_observation(self):
        return dict(self.at) | {"front": np.full((4, 6, 3), 7, np.uint8)}

    def send_action(self, action):
        self.commands.append(action)
        self.at.update(action)
        return action

    def disconnect(self):
        self.is_connected = False


class Hand:
    """A person at a teleoperator who always wants the same."""

    is_connected = False
    action_features = {"a0.vel": float, "a1.vel": float}

    def connect(self):
        self.is_connected = True

    def disconnect(self): ...

    def get_action(self):
        return {"a1.vel": 0.5, "a0.vel": -0.25}


def arm_guards(**more):
    return GuardsConfig(**{"limits": {"*.pos": [-20, 20]}, "max_step": {"x.*": 5, "*": 1}} | more)


def live(script=(), limit=10, fps=1000, teleop=True, reward=None, dry_run=False):
    """A robot task over ``point:fork`` and its clock."""
    time = Time()
    rig = Rig(TaskRobot("point:fork"), FREE, Hand() if teleop else None, dry_run=dry_run)
    lines = [dict(zip(("episode", "step", "say"), line, strict=True)) for line in script]
    pacer = Pacer(fps, lambda: time.now, time.sleep)
    task = RobotTask("robot:test", "go", limit, rig, ScriptedOperator(lines), reward or ByKey(), pacer, place)
    return task, time


def north(count=4):
    return np.tile(np.array([0.0, 0.5], np.float32), (count, 1))


def test_guards_stand_behind_limits_and_steps():
    guards = Guards(arm_guards(), ["x.pos", "y.pos"], ["x.pos", "y.pos"])
    before = np.array([18.0, 0.0])
    assert np.allclose(guards(np.array([30.0, 9.0]), before), [20.0, 1.0])
    assert np.allclose(guards(np.array([-30.0, -0.5]), before), [13.0, -0.5])
    assert np.allclose(guards.still(before), before)
    outside = np.array([40.0, 0.0])  # already beyond a limit: back towards it, a step at a time
    assert np.allclose(guards(np.array([40.0, 0.0]), outside), [35.0, 0.0])


@pytest.mark.parametrize(
    ("config", "measured", "words"),
    [
        (arm_guards(limits={"x.pos": [-1, 1]}), True, r"guards\.limits.*'y\.pos', got None"),
        (arm_guards(limits={"*": [1, 1]}), True, r"low < high"),
        (arm_guards(max_step={"x.pos": 1}), True, r"guards\.max_step.*'y\.pos'"),
        (arm_guards(max_step={"*": 0}), True, "a positive number, got 0"),
        (arm_guards(max_step={"*": "5"}), True, "a positive number, got 5"),
        (arm_guards(limits={"*": ["-90", 90]}), True, r"\[low, high\] with low < high"),
        (arm_guards(rest={"*": "still"}), False, "guards.rest of 'x.pos': expected a number, got still"),
        (arm_guards(), False, r"guards\.rest.*'x\.pos', which the robot does not measure"),
        (arm_guards(rest={"*": 0}), True, r"guards\.rest: expected none for 'x\.pos', a measured position"),
    ],
)
def test_guards_with_a_gap_are_refused(config, measured, words):
    names = ["x.pos", "y.pos"]
    with pytest.raises(DsrlError, match=words):
        Guards(config, names, names if measured else [])


@pytest.mark.parametrize("table", ["limits", "max_step", "rest"])
def test_guards_of_an_action_that_there_is_none_of_are_refused(table):
    """A tighter limit under a mistyped name would be none."""
    config = arm_guards(**{table: getattr(arm_guards(), table) | {"y.poss": [-1, 1] if table == "limits" else 0.5}})
    with pytest.raises(UnknownNameError, match=rf"unknown action in guards\.{table} 'y\.poss'. Did you mean 'y\.pos'"):
        Guards(config, ["x.pos", "y.pos"], ["x.pos", "y.pos"])


def test_a_rig_guards_stops_and_reports_what_was_executed():
    arm = Arm()
    rig = Rig(arm, arm_guards(), cameras={"front": "base"})
    seen = rig.observe()
    assert arm.is_connected and seen["observation.state"].tolist() == [0.0, 10.0]
    assert seen["observation.images.base"].shape == rig.shapes["base"] == (4, 6, 3)
    assert rig.send(np.array([100.0, 10.5])).tolist() == [5.0, 10.5] and rig.clipped == 1
    rig.observe()
    with pytest.raises(DsrlError, match=r"action 'y\.pos': expected a finite number"):
        rig.send(np.array([0.0, np.nan]))
    assert arm.commands[-1] == {"x.pos": 5.0, "y.pos": 10.5}  # it stands where it is
    rig.close()
    assert not arm.is_connected
    with pytest.raises(DsrlError, match="cameras: expected one of the robot's: front, got 'side'"):
        Rig(Arm(), arm_guards(), cameras={"side": "base"})
    with pytest.raises(
        DsrlError, match=r"teleop: expected the robot's actions \(x\.pos, y\.pos\), got a0\.vel, a1\.vel"
    ):
        Rig(Arm(), arm_guards(), teleop=Hand())


def test_a_reading_that_is_not_a_number_is_never_sent():
    arm = Arm()
    rig = Rig(arm, arm_guards())
    rig.observe()
    rig.send(np.array([2.0, 10.0]))
    arm.at["x.pos"] = float("nan")
    rig.observe()
    assert rig.send(np.array([100.0, 10.5])).tolist() == [7.0, 10.5]  # a step from the last command
    rig.hold()
    rig.close()
    assert all(np.isfinite(list(command.values())).all() for command in arm.commands)


def test_what_has_been_moved_meanwhile_is_stopped_where_it_is():
    arm = Arm()
    rig = Rig(arm, arm_guards())
    rig.observe()
    arm.at.update({"x.pos": -80.0})  # a reset, or a person
    rig.close()
    assert arm.commands == [{"x.pos": -80.0, "y.pos": 10.0}]


def test_a_robot_that_cannot_be_seen_is_not_sent_to_an_old_place(caplog):
    arm = Arm()
    rig = Rig(arm, arm_guards())
    rig.observe()
    arm.get_observation = lambda: 1 / 0
    rig.close()
    assert arm.commands == [] and not arm.is_connected and "while disconnecting the robot" in caplog.text


def test_from_a_place_that_nobody_has_measured_nothing_is_sent():
    arm = Arm()
    arm.at["y.pos"] = float("nan")
    rig = Rig(arm, arm_guards())
    rig.observe()
    with pytest.raises(DsrlError, match=r"the robot's reading of 'y\.pos': expected a finite number, got nan"):
        rig.send(np.array([0.0, 0.0]))
    rig.close()
    assert arm.commands == [] and not arm.is_connected


def test_where_connecting_fails_nothing_is_left_connected():
    class Unplugged(Hand):
        action_features = {"x.pos": float, "y.pos": float}

        def connect(self):
            raise ConnectionError("no such port")

    arm = Arm()
    with pytest.raises(DsrlError, match="teleop: expected one that can be connected, got ConnectionError: no such"):
        Rig(arm, arm_guards(), teleop=Unplugged())
    assert not arm.is_connected


def test_the_name_itself_counts_before_a_pattern_as_in_the_readme():
    text = (Path(__file__).parents[1] / "dsrl_vla" / "robots" / "README.md").read_text()
    config = GuardsConfig(**yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])["guards"])
    names = ["shoulder.pos", "gripper.pos"]
    guards = Guards(config, names, names)
    assert guards.low.tolist() == [-90, 0] and guards.high.tolist() == [90, 100]


class Wheels(Arm):
    """An arm on wheels, whose speed is measured too, as LeKiwi's is."""

    observation_features = {"x.pos": float, "theta.vel": float}
    action_features = {"x.pos": float, "theta.vel": float}

    def __init__(self):
        super().__init__()
        self.at = {"x.pos": 0.0, "theta.vel": 0.0}


class Gripper(Arm):
    """A base on wheels with a gripper; neither is measured."""

    observation_features = {"front": (4, 6, 3)}
    action_features = {"x.vel": float, "gripper": float}

    def __init__(self):
        super().__init__()
        self.at = {}


def test_a_speed_that_is_measured_is_stopped_and_not_kept():
    wheels, guards = Wheels(), arm_guards(limits={"*": [-20, 20]}, rest={"*.vel": 0.0})
    rig = Rig(wheels, guards)
    rig.observe()
    rig.send(np.array([1.0, 0.5]))
    rig.observe()
    rig.hold()
    rig.close()
    assert wheels.commands == [{"x.pos": 1.0, "theta.vel": 0.5}] + [{"x.pos": 1.0, "theta.vel": 0.0}] * 2
    with pytest.raises(DsrlError, match=r"what stands still for 'theta\.vel', which is a velocity"):
        Rig(Wheels(), arm_guards(limits={"*": [-20, 20]}))


def test_a_robot_that_cannot_be_seen_any_more_is_told_to_rest_where_it_was_sent():
    wheels, guards = Wheels(), arm_guards(limits={"*": [-20, 20]}, rest={"*.vel": 0.0})
    rig = Rig(wheels, guards)
    rig.observe()
    rig.send(np.array([1.0, 0.5]))
    wheels.get_observation = lambda: 1 / 0  # a camera times out
    rig.close()
    assert wheels.commands[1:] == [{"x.pos": 1.0, "theta.vel": 0.0}] and not wheels.is_connected
    moved = Wheels()
    rig = Rig(moved, guards)
    rig.observe()
    rig.send(np.array([1.0, 0.0]))
    rig.moved()  # since then by a reset: its last target would be a leap
    moved.get_observation = wheels.get_observation
    rig.close()
    assert len(moved.commands) == 1


def at_rest(wheels):
    """Wait, ten seconds at most, until they have been told to rest."""
    for _ in range(1000):
        if wheels.commands[-1]["theta.vel"] == 0.0:
            return
        sleep(0.01)


def test_wheels_stop_while_nobody_says_anything(caplog):
    """A base that thinks for long, or a server that does not answer: a velocity would stay in force."""
    wheels, guards = Wheels(), arm_guards(limits={"*": [-20, 20]}, rest={"*.vel": 0.0}, hold_after_s=0.05)
    rig = Rig(wheels, guards)
    rig.observe()
    for _ in range(2):
        rig.send(np.array([1.0, 0.5]))
        at_rest(wheels)
    assert wheels.commands == [{"x.pos": 1.0, "theta.vel": 0.5}, {"x.pos": 1.0, "theta.vel": 0.0}] * 2
    assert caplog.text.count("no command for 0.05 s") == 2
    fails, real = [1, 1], wheels.send_action

    def send(action):
        if action["theta.vel"] == 0.0 and fails:
            raise OSError(f"no answer {fails.pop()}")
        return real(action)

    wheels.send_action = send
    rig.send(np.array([1.0, 0.5]))
    at_rest(wheels)  # it is tried until it is heard
    rig.close()
    assert not fails and wheels.commands[-1]["theta.vel"] == 0.0
    with pytest.raises(DsrlError, match=r"guards.hold_after_s: expected seconds, above 0 and finite, got 0"):
        arm_guards(hold_after_s=0)


def test_a_command_in_time_is_not_cancelled_and_one_to_a_robot_at_rest_is_not_sent():
    wheels, guards = Wheels(), arm_guards(limits={"*": [-20, 20]}, rest={"*.vel": 0.0}, hold_after_s=60)
    rig = Rig(wheels, guards)
    rig.observe()
    rig.send(np.array([1.0, 0.5]))
    assert rig._standstill._due is not None
    rig.hold()
    assert rig._standstill._due is None
    rig.close()
    assert [each["theta.vel"] for each in wheels.commands] == [0.5, 0.0, 0.0]
    grip = {"*": 0.0}  # what is not measured has a rest, too; but it may hold something
    rig = Rig(Gripper(), arm_guards(limits={"*": [-20, 20]}, rest=grip, hold_after_s=60))
    rig.observe()
    rig.send(np.array([0.5, 1.0]))
    rig._let_go()
    rig.close()
    assert rig.robot.commands[1] == {"x.vel": 0.0, "gripper": 1.0}


@pytest.mark.usefixtures("at_a_terminal")
@pytest.mark.parametrize(("signals", "holds"), [(1, True), (2, True), (3, False)])
def test_whoever_presses_ctrl_c_again_does_not_keep_the_robot_from_being_stopped(signals, holds, caplog):
    """From the third on they do: what hangs is to end some time. It is disconnected even then."""
    import signal

    arm = Arm()
    rig, look = Rig(arm, arm_guards()), arm.get_observation
    rig.observe()

    def looking():
        for _ in range(signals):
            signal.raise_signal(signal.SIGINT)
        return look()

    arm.get_observation = looking
    rig.close()
    assert bool(arm.commands) is holds and not arm.is_connected
    assert caplog.text.count("the robot is being stopped") == signals


def test_a_dry_run_sends_nothing():
    arm = Arm()
    rig = Rig(arm, arm_guards(), dry_run=True)
    rig.observe()
    assert rig.send(np.array([100.0, 10.0])).tolist() == [5.0, 10.0]
    rig.hold()
    assert arm.commands == []


def test_steps_keep_their_rate_and_late_ones_are_counted():
    time = Time()
    pacer = Pacer(10, lambda: time.now, time.sleep)
    pacer.start()
    for _ in range(3):
        time.now += 0.04  # work within the period
        pacer.wait()
    assert time.now == pytest.approx(0.3) and pacer.late == 0
    time.now += 0.25
    pacer.wait()
    assert pacer.late == 1
    pacer.wait()
    assert time.now == pytest.approx(0.65)  # timed from the late one, no rush to catch up
    time.now += 1.0  # the base thinks
    pacer.start()
    pacer.wait()
    assert pacer.report() == {"ticks": 6, "late": 1, "pauses": 1, "mean_pause_s": 1.0, "longest_pause_s": 1.0}
    with pytest.raises(DsrlError, match="fps: expected a positive rate, got 0"):
        Pacer(0)


def test_keys_at_a_terminal():
    master, slave = pty.openpty()
    with os.fdopen(slave, "r") as stream:
        operator = TerminalOperator(stream)
        assert operator.hear().ending is None
        os.write(master, b"xt")
        assert operator.hear().human
        os.write(master, b"r")
        said = operator.hear()
        assert said.ending is Ending.REDO and said.human
        os.write(master, b"s\n")
        assert operator.hear().ending is Ending.SUCCESS
        os.write(master, b"zz\n")
        read = operator._keys  # what was typed before the question does not answer it
        answers = iter(["zz\n", "", "\n"])
        operator._keys = lambda wait=0.0: next(answers)
        operator.ready("ready?")
        operator._keys = read
        assert not operator.human
        operator.close()
    os.close(master)


def test_without_a_terminal_the_way_out_is_named(tmp_path):
    with (tmp_path / "no-terminal").open("w+") as stream, pytest.raises(DsrlError, match="operator: none"):
        TerminalOperator(stream)


class Pad(Hand):
    """Buttons alone."""

    action_features = {"dtype": "float32", "shape": (3,), "names": {"delta_x": 0, "delta_y": 1, "delta_z": 2}}
    made: list = []

    def __init__(self):
        self.events = {}
        Pad.made.append(self)

    def get_teleop_events(self):
        return self.events

    def disconnect(self):
        self.is_connected = False


def test_buttons_of_a_device_beside_the_leader_arm(tmp_path):
    """LeRobot's gamepad and keyboard have words, and no joints; its leader arms joints, and no words."""
    pad = {"factory": f"{__name__}:Pad"}
    path = write_file(tmp_path, operator="teleop", events=pad)
    with pytest.raises(DsrlError, match="a terminal to read keys from"):  # who says that the scene is ready
        make(str(path))
    assert not Pad.made[-1].is_connected
    with pytest.raises(DsrlError, match="get_teleop_events .*got Hand. Name one under events:"):
        make(str(write_file(tmp_path, operator="teleop")))
    with pytest.raises(DsrlError, match="got none. A device for its buttons alone goes under events:"):
        make(str(write_file(tmp_path, operator="teleop", teleop=pad)))


def test_words_from_a_teleoperators_buttons():
    pad = Pad()
    operator = TeleopOperator(pad, Unattended)
    for events, ending in (
        ({"success": True, "terminate_episode": True}, Ending.SUCCESS),
        ({"terminate_episode": True}, Ending.FAILURE),
        ({"rerecord_episode": True, "terminate_episode": True}, Ending.REDO),
        ({"is_intervention": True}, None),
    ):
        pad.events = events
        said = operator.hear()
        assert said.ending is ending and said.human is ("is_intervention" in events)
    assert pad.is_connected
    operator.close()
    assert not pad.is_connected
    with pytest.raises(DsrlError, match="get_teleop_events"):
        TeleopOperator(Hand(), Unattended)


def test_a_scripts_words_are_checked():
    with pytest.raises(DsrlError, match="success, failure, cut, discard, redo, take-over"):
        ScriptedOperator([{"episode": 0, "step": 1, "say": "sucess"}])


def test_a_chunk_ends_where_the_hands_change():
    task, _ = live([(0, 2, "take-over"), (0, 6, "take-over")], limit=40)
    env = task.chunked(4)
    env.reset(seed=0)
    _, _, _, _, info = env.step(north())
    assert (info["steps"], info["human"]) == (2, False) and env.human
    assert np.allclose(info["executed"], north())  # the last action is held beyond the steps
    _, _, _, _, info = env.step(np.full((4, 2), np.nan, np.float32))
    assert (info["steps"], info["human"]) == (3, True)
    assert np.allclose(info["executed"], [-0.25, 0.5]) and not env.human
    _, _, _, _, info = env.step(np.full((4, 2), np.nan, np.float32))
    assert info["steps"] == 0  # nobody chose: neither a person nor the policy
    assert env.taken()["human"].tolist() == [False] * 2 + [True] * 3
    assert np.allclose(env.taken()["action"][2:], [-0.25, 0.5])


@pytest.mark.parametrize(("word", "reward"), [("success", 0.0), ("failure", -7.0), ("cut", -1.0), ("redo", -1.0)])
def test_an_episode_ends_by_the_operators_word(word, reward):
    task, _ = live([(0, 4, word)])  # heard before the chunk and after each of its steps
    env = task.chunked(6)
    env.reset(seed=0)
    _, _, terminated, truncated, info = env.step(north(6))
    assert info["steps"] == 4 and info["rewards"][3] == reward and info["ending"] == word
    assert terminated is (word in ("success", "failure")) and truncated is not terminated
    assert info["success"] is (word == "success")
    assert task.rig.robot.sent == 5  # four actions, and to stand still


def test_what_is_said_while_the_base_thinks_judges_the_step_before():
    task, _ = live([(0, 3, "success")])
    env = task.chunked(2)
    env.reset(seed=0)
    assert env.step(north(2))[4]["rewards"].tolist() == [-1, -1]
    _, _, terminated, _, info = env.step(north(2))
    assert terminated and info["steps"] == 0 and info["rewards"][0] == 1.0  # more than the step before had brought
    assert task.taken()["reward"].tolist() == [-1, 0] and task.taken()["success"].tolist() == [False, True]


def test_taking_over_without_a_teleoperator_is_said_and_ignored(caplog):
    task, _ = live([(0, 0, "take-over")], teleop=False)
    env = task.chunked(2)
    env.reset(seed=0)
    assert env.step(north(2))[4]["human"] is False
    assert "no teleoperator" in caplog.text


def test_rewards_by_function():
    def near(observation, action):
        gone = float(observation["observation.state"][1])
        return min(0.0, gone - 1.0), gone > 0.09

    task, _ = live(reward=ByFunction(near))
    env = task.chunked(4)
    env.reset(seed=0)
    _, _, terminated, _, info = env.step(north(4))
    assert terminated and info["steps"] == 2 and info["success"]
    assert info["rewards"][:2] == pytest.approx([-0.95, -0.9])
    assert task.taken()["reward"].tolist() == info["rewards"][:2].tolist()
    with pytest.raises(DsrlError, match=r"reward: expected a number within reward_range \[-1.0, 0.0\], got 3"):
        ByFunction(lambda o, a: 3)({}, north(1))


def test_an_evaluation_plays_void_episodes_again_and_credits_no_person(fork_base, tmp_path, monkeypatch):
    from dsrl_vla.episodes import run_episodes
    from dsrl_vla.rollout import TaskConfig, VectorTask
    from dsrl_vla.sources import PriorNoise

    script = [(0, 3, "redo"), (1, 5, "success"), (2, 2, "take-over"), (2, 6, "success"), (3, 1, "discard")]
    path = write_file(tmp_path, script)
    with VectorTask(TaskConfig(f"robot:{path}", 12, num_envs=1), 4) as task:
        done = run_episodes(fork_base, task, PriorNoise(fork_base.spec.noise), [5, 6, 7])
    assert [(e.seed, e.success) for e in done] == [(5, True), (6, False), (7, False)]
    assert done[0].steps == 4 and done[2].steps == 12
    assert done[0].reward == -3.0  # the word came while the base was thinking, and judges the fourth step


@pytest.mark.parametrize("more", [{"num_envs": 2}, {"num_envs": 1, "vector": "async"}])
def test_one_robot_is_one_environment(tmp_path, more):
    from dsrl_vla.robots import connect
    from dsrl_vla.rollout import TaskConfig, VectorTask

    path = write_file(tmp_path, [(99, 0, "cut")], teleop={})  # another process need not find this module's
    with pytest.raises(DsrlError, match="num_envs 1 and vector sync, for there is one robot"):
        VectorTask(TaskConfig(f"robot:{path}", 12, **more), 4)
    assert not connect._open


def test_what_no_base_should_say_stops_the_robot(fork_base, tmp_path, monkeypatch):
    """NaN also stands for "nobody chose", which waits for a person: a base's own must not."""
    from dsrl_vla.episodes import run_episodes
    from dsrl_vla.rollout import TaskConfig, VectorTask
    from dsrl_vla.sources import PriorNoise

    told = []
    monkeypatch.setattr(TaskRobot, "send_action", lambda self, action: told.append(action))
    monkeypatch.setattr(type(fork_base), "_denoise", lambda self, encoding, noise: noise[..., :2] * np.nan)
    path = write_file(tmp_path, [(99, 0, "cut")])
    with VectorTask(TaskConfig(f"robot:{path}", 12, num_envs=1), 4) as task:
        with pytest.raises(DsrlError, match="the base's actions: expected finite numbers"):
            run_episodes(fork_base, task, PriorNoise(fork_base.spec.noise), [0])
        assert told == [{"a0.vel": 0.0, "a1.vel": 0.0}]


def test_a_robots_rollouts_are_not_recorded_as_a_simulations_are(fork_base, tmp_path):
    from dsrl_vla.recording import record
    from dsrl_vla.robots import connect
    from dsrl_vla.rollout import TaskConfig
    from dsrl_vla.sources import PriorNoise

    config = TaskConfig(f"robot:{write_file(tmp_path, [(99, 0, 'cut')])}", 12, num_envs=1)
    with pytest.raises(DsrlError, match="record: expected a simulated task.*in the run's journal: dsrl-vla export"):
        next(record(fork_base, config, PriorNoise(fork_base.spec.noise), [0]))
    assert not connect._open


def write_file(folder, script=(), **more):
    tree = {
        "robot": {"factory": "dsrl_vla.robots.rehearsal:TaskRobot", "uri": "point:fork"},
        "prompt": "go",
        "fps": 2000,
        "operator": "none",
        "teleop": {"factory": f"{__name__}:Hand"},
        "reset": "dsrl_vla.robots.rehearsal:place",
        "guards": {"limits": {"a*": [-1, 1]}, "rest": {"a*": 0.0}, "hold_after_s": 60},
        "script": [dict(zip(("episode", "step", "say"), line, strict=True)) for line in script],
    }
    sys.modules.setdefault(__name__, sys.modules[Hand.__module__])
    path = Path(folder) / "robot.yaml"
    path.write_text(yaml.safe_dump(tree | more))
    return path


def test_two_tasks_share_one_connection(tmp_path):
    path = write_file(tmp_path, [(99, 0, "cut")])
    one, two = make(str(path)), make(str(path))
    robot = one.rig.robot
    assert one.rig is two.rig and robot.is_connected
    one.close()
    assert robot.is_connected
    two.close()
    assert not robot.is_connected


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"fsp": 30}, r"unknown key of .*robot.yaml: 'fsp'. Did you mean 'fps'"),
        ({"robot": {"factory": "nowhere:Robot"}}, "robot.factory: expected an importable"),
        ({"operator": "nobody"}, "operator: expected terminal, teleop, none or"),
        ({"reward_range": [0]}, r"reward_range: expected \[least, greatest\]"),
        ({"imports": ["no_such_module"]}, "imports: expected modules that can be imported"),
        ({"guards": {"limits": {}}}, "guards.limits: expected"),
    ],
)
def test_a_wrong_file_is_refused_in_words(tmp_path, more, words):
    with pytest.raises(DsrlError, match=words):
        make(str(write_file(tmp_path, **more)))


@pytest.mark.parametrize(
    "more", [{"reset": "nowhere:home"}, {"operator": "test_robots:no_operator"}, {"operator": "teleop"}]
)
def test_a_file_that_is_refused_leaves_nothing_connected(tmp_path, monkeypatch, more):
    from dsrl_vla.robots import connect

    robots, plug = [], TaskRobot.connect
    monkeypatch.setattr(TaskRobot, "connect", lambda self, *a: (robots.append(self), plug(self, *a)))
    monkeypatch.setattr(connect, "_open", {})
    monkeypatch.setattr("sys.stdin", None)  # a terminal operator would fail here, after the fact
    path = write_file(tmp_path, **more)
    if "operator" in more:
        tree = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump({k: v for k, v in tree.items() if k != "script"}))
    with pytest.raises((DsrlError, RuntimeError)):
        make(str(path))
    assert connect._open == {} and not any(robot.is_connected for robot in robots)


def no_operator():
    raise RuntimeError("no display")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DsrlError, match="the path of a robot's YAML file, got"):
        read_robot_file(tmp_path / "none.yaml")
    (tmp_path / "half.yaml").write_text("prompt: go")
    with pytest.raises(DsrlError, match="expected a key 'robot', got prompt"):
        read_robot_file(tmp_path / "half.yaml")


def robot_run(fork_folder, path, **train):
    """A recipe's fields for a short run on the robot of a file."""
    small = {"network": {"width": 16, "layers": 1}}
    return {
        "base": {"uri": f"flow-mlp:{fork_folder}"},
        "task": {"uri": f"robot:{path}", "max_episode_steps": 12, "num_envs": 1},
        "head": small,
        "critic": small,
        "train": train,
    }


def collector(base, tmp_path, script, algorithm="na", n_step=2, limit=12, timeouts="bootstrap", imitate=0.0, **more):
    """An episode collector on a scripted robot."""
    from dsrl_vla.critic import CriticConfig
    from dsrl_vla.head import HeadConfig, SteeringHead
    from dsrl_vla.journal import FOLDER, Journal
    from dsrl_vla.latent_sac import SACConfig
    from dsrl_vla.learners import build_learner
    from dsrl_vla.live_collect import EpisodeCollector
    from dsrl_vla.networks import NetworkConfig
    from dsrl_vla.noise import NoiseLayout
    from dsrl_vla.noise_aliasing import NAConfig
    from dsrl_vla.replay import Replay
    from dsrl_vla.rollout import TaskConfig, VectorTask

    torch.manual_seed(0)
    small = NetworkConfig(width=16, layers=1)
    head = SteeringHead(HeadConfig.for_base(base.spec, NoiseLayout(base.spec.noise, "repeat", 1.5, "live"), small))
    sac = SACConfig(n_step=n_step, gamma=0.9, reward_offset=0.0, timeouts=timeouts, imitate=imitate)
    learner = build_learner(algorithm, base, head, CriticConfig(network=small), sac, NAConfig(), (-10, 0), 0)
    path = write_file(tmp_path, script, **more)
    task = VectorTask(TaskConfig(f"robot:{path}", limit, num_envs=1), base.spec.executed_steps)
    replay = Replay(500, head.layout.latent_shape)
    journal, keeper = Journal(tmp_path / "run" / FOLDER), learner.keeper()
    made = EpisodeCollector(base, head, task, replay, journal=journal, sac=sac, first_seed=100, keeper=keeper)
    return made, replay


def test_a_take_over_enters_replay_without_noise_and_no_return_reaches_across(fork_base, tmp_path):
    made, replay = collector(fork_base, tmp_path, [(0, 6, "take-over"), (0, 20, "take-over")])
    with made.task:
        made.step(warm_up=False)
    record = made.journal.read(0)
    human = record.decisions["human"]
    # heard before each chunk and after each step: 4 steps, 1 step, then a person until the limit
    assert record.decisions["steps"].tolist() == [4, 1, 4, 3] and human.tolist() == [False, False, True, True]
    assert record.decisions["latent"][human].abs().sum() == 0 and record.noise[human].isnan().all()
    assert np.allclose(record.steps["action"][5:], [-0.25, 0.5])
    assert torch.allclose(record.extras["action"][2], torch.tensor([-0.25, 0.5]))
    index = replay.index[: len(replay)].tolist()
    assert index == [[0, 2], [1, 2], [2, 4], [3, 4]]
    assert replay.discount[: len(replay)].tolist() == pytest.approx([0.9**5, 0.9, 0.9**7, 0.9**3])
    assert replay.reward[0] == pytest.approx(-sum(0.9**i for i in range(5)))
    bank = replay.extras["bank_latent"][2]
    assert (bank.abs().sum((1, 2)) > 0).all()  # the base was asked what it could have done there


def test_sac_learns_from_the_policys_part_alone(fork_base, tmp_path):
    made, replay = collector(fork_base, tmp_path, [(0, 6, "take-over")], algorithm="sac")
    with made.task:
        made.step(warm_up=True)
    assert replay.index[: len(replay)].tolist() == [[0, 2], [1, 2]]
    assert made.human_steps == 7 and made.journal.numbers() == [0]
    assert made.decisions == 2  # those that updates are owed, and that count as random ones


@pytest.mark.parametrize("algorithm", ["sac", "na"])
def test_the_noise_behind_a_persons_actions_is_found_and_imitated(fork_base, tmp_path, algorithm):
    script = [(0, 6, "take-over"), (1, 6, "take-over"), (1, 9, "success")]
    made, replay = collector(fork_base, tmp_path, script, algorithm=algorithm, imitate=1.0)
    with made.task:
        made.step(warm_up=False)
        made.step(warm_up=False)
    human = made.journal.read(0).decisions["human"]
    assert human.tolist() == [False, False, True, True]
    assert replay.index[: len(replay)].tolist()[:4] == [[0, 2], [1, 2], [2, 4], [3, 4]]
    reach, imitated = replay.extras["reach"], replay.extras["imitated"]
    assert (reach[:2] == 1).all() and (reach[2:4] > 0).all() and (reach[2:4] < 1).all()
    assert (replay.latent[2:4].abs().sum((1, 2)) > 0).all()
    assert made.journal.read(0).noise[human].isnan().all()  # nobody drew it
    assert made.journal.read(1).success and imitated[:4].sum() == 0  # the first episode failed
    assert imitated[5 : 5 + len(made.journal.read(1))].tolist() == made.journal.read(1).decisions["human"].tolist()


def test_an_episode_waits_until_the_disk_takes_it(fork_base, tmp_path, monkeypatch, caplog):
    from dsrl_vla import live_collect

    made, replay = collector(fork_base, tmp_path, [])
    append, failed = made.journal.append, []

    def full(record):
        if len(failed) < 2:
            failed.append(record)
            raise DsrlError("expected room on the disk, got a full one")
        append(record)

    monkeypatch.setattr(made.journal, "append", full)
    monkeypatch.setattr(live_collect, "RETRY_S", 0.01)
    with made.task:
        made.step(warm_up=True)
    assert made.journal.numbers() == [0] and replay.added
    assert caplog.text.count("episode 0 waits to be saved: expected room on the disk") == 2


def test_where_timeouts_are_terminal_the_time_limit_is_one_and_the_operators_cut_is_not(fork_base, tmp_path):
    made, replay = collector(fork_base, tmp_path, [(1, 8, "cut")], n_step=1, timeouts="terminal")
    with made.task:
        made.step(warm_up=True)
        assert (replay.discount[: len(replay)] > 0).tolist() == [True, True, False]
        made.step(warm_up=True)
    assert made.journal.read(1).ending == "cut" and (replay.discount[3 : len(replay)] > 0).all()


def test_void_episodes_do_not_count(fork_base, tmp_path):
    made, replay = collector(fork_base, tmp_path, [(0, 3, "redo"), (1, 0, "cut"), (2, 3, "discard"), (3, 4, "cut")])
    with made.task:
        made.step(warm_up=True)  # 1 was cut before its first step: there is nothing of it
    assert made.void == 3 and made.journal.numbers() == [1] and made.env_steps == 4
    record = made.journal.read(1)
    assert record.ending == "cut" and not record.terminated and len(record.inputs["state"]) == len(record) + 1
    assert made.episodes == 2


def test_the_journal_restores_what_no_checkpoint_knows(fork_base, tmp_path):
    made, replay = collector(fork_base, tmp_path, [(1, 5, "success"), (2, 3, "take-over")])
    with made.task:
        for _ in range(3):
            made.step(warm_up=True)
    again, restored = collector(fork_base, tmp_path, [])
    with again.task:
        assert again.restore() == 3
    for name, tensor in replay.tensors().items():
        assert torch.equal(restored.tensors()[name], tensor), name
    counts = ("episodes", "env_steps", "decisions", "human_steps")
    assert [getattr(made, n) for n in counts] == [getattr(again, n) for n in counts]
    assert list(again.recent) == [False, True, False]


def test_an_episode_that_is_not_finite_is_kept_and_not_learnt_from(fork_base, tmp_path, monkeypatch):
    made, replay = collector(fork_base, tmp_path, [])
    kind, calls = type(made.keeper), []
    denoise = kind.denoise

    def ill(*args):
        chunks, extras = denoise(*args)
        calls.append(1)
        if len(calls) == 5:
            extras["bank_action"][0, 2] = torch.nan
        return chunks, extras

    monkeypatch.setattr(kind, "denoise", ill)
    with made.task:
        made.step(warm_up=True)
        known = replay.added
        made.step(warm_up=True)
        assert replay.added == known and made.faults.counts == {"episode": 1} and made.episodes == 2
        made.step(warm_up=True)
    assert made.journal.numbers() == [0, 1, 2] and replay.added == 2 * known
    assert all(torch.isfinite(t).all() for t in replay.tensors().values() if t.is_floating_point())
    again, restored = collector(fork_base, tmp_path, [])
    with again.task:
        assert again.restore() == 3 and not again.faults.counts  # or a run with many could not be resumed
    assert list(again.recent) == list(made.recent) and len(again.recent) == 2
    assert torch.equal(restored.tensors()["extras.bank_action"], replay.tensors()["extras.bank_action"])


@pytest.mark.usefixtures("at_a_terminal")
def test_an_episode_that_is_over_is_saved_before_ctrl_c_is_heard(fork_base, tmp_path, monkeypatch):
    import signal

    made, _ = collector(fork_base, tmp_path, [(1, 5, "success")])
    record = made._record

    def slowly(played):
        signal.raise_signal(signal.SIGINT)
        return record(played)

    monkeypatch.setattr(made, "_record", slowly)
    with made.task, pytest.raises(KeyboardInterrupt):
        made.step(warm_up=True)
    assert made.journal.numbers() == [0] and not made.whole
    again, replay = collector(fork_base, tmp_path, [])
    with again.task:
        assert again.restore() == 1 and len(replay)


def test_a_robot_is_not_filmed(fork_folder, tmp_path, monkeypatch):
    """It would move again, outside of any episode, when all has been measured."""
    from dsrl_vla import load_recipe, plots, train

    monkeypatch.setattr(plots, "write_video", lambda *_: pytest.fail("filmed"))
    path = write_file(tmp_path)
    tree = robot_run(fork_folder, path, env_steps=48, learning_starts=3, validation_episodes=2, stop_at=None) | {
        "eval": {"episodes": 2, "controls": False}
    }
    run = train(load_recipe("drawer-open", tree), tmp_path / "run")
    assert run.evaluation and (tmp_path / "run" / "curves.png").exists()


def train_until(episode, recipe, out, monkeypatch):
    """Train, and be killed before that episode."""
    from dsrl_vla import train
    from dsrl_vla.live_collect import EpisodeCollector

    step = EpisodeCollector.step

    def dying(self, warm_up):
        if self.episodes == episode:
            raise RuntimeError("killed")
        step(self, warm_up)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(EpisodeCollector, "step", dying)
        train(recipe, out, evaluate_after=False)


def test_a_better_head_outlives_a_crash_before_the_next_checkpoint(fork_folder, tmp_path, monkeypatch):
    from dsrl_vla import load_recipe, train, trainer
    from dsrl_vla.episodes import Episode
    from dsrl_vla.evaluation import Measure
    from dsrl_vla.run_dir import Metrics

    path, out = write_file(tmp_path), tmp_path / "run"
    tree = robot_run(
        fork_folder, path, env_steps=60, learning_starts=3, gradient_steps=1.0, validate_every=12, stop_at=None
    )
    recipe = load_recipe("drawer-open", tree)
    scores = iter([0.25, 1.0, 0.5, 0.5, 0.5, 0.5])
    won = lambda score: Measure(tuple(Episode(i, i < 4 * score, 10, 0.0) for i in range(4)))
    monkeypatch.setattr(trainer, "measure", lambda *_, **__: won(next(scores)))

    train_until(4, recipe, out, monkeypatch)
    best = (out / "best" / "head.safetensors").read_bytes()
    assert json.loads((out / "finalists.json").read_text())["finalists"][0]["mean"] == 1.0
    train(recipe, out, resume=True, evaluate_after=False)
    assert (out / "best" / "head.safetensors").read_bytes() == best
    found = [r["validation_success"] for r in Metrics(out / "metrics.jsonl").rows() if "validation_success" in r]
    assert found[:2] == [0.25, 1.0] and found.count(0.5) >= 2


def test_a_journal_alone_is_not_gone_on_with_on_another_base(fork_folder, tmp_path, monkeypatch):
    import shutil

    from dsrl_vla import load_recipe, train
    from safetensors.torch import load_file, save_file

    base, out = tmp_path / "base", tmp_path / "run"
    shutil.copytree(fork_folder, base)
    tree = robot_run(base, write_file(tmp_path), env_steps=60, learning_starts=3, stop_at=None)
    recipe = load_recipe("drawer-open", tree)

    train_until(2, recipe, out, monkeypatch)
    weights = base / "model.safetensors"
    save_file({name: value + 0.5 for name, value in load_file(weights).items()}, weights)
    with pytest.raises(DsrlError, match="expected the base that the run began with"):
        train(recipe, out, resume=True)
    shutil.copytree(fork_folder, base, dirs_exist_ok=True)
    train(recipe, out, resume=True, evaluate_after=False)
    assert len(list((out / "episodes").glob("episode_*.safetensors"))) > 2


@pytest.mark.usefixtures("at_a_terminal")
@pytest.mark.parametrize("when", ["episode", "validation"])
def test_ctrl_c_stops_the_robot_first_and_a_validation_it_cut_off_is_made_up(when, fork_folder, tmp_path, monkeypatch):
    import signal

    from dsrl_vla import load_recipe, train
    from dsrl_vla.trainer import Trainer

    path, out, log = write_file(tmp_path), tmp_path / "run", []
    tree = robot_run(
        fork_folder, path, env_steps=48, learning_starts=3, validate_every=48, validation_episodes=2, stop_at=None
    )
    send, play, write = TaskRobot.send_action, Trainer.play, Trainer._write_checkpoint

    def sending(self, action):
        log.append(any(action.values()))
        if ("playing" in log or when == "episode") and log[-3:] == [True] * 3:
            signal.raise_signal(signal.SIGINT)
        return send(self, action)

    with monkeypatch.context() as patch:
        patch.setattr(TaskRobot, "send_action", sending)
        patch.setattr(Trainer, "play", lambda self, *args: log.append("playing") or play(self, *args))
        patch.setattr(Trainer, "_write_checkpoint", lambda self: log.append("checkpoint") or write(self))
        result = train(load_recipe("drawer-open", tree), out, evaluate_after=False)
    stopped = len(log) - log[::-1].index(True)
    then = [False, "checkpoint", False] if when == "episode" else [False, False]  # whole episodes are journalled
    assert result.interrupted and log[stopped:] == then and not (out / "best").exists()
    train(load_recipe("drawer-open", tree), out, resume=True, evaluate_after=False)
    assert (out / "best" / "head.safetensors").exists()


def test_a_journal_that_the_disk_has_changed_is_refused(fork_base, tmp_path):
    made, _ = collector(fork_base, tmp_path, [])
    with made.task:
        made.step(warm_up=True)
    path = next(made.journal.folder.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(DsrlError, match="by its sha256"):
        made.journal.read(0)
    path.write_bytes(data[:100])
    with pytest.raises(DsrlError, match="an episode of a journal"):
        made.journal.read(0)


def test_images_of_a_journal_are_lossless(tmp_path):
    from dsrl_vla.journal import EpisodeRecord, Journal

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 8, 10, 3), dtype=np.uint8)
    steps = {"observation.images.front": images, "human": np.zeros(3, bool)}
    decisions = {"steps": torch.tensor([3])}
    record = EpisodeRecord(0, 3, 0, "go", "", False, False, {"state": torch.zeros(2, 4)}, {}, decisions, steps)
    journal = Journal(tmp_path)
    journal.append(record)
    assert np.array_equal(journal.read(0).steps["observation.images.front"], images)


def test_drive_rehearses_and_reports(fork_folder, tmp_path, capsys):
    from dsrl_vla.cli import main

    path = write_file(tmp_path, [(0, 5, "success")], dry_run=True)
    more = ["--episodes", "2", "--max-episode-steps", "8"]
    assert main(["drive", str(path), "--base", f"flow-mlp:{fork_folder}", *more]) == 0
    said = capsys.readouterr().out
    assert "success, 4 steps\nno success, 8 steps\n1 of 2 episodes succeeded" in said
    assert "commands 12" in said and "late" in said
    assert main(["drive", str(path), "--run", f"flow-mlp:{fork_folder}"]) == 2
    assert "drive --run: expected a run's directory, a head's folder or a shipped head" in capsys.readouterr().err
    assert main(["drive", str(path)]) == 2


@pytest.mark.usefixtures("at_a_terminal")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_stops_the_robot_and_disconnects_it(fork_folder, tmp_path, monkeypatch, name):
    import signal

    from dsrl_vla.cli import main

    path, send, log = write_file(tmp_path), TaskRobot.send_action, []

    def sending(self, action):
        log.append(action)
        if len(log) == 3:
            signal.raise_signal(getattr(signal, name))
        return send(self, action)

    monkeypatch.setattr(TaskRobot, "send_action", sending)
    monkeypatch.setattr(TaskRobot, "disconnect", lambda self: log.append("disconnected"))
    assert main(["drive", str(path), "--base", f"flow-mlp:{fork_folder}", "--episodes", "2"]) == 130
    assert log[-2:] == [{"a0.vel": 0.0, "a1.vel": 0.0}, "disconnected"] and len(log) == 5
    assert main(["drive", str(path), "--base", f"flow-mlp:{fork_folder}", "--episodes", "0"]) == 2


def test_while_a_person_drives_the_base_is_not_asked(fork_base, tmp_path, monkeypatch):
    from dsrl_vla.episodes import run_episodes
    from dsrl_vla.rollout import TaskConfig, VectorTask
    from dsrl_vla.sources import PriorNoise

    path, asked, encode = write_file(tmp_path, [(0, 0, "take-over")]), [], type(fork_base).encode
    monkeypatch.setattr(type(fork_base), "encode", lambda self, seen: asked.append(1) or encode(self, seen))
    with VectorTask(TaskConfig(f"robot:{path}", 40, num_envs=1), fork_base.spec.executed_steps) as task:
        (episode,) = run_episodes(fork_base, task, PriorNoise(fork_base.spec.noise), [0])
    assert episode.steps == 40 and not episode.success and len(asked) <= 1


def test_training_on_a_dry_run_is_refused(fork_base, tmp_path):
    with pytest.raises(DsrlError, match="dry_run: expected false, to train on a robot"):
        collector(fork_base, tmp_path, [(9, 9, "cut")], dry_run=True)


def test_a_rate_that_is_not_kept_is_said(fork_base, tmp_path, caplog):
    made, _ = collector(fork_base, tmp_path, [], fps=1e6)
    with made.task:
        made.step(warm_up=True)
    assert "of 12 control steps came late. Lower fps" in caplog.text


def test_a_killed_run_loses_nothing(tmp_path, monkeypatch):
    """The benchmark's run, in short: through the command line, killed before its first checkpoint, and resumed."""
    import importlib.util

    folder = Path(__file__).parent.parent / "benchmarks"
    spec = importlib.util.spec_from_file_location("robot_loop", folder / "robot_loop.py")
    robot_loop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(robot_loop)
    script = [
        {"episode": 1, "step": 4, "say": "take-over"},
        {"episode": 3, "step": 4, "say": "redo"},
        {"episode": 4, "step": 5, "say": "cut"},
    ]
    found = robot_loop.rehearse(tmp_path, 6, 2, 200, script)
    assert found["episodes"] == 6 and found["unchanged_after_resume"] == found["journalled_when_killed"] == 2
    assert found["take_overs"] == 1 and found["endings"]["cut"] == 1 and found["finished_episodes_lost"] == 0
