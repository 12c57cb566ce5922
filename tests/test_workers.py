"""Collection by other processes: a fixed schedule, bit for bit, whoever dies on the way."""

import contextlib
import math
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from dsrl_vla import load_recipe, train
from dsrl_vla.errors import DsrlError, MismatchError, MissingExtraError, WorkerLostError
from dsrl_vla.faults import TooManyFaultsError
from dsrl_vla.run_dir import Metrics, load_checkpoint
from dsrl_vla.workers.crew import Crew
from dsrl_vla.workers.links import ProcessLink

BACKENDS = ["process", "ray"]


def tree(folder, backend="process", algorithm="sac", rollout=None, **train_fields):
    return {
        "name": "short",
        "base": {"uri": f"flow-mlp:{folder}"},
        "task": {"uri": "point:fork", "max_episode_steps": 40, "num_envs": 4},
        "head": {"network": {"width": 16, "layers": 1}},
        "critic": {"network": {"width": 16, "layers": 1}},
        "algorithm": algorithm,
        "train": {"env_steps": 900, "learning_starts": 32, "gradient_steps": 0.3, "validate_every": 400,
                  "stop_at": None, "validation_episodes": 4, "checkpoint_every": 300} | train_fields,
        "rollout": {"backend": backend} | (rollout or {}),
        "eval": {"episodes": 4, "video_episodes": 0, "controls": False},
    }  # fmt: skip


def recipe_of(*args, **more):
    return load_recipe("drawer-open", tree(*args, **more))


def last(out):
    """The newest checkpoint: its tensors, and its state without what a clock says."""
    tensors, state = load_checkpoint(out / "checkpoints")
    return tensors, {k: v for k, v in state.items() if k != "seconds"}


def same(one, other, but=()):
    tensors, others = ({k: v for k, v in last(out)[0].items() if not k.startswith(tuple(but))} for out in (one, other))
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name
    return True


def rows(out):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in Metrics(out / "metrics.jsonl").rows()]


@pytest.fixture(scope="module")
def straight(fork_folder, tmp_path_factory):
    """A run by two processes that nothing happens to."""
    out = tmp_path_factory.mktemp("straight") / "run"
    recipe = recipe_of(fork_folder, rollout={"workers": 2})
    train(recipe, out, evaluate_after=False)
    return recipe, out


@pytest.mark.parametrize("algorithm", ["sac", "na"])
def test_a_worker_that_waits_does_what_inline_does_bit_for_bit(fork_folder, tmp_path, algorithm):
    runs = {"inline": {}, "process": {"ahead": 0}}
    for backend, rollout in runs.items():
        train(recipe_of(fork_folder, backend, algorithm, rollout), tmp_path / backend, evaluate_after=False)
    assert same(*(tmp_path / backend for backend in runs), but=["collector."])
    assert rows(tmp_path / "inline") == rows(tmp_path / "process")


def test_a_run_with_workers_is_a_function_of_its_seed(straight, tmp_path):
    """Two workers, a round ahead: who is faster changes nothing."""
    recipe, out = straight
    train(recipe, tmp_path / "again", evaluate_after=False)
    assert same(tmp_path / "again", out)
    assert rows(tmp_path / "again") == rows(out)


@pytest.mark.parametrize("ahead", [1, 2])
def test_a_round_is_collected_by_the_head_of_as_many_rounds_before(fork_folder, tmp_path, monkeypatch, ahead):
    """What the schedule says, seen in the noise: each latent is recomputed from the weights that it must come from."""
    from dsrl_vla.workers import links

    heads, entered, ordered = [], [], []
    original = Crew.step

    class Spy(links.ProcessLink):
        def post(self, order):
            from dsrl_vla.workers.parcels import unpack

            ordered.append(unpack(order))
            super().post(order)

    def step(self, warm_up):
        heads.append({k: v.clone() for k, v in self.head.state_dict().items()})
        original(self, warm_up)
        entered.append((self.decisions, warm_up))

    monkeypatch.setitem(links.LINKS, "process", Spy)
    monkeypatch.setattr(Crew, "step", step)
    recipe = recipe_of(fork_folder, rollout={"ahead": ahead}, env_steps=400, gradient_steps=1.0)
    train(recipe, tmp_path / "run", evaluate_after=False)
    for number, order in enumerate(ordered):
        expected = heads[max(0, number - ahead)]  # as it was before the round of that number: after the one before it
        for name, value in order["head"].items():
            assert np.array_equal(value, expected[name].numpy()), (number, name)
        assert order["warm_up"] == entered[max(0, number - ahead)][1]
    assert len(ordered) == len(entered) + ahead
    assert any(not torch.equal(a["network.read.weight"], heads[0]["network.read.weight"]) for a in heads[ahead:])


@pytest.mark.parametrize("gradient_steps", [0.3, 1.7])
def test_the_replay_ratio_is_exact(fork_folder, tmp_path, gradient_steps):
    recipe = recipe_of(fork_folder, rollout={"ahead": 3, "workers": 2}, gradient_steps=gradient_steps, env_steps=400)
    train(recipe, tmp_path / "run", evaluate_after=False)
    _, state = last(tmp_path / "run")
    decisions = state["collector"]["decisions"]
    assert state["updates"] == math.floor((decisions - 32) * gradient_steps) > 0
    assert decisions % 8 == 0 and state["env_steps"] >= 400


def test_a_workers_environments_may_have_processes_of_their_own(fork_folder, tmp_path):
    made = tree(fork_folder, env_steps=200, rollout={"ahead": 0})
    runs = {vector: made | {"task": made["task"] | {"vector": vector}} for vector in ("sync", "async")}
    for vector, recipe in runs.items():
        train(load_recipe("drawer-open", recipe), tmp_path / vector, evaluate_after=False)
    assert same(tmp_path / "sync", tmp_path / "async", but=["collector."])


def test_no_two_workers_play_the_same_episode(straight):
    from dsrl_vla.workers.parcels import unpack

    tensors, state = last(straight[1])
    seeds = [unpack(tensors[f"collector.worker.{i}.past"].numpy().tobytes())["state"]["seeds"] for i in range(2)]
    assert {s % 2 for s in seeds[0]} == {0} and {s % 2 for s in seeds[1]} == {1}
    assert state["collector"]["episodes"] == sum((max(s) - 1_000_000) // 2 + 1 for s in seeds)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(straight, tmp_path, monkeypatch):
    recipe, out = straight
    original, calls = Crew.step, []

    def dying(self, warm_up):
        calls.append(1)
        if len(calls) in (7, 15):
            raise KeyboardInterrupt
        original(self, warm_up)

    monkeypatch.setattr(Crew, "step", dying)
    for again in (False, True, True):
        train(recipe, tmp_path / "run", resume=again, evaluate_after=False)
    assert same(tmp_path / "run", out)
    assert rows(tmp_path / "run") == rows(out)


@pytest.mark.parametrize("moment", ["waiting", "asked"])
def test_ctrl_c_saves_whole_rounds(straight, tmp_path, monkeypatch, moment):
    """The first finishes the round; a second, while workers are waited for, stops at once. Both lose nothing."""
    recipe, out = straight
    original, calls = Crew._harvest, []

    def interrupted(self, number):
        calls.append(1)
        if len(calls) == 24:
            os.kill(os.getpid(), signal.SIGINT)
            if moment == "waiting":
                os.kill(os.getpid(), signal.SIGINT)
        return original(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Crew, "_harvest", interrupted)
        assert train(recipe, tmp_path / "run").evaluation is None
    _, state = last(tmp_path / "run")
    assert state["collector"]["decisions"] == (12 if moment == "asked" else 11) * 8
    train(recipe, tmp_path / "run", resume=True, evaluate_after=False)
    assert same(tmp_path / "run", out)


def test_a_worker_with_many_rounds_ordered_is_ended_at_once():
    link = object.__new__(ProcessLink)
    link.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    link.pid, link.begun = link.pool.submit(os.getpid), link.pool.submit(os.getpid)
    link.pending = deque(link.pool.submit(time.sleep, 2) for _ in range(12))
    link.begun.result()
    start = time.monotonic()
    link.close()
    assert time.monotonic() - start < 9  # the round under way, and what is already in the pipe, of 24 s


def killer(monkeypatch, pids, at):
    """Kill a worker's process at some of the harvests."""
    original, calls = Crew._harvest, []

    def harvest(self, number):
        calls.append(1)
        if len(calls) in at:
            with contextlib.suppress(ProcessLookupError):  # one that has died already
                os.kill(pids(self.links[number]), signal.SIGKILL)
        return original(self, number)

    monkeypatch.setattr(Crew, "_harvest", harvest)


def test_a_worker_that_dies_is_replaced_and_the_run_is_the_same(straight, tmp_path, monkeypatch, caplog):
    recipe, out = straight
    killer(monkeypatch, lambda link: link.begun.result(), at=(9, 30))
    train(recipe, tmp_path / "run", evaluate_after=False)
    assert "rollout worker 0 died" in caplog.text and "restart 2 of 3: another takes its place" in caplog.text
    assert last(tmp_path / "run")[1]["collector"]["restarts"] == 2
    assert same(tmp_path / "run", out)


def test_workers_that_keep_dying_end_the_run_with_its_state_saved(straight, fork_folder, tmp_path, monkeypatch):
    out = straight[1]
    recipe = recipe_of(fork_folder, rollout={"workers": 2, "max_restarts": 1})
    with monkeypatch.context() as patch:
        killer(patch, lambda link: link.begun.result(), at=range(20, 30))
        words = r"rollout worker \d: expected it to live, got its death .*max_restarts 1 before it. The state is saved"
        with pytest.raises(WorkerLostError, match=words):
            train(recipe, tmp_path / "run")
    assert last(tmp_path / "run")[1]["collector"]["decisions"] > 0
    train(recipe, tmp_path / "run", resume=True, evaluate_after=False)
    assert same(tmp_path / "run", out)


def test_workers_do_not_outlive_a_killed_learner(fork_folder, tmp_path):
    """SIGKILL leaves the learner no time to say goodbye."""
    import subprocess
    import sys

    import yaml

    path = tmp_path / "short.yaml"
    path.write_text(yaml.safe_dump({"extends": "drawer-open"} | tree(fork_folder, env_steps=100_000)))
    code = (
        "import sys; from dsrl_vla import load_recipe, train; from dsrl_vla.workers import links\n"
        "real = links.ProcessLink.take\n"
        "def take(self):\n    print(self.begun.result(), flush=True)\n    return real(self)\n"
        "links.ProcessLink.take = take\n"
        "train(load_recipe(sys.argv[1]), sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        pid = int(child.stdout.readline())
        child.kill()
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the worker is still there after ten seconds")


def test_an_error_in_a_worker_is_the_runs(fork_folder, tmp_path):
    recipe = recipe_of(fork_folder)
    other = load_recipe("drawer-open", tree(fork_folder) | {"base": {"uri": "flow-mlp:/no/such/folder"}})
    with pytest.raises(DsrlError, match="flow-mlp"):
        train(other, tmp_path / "a", base=recipe.base.load())


def test_a_worker_whose_base_is_another_is_refused(fork_folder, fork_base, tmp_path):
    """A base in memory that is not the one its URI loads."""
    import copy

    base = copy.deepcopy(fork_base)
    base._fingerprint = None
    with torch.no_grad():
        for parameter in base.model.parameters():
            parameter.add_(0.01)
    with pytest.raises(MismatchError):
        train(recipe_of(fork_folder), tmp_path / "run", base=base)


@pytest.mark.parametrize("backend", BACKENDS)
def test_workers_can_share_one_served_base(fork_base, served, tmp_path, backend, request):
    if backend == "ray":
        request.getfixturevalue("local_ray")
    uri = "remote:" + served(fork_base).uri
    recipe = load_recipe(
        "drawer-open", tree("", backend, rollout={"workers": 2}, env_steps=300) | {"base": {"uri": uri}}
    )
    run = train(recipe, tmp_path / "run")
    assert run.evaluation["env_steps"] >= 300


@pytest.fixture
def in_this_process(monkeypatch):
    """The real worker, in this process, where its task can be made ill."""
    from dsrl_vla.workers import links
    from dsrl_vla.workers.worker import RolloutWorker

    class Here:
        def __init__(self, spec, number, past):
            self.worker, self.orders = RolloutWorker(), []
            self.worker.begin(spec, number, past)

        def post(self, order):
            self.orders.append(order)

        def take(self):
            return self.worker.round(self.orders.pop(0))

        def close(self):
            self.worker.collector.task.close()

    monkeypatch.setitem(links.LINKS, "process", Here)


@pytest.mark.usefixtures("in_this_process")
def test_faults_in_a_worker_are_counted_and_said_by_the_learner(fork_folder, tmp_path, monkeypatch, caplog):
    from dsrl_vla.tasks.point import Fork

    begin, advance = Fork.begin, Fork.advance

    def ill_begin(self, seed):
        begin(self, seed)
        self.ill = seed in (1_000_004, 1_000_007)

    def ill_advance(self, action):
        reward, success, over = advance(self, action)
        return (float("nan") if self.ill else reward), success, over

    monkeypatch.setattr(Fork, "begin", ill_begin)
    monkeypatch.setattr(Fork, "advance", ill_advance)
    train(recipe_of(fork_folder), tmp_path / "run", evaluate_after=False)
    assert last(tmp_path / "run")[1]["collector"]["faults"] == {"episode": 2}
    assert "fault 2, skipped; 20 end the run: episode of seed 1000007" in caplog.text


def test_workers_are_ended_all_at_once():
    """The last one would otherwise wait for the rounds of all the others."""
    barrier = threading.Barrier(2, timeout=20)

    class Waits:
        def close(self):
            barrier.wait()

    class Fails:
        def close(self):
            raise RuntimeError("deaf")

    crew = Crew.__new__(Crew)
    crew.links = [Waits(), Waits()]
    crew.close()
    crew.close()  # there is nothing left to end
    assert crew.links == []
    crew.links = [Fails(), Waits(), Waits()]
    with pytest.raises(RuntimeError, match="deaf"):
        crew.close()
    assert crew.links == [] and barrier.n_waiting == 0


def test_a_round_with_too_many_faults_comes_to_an_end():
    """Where every episode begins ill, there would be no other: the learner is told nothing until a round is over."""
    from dsrl_vla.workers.worker import _Noted

    faults = _Noted(3)
    faults.add("reset", "one"), faults.add("reset", "two")
    assert faults.take() == [["reset", "one"], ["reset", "two"]]  # a new round
    faults.add("reset", "three"), faults.add("reset", "four")
    with pytest.raises(TooManyFaultsError, match="3 x reset; the last: five. train.max_faults is 3"):
        faults.add("reset", "five")


def test_parcels_are_not_held_to_a_strangers_limits():
    from dsrl_vla.serving.wire import WireError
    from dsrl_vla.serving.wire import unpack as unpack_a_strangers
    from dsrl_vla.workers.parcels import pack, unpack

    rows = pack({f"row.{number}": np.zeros(2) for number in range(2000)})
    assert len(unpack(rows)) == 2000
    with pytest.raises(WireError, match="within the protocol's limits"):
        unpack_a_strangers(rows)


@pytest.fixture(scope="module")
def local_ray():
    """A Ray of two processors, a GPU that is none, and a small store, on this machine."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, num_gpus=1, object_store_memory=80 * 1024**2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def test_rays_workers_do_what_processes_do_also_when_one_is_killed(
    local_ray, fork_folder, straight, tmp_path, monkeypatch, caplog
):
    handler = signal.getsignal(signal.SIGTERM)
    killer(monkeypatch, lambda link: local_ray.get(link.begun), at=(9,))
    recipe = recipe_of(fork_folder, "ray", rollout={"workers": 2})
    train(recipe, tmp_path / "run", evaluate_after=False)
    assert "rollout worker 0 died" in caplog.text and "restart 1 of 3" in caplog.text
    assert same(tmp_path / "run", straight[1])
    assert signal.getsignal(signal.SIGTERM) == handler


def test_rays_workers_ask_for_their_share_of_a_gpu(local_ray, fork_folder, tmp_path, monkeypatch):
    free, step = [], Crew.step

    def look(self, warm_up):
        step(self, warm_up)
        free.append(local_ray.available_resources().get("GPU", 0))

    monkeypatch.setattr(Crew, "step", look)
    recipe = recipe_of(fork_folder, "ray", rollout={"workers": 2, "gpus": 0.25})
    train(recipe, tmp_path / "run", evaluate_after=False)
    assert 0.5 in free


def test_rays_errors_are_the_runs_too(local_ray, fork_folder, tmp_path):
    recipe = recipe_of(fork_folder, "ray")
    other = load_recipe("drawer-open", tree(fork_folder, "ray") | {"base": {"uri": "flow-mlp:/no/such/folder"}})
    with pytest.raises(DsrlError, match="flow-mlp"):
        train(other, tmp_path / "run", base=recipe.base.load())


def test_without_ray_the_command_that_installs_it_is_named(fork_folder, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'dsrl-vla\[ray\]'"):
        train(recipe_of(fork_folder, "ray"), tmp_path / "run")


def test_a_script_without_a_main_guard_is_told_so(fork_folder, tmp_path):
    import subprocess
    import sys

    import yaml

    path, script = tmp_path / "short.yaml", tmp_path / "script.py"
    made = tree(fork_folder, rollout={"max_restarts": 0})
    path.write_text(yaml.safe_dump({"extends": "drawer-open"} | made))
    script.write_text(f"import dsrl_vla\ndsrl_vla.train(dsrl_vla.load_recipe('{path}'), '{tmp_path}/run')\n")
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240)
    assert run.returncode != 0
    assert "before it had begun: a script that trains with workers needs `if __name__ == '__main__':`" in run.stderr


def test_a_robot_is_collected_from_by_the_learner_itself(fork_folder, fork_base, tmp_path):
    from types import SimpleNamespace

    from dsrl_vla.collectors import make_collector

    live: Any = SimpleNamespace(info=SimpleNamespace(live=True))
    with pytest.raises(DsrlError, match="rollout.backend: expected inline for a task with an operator, got process"):
        make_collector(recipe_of(fork_folder), fork_base, None, live, None, tmp_path, keeper=None, faults=None)


def test_what_a_recipe_may_not_ask_for(fork_folder):
    for rollout, words in (
        ({"workers": 0}, "rollout.workers: expected 1 or more, got 0"),
        ({"backend": "inline", "workers": 2}, "rollout.workers: expected 1 with rollout.backend inline, got 2"),
        ({"gpus": -1.0}, "rollout.gpus: expected 0 or more, got -1"),
        ({"ahead": -1}, "rollout.ahead: expected 0 or more, got -1"),
        ({"backend": "thread"}, "rollout.backend: expected inline or process or ray, got 'thread'"),
    ):
        with pytest.raises(DsrlError, match=words):
            recipe_of(fork_folder, rollout=rollout)
    on_a_gpu = tree(fork_folder, "ray") | {"base": {"device": "cuda:0"}}
    with pytest.raises(DsrlError, match="rollout.gpus: expected above 0 for a base on 'cuda:0'"):
        load_recipe("drawer-open", on_a_gpu)
    with pytest.raises(DsrlError, match="algorithm: expected sac or na with workers.*, got na-exact"):
        recipe_of(fork_folder, algorithm="na-exact")
