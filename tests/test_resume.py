"""A run that is cut off goes on bit for bit, and what is not finite or cannot be written does not end it."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from dsrl_vla import load_recipe, train, trainer
from dsrl_vla.collect import Collector
from dsrl_vla.episodes import Episode
from dsrl_vla.errors import DsrlError
from dsrl_vla.evaluation import Measure
from dsrl_vla.faults import TooManyFaultsError
from dsrl_vla.latent_sac import LatentSAC
from dsrl_vla.rollout import TaskConfig, VectorTask
from dsrl_vla.run_dir import Metrics, checkpoints, load_checkpoint, save_checkpoint
from dsrl_vla.tasks.point import Fork

ROOT = Path(__file__).parents[1]


def tree(folder, **train_fields):
    return {
        "name": "short",
        "base": {"uri": f"flow-mlp:{folder}"},
        "task": {"uri": "point:fork", "max_episode_steps": 40, "num_envs": 4},
        "head": {"network": {"width": 16, "layers": 1}},
        "critic": {"network": {"width": 16, "layers": 1}},
        "train": {"env_steps": 1500, "learning_starts": 32, "gradient_steps": 0.5, "validate_every": 500,
                  "stop_at": None, "validation_episodes": 4, "checkpoint_every": 300} | train_fields,
        "eval": {"episodes": 4, "video_episodes": 0, "controls": False},
    }  # fmt: skip


def recipe_of(folder, algorithm="sac", vector="sync", **train_fields):
    made = tree(folder, **train_fields)
    made["algorithm"], made["task"]["vector"] = algorithm, vector
    return load_recipe("drawer-open", made)


def last(out):
    """The newest checkpoint, without what a clock says."""
    tensors, state = load_checkpoint(out / "checkpoints")
    return tensors, {k: v for k, v in state.items() if k != "seconds"}


def equal(a, b):
    (tensors, state), (others, other) = a, b
    assert state == other
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name
    return True


def rows(out):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in Metrics(out / "metrics.jsonl").rows()]


def cut(recipe, out, step, monkeypatch, base=None):
    """Run until decision `step`, where the process dies as far as the run can tell."""
    original, calls = Collector.step, []

    def dying(self, warm_up):
        calls.append(1)
        if len(calls) == step:
            raise KeyboardInterrupt
        original(self, warm_up)

    with monkeypatch.context() as patch:
        patch.setattr(Collector, "step", dying)
        assert train(recipe, out, base=base, resume=out.exists()).evaluation is None


@pytest.fixture(scope="module", params=["sac", "na"])
def straight(request, fork_folder, tmp_path_factory):
    """A run that nothing happens to."""
    out = tmp_path_factory.mktemp("straight") / request.param
    recipe = recipe_of(fork_folder, request.param)
    train(recipe, out)
    return recipe, out


@pytest.mark.parametrize("cuts", [(12,), (45, 20)])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(straight, cuts, tmp_path, monkeypatch):
    recipe, out = straight
    for step in cuts:
        cut(recipe, tmp_path / "run", step, monkeypatch)
    train(recipe, tmp_path / "run", resume=True)
    assert equal(last(tmp_path / "run"), last(out))
    assert rows(tmp_path / "run") == rows(out)
    for name in ("head.safetensors", "head_config.json"):
        assert (tmp_path / "run" / "best" / name).read_bytes() == (out / "best" / name).read_bytes()
    ends = [json.loads((place / "eval.json").read_text()) for place in (tmp_path / "run", out)]
    assert ends[0]["steered"] == ends[1]["steered"] and ends[0]["updates"] == ends[1]["updates"]


def test_n_and_n_updates_are_2n_bit_for_bit(straight, fork_folder):
    """The learner alone, from a checkpoint in the middle of a run."""
    from dsrl_vla import load_base
    from dsrl_vla.trainer import Trainer

    recipe, out = straight
    base = load_base(recipe.base.uri)

    def trainer():
        from dsrl_vla.resuming import unpack

        with VectorTask(recipe.task, base.spec.executed_steps) as task:
            made = Trainer(recipe, base, task, task, out)
            unpack(made, *load_checkpoint(out / "checkpoints"))
        return made

    through, first = trainer(), trainer()
    start = through.learner.updates
    through.updates.until(start + 20)
    first.updates.until(start + 10)
    second = trainer()
    second.learner.load_tensors({k: v.clone() for k, v in first.learner.tensors().items()}, first.learner.updates)
    second.updates.rng.bit_generator.state = first.updates.rng.bit_generator.state
    second.updates.until(start + 20)
    for name, tensor in through.learner.tensors().items():
        assert torch.equal(tensor, second.learner.tensors()[name]), name


def test_worker_processes_are_brought_back_too():
    rng, seen = np.random.default_rng(0), {}
    chunks = [rng.uniform(-1, 1, (4, 2)).astype(np.float32) for _ in range(7)]
    under_way = [(11, chunks[:5]), (12, chunks[5:]), (13, [])]
    for vector in ("sync", "async"):
        config = TaskConfig("point:fork", max_episode_steps=40, num_envs=3, vector=vector)
        with VectorTask(config, chunk=4) as task:
            assert task.repeatable
            restored = task.restore(under_way)["observation.state"]
            seen[vector] = restored, task.step(np.stack(chunks[:3])).observations["observation.state"]
    env = Fork("point:fork", 40)
    env.reset(seed=11)
    for action in np.concatenate(chunks[:5]):
        observation, *_ = env.step(action)
    assert np.array_equal(seen["sync"][0][0], observation["observation.state"])
    assert all(np.array_equal(a, b) for a, b in zip(seen["sync"], seen["async"], strict=True))


def test_metaworld_episodes_are_brought_back_too(nano, tmp_path, monkeypatch):
    fields = {"env_steps": 160, "learning_starts": 10, "gradient_steps": 0.5, "validate_every": 1000,
              "checkpoint_every": 40, "validation_episodes": 1}  # fmt: skip
    task = {"num_envs": 2, "max_episode_steps": 48}
    recipe = load_recipe("drawer-open", {"task": task, "train": fields, "sac": {"n_step": 2}})
    train(recipe, tmp_path / "straight", base=nano, evaluate_after=False)
    cut(recipe, tmp_path / "cut", 8, monkeypatch, base=nano)
    train(recipe, tmp_path / "cut", base=nano, resume=True, evaluate_after=False)
    assert equal(last(tmp_path / "cut"), last(tmp_path / "straight"))


@pytest.mark.parametrize("how", ["says so", "turns out"])
def test_episodes_that_cannot_be_repeated_are_begun_anew(fork_folder, tmp_path, monkeypatch, caplog, how):
    recipe, out = recipe_of(fork_folder, env_steps=700), tmp_path / "run"
    cut(recipe, out, 30, monkeypatch)
    if how == "says so":
        monkeypatch.setattr(Fork, "repeatable", False)
    else:
        real = Fork.begin
        monkeypatch.setattr(Fork, "begin", lambda self, seed: real(self, seed + 1))
    run = train(recipe, out, resume=True)
    assert run.evaluation["env_steps"] >= 700
    assert ("do not repeat themselves" in caplog.text) == (how == "turns out")


# Checkpoints


def test_a_flipped_bit_is_noticed_and_the_checkpoint_before_is_taken_in_words(tmp_path, caplog):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"x": torch.full((1000,), float(step))}, {"env_steps": step})
    path = checkpoints(tmp_path)[-1] / "tensors.safetensors"
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    tensors, state = load_checkpoint(tmp_path)
    assert state["env_steps"] == 1 and tensors["x"][0] == 1
    assert (
        "checkpoint step_000000002: " in caplog.text and "Going on from step_000000001, the one before" in caplog.text
    )
    assert [p.name for p in checkpoints(tmp_path)] == ["step_000000001"]  # the broken one is not kept for one


def test_nothing_is_written_over(tmp_path):
    first = save_checkpoint(tmp_path, 1, {"x": torch.zeros(1)}, {"n": 1})
    again = save_checkpoint(tmp_path, 1, {"x": torch.ones(1)}, {"n": 2})
    assert (first.name, again.name) == ("step_000000001", "step_000000001.1")
    assert load_checkpoint(tmp_path)[1] == {"n": 2}
    for n in range(3, 14):  # however many of a step have been pruned, the newest is the newest
        save_checkpoint(tmp_path, 1, {"x": torch.ones(1)}, {"n": n})
        assert load_checkpoint(tmp_path)[1] == {"n": n} and len(checkpoints(tmp_path)) == 2
    (tmp_path / ".writing_000000009").mkdir()
    load_checkpoint(tmp_path)
    assert not (tmp_path / ".writing_000000009").exists()


def test_what_shares_no_memory_is_not_copied_to_be_saved(tmp_path, monkeypatch):
    written, whole, save = {}, torch.arange(6.0), safetensors.torch.save_file
    tensors = {"replay": torch.ones(5, 2), "one": whole[:3], "other": whole[3:]}
    monkeypatch.setattr(safetensors.torch, "save_file", lambda held, path: written.update(held) or save(held, path))
    save_checkpoint(tmp_path, 1, tensors, {})
    assert written["replay"].data_ptr() == tensors["replay"].data_ptr()
    assert written["one"].data_ptr() != whole.data_ptr()
    assert all(torch.equal(load_checkpoint(tmp_path)[0][name], value) for name, value in tensors.items())


def test_a_checkpoint_without_its_manifest_is_not_whole(tmp_path):
    save_checkpoint(tmp_path, 1, {"x": torch.zeros(1)}, {"n": 1})
    save_checkpoint(tmp_path, 2, {"x": torch.zeros(1)}, {"n": 2})
    (checkpoints(tmp_path)[-1] / "manifest.json").unlink()
    assert load_checkpoint(tmp_path)[1] == {"n": 1}


# Killed


CHILD = """
import sys
from dsrl_vla import load_recipe, train
from pathlib import Path
out = Path(sys.argv[2])
train(load_recipe(sys.argv[1]), out, resume=(out / "recipe.yaml").exists(), evaluate_after=False)
"""


def test_kill_9_anywhere_loses_nothing(fork_folder, tmp_path):
    """Five kills of one run; the end is the uninterrupted run's bit for bit. benchmarks/kill_resume.py has fifty."""
    import yaml

    fields = {"env_steps": 1600, "checkpoint_every": 100, "validate_every": 800}
    path, out = tmp_path / "short.yaml", tmp_path / "killed"
    path.write_text(yaml.safe_dump({"extends": "drawer-open"} | tree(fork_folder, **fields)))
    train(load_recipe(path), tmp_path / "straight", evaluate_after=False)
    rng = np.random.default_rng(0)
    for _ in range(5):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(path), str(out)], stderr=subprocess.DEVNULL)
        before = set(checkpoints(out / "checkpoints"))
        while child.poll() is None and not set(checkpoints(out / "checkpoints")) - before:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.3))
        child.kill()
        child.wait()
        assert checkpoints(out / "checkpoints")
    train(load_recipe(path), out, resume=True, evaluate_after=False)
    assert equal(last(out), last(tmp_path / "straight"))
    assert rows(out) == rows(tmp_path / "straight")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_decision_and_saves_it(fork_folder, tmp_path, number, monkeypatch):
    recipe, out = recipe_of(fork_folder), tmp_path / "run"
    original, calls, handler = Collector.step, [], signal.getsignal(number)

    def signalled(self, warm_up):
        calls.append(1)
        if len(calls) == 40:
            os.kill(os.getpid(), number)
        original(self, warm_up)

    with monkeypatch.context() as patch:
        patch.setattr(Collector, "step", signalled)
        assert train(recipe, out).evaluation is None
    assert load_checkpoint(out / "checkpoints")[1]["collector"]["decisions"] == 40 * 4
    assert signal.getsignal(number) == handler
    train(recipe, out, resume=True, evaluate_after=False)
    train(recipe, tmp_path / "straight", evaluate_after=False)
    mine, theirs = last(out), last(tmp_path / "straight")
    assert all(torch.equal(mine[0][name], theirs[0][name]) for name in theirs[0])


PROCESSES = """
import signal, sys
from dsrl_vla import load_recipe, train

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print(train(load_recipe(sys.argv[1]), sys.argv[2], evaluate_after=False).interrupted)
"""


def test_a_terminals_ctrl_c_reaches_environments_in_processes_too_and_all_is_saved(fork_folder, tmp_path):
    import yaml

    script, path, out = tmp_path / "child.py", tmp_path / "short.yaml", tmp_path / "run"
    script.write_text(PROCESSES)
    tree_ = {"extends": "drawer-open"} | tree(fork_folder, env_steps=500_000, checkpoint_every=100)
    tree_["task"] |= {"vector": "async", "num_envs": 2}
    path.write_text(yaml.safe_dump(tree_))
    child = subprocess.Popen(
        [sys.executable, str(script), str(path), str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while child.poll() is None and not checkpoints(out / "checkpoints"):
        time.sleep(0.02)
    before = checkpoints(out / "checkpoints")
    os.killpg(child.pid, signal.SIGINT)
    said, errors = child.communicate(timeout=60)
    assert child.returncode == 0 and "True" in said, errors
    assert "Traceback" not in errors and checkpoints(out / "checkpoints") != before


def test_a_schedulers_sigterm_to_all_processes_is_obeyed_by_the_learner_alone(fork_folder, tmp_path):
    """Also by one that ends without closing its environments."""
    script = "from dsrl_vla.rollout import TaskConfig, VectorTask\nimport os, signal, sys\nimport numpy as np\n"
    script += "if __name__ == '__main__':\n    signal.signal(signal.SIGTERM, lambda *_: None)\n"
    script += "    task = VectorTask(TaskConfig('point:fork', 40, 2, 'async'), 4)\n    task.reset([0, 1])\n"
    script += (
        "    os.killpg(0, signal.SIGTERM)\n    print(task.step(np.zeros((2, 4, 2), np.float32)).steps.tolist())\n"
    )
    (tmp_path / "child.py").write_text(script)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "child.py")],
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
    )
    assert done.returncode == 0 and done.stdout.strip() == "[4, 4]", done.stderr


def test_a_run_is_not_gone_on_with_on_another_base(fork_folder, tmp_path, monkeypatch):
    folder, out = tmp_path / "base", tmp_path / "run"
    shutil.copytree(fork_folder, folder)
    recipe = recipe_of(folder)
    cut(recipe, out, 45, monkeypatch)
    weights = next(folder.glob("*.safetensors"))
    changed = {name: value + 0.5 for name, value in safetensors.torch.load_file(weights).items()}
    safetensors.torch.save_file(changed, weights)
    with pytest.raises(DsrlError, match="expected the base that the run began with.*weights: expected sha256"):
        train(recipe, out, resume=True)
    shutil.copytree(fork_folder, folder, dirs_exist_ok=True)
    assert train(recipe, out, resume=True, evaluate_after=False).head is not None


def test_a_run_is_not_gone_on_with_on_other_offline_data(fork_folder, fork_base, tmp_path, monkeypatch):
    from dsrl_vla.cli import main

    made, out = tree(fork_folder), tmp_path / "run"
    made["algorithm"], made["offline"] = "na", {"source": str(tmp_path / "data.npz"), "updates": 4}
    recipe = load_recipe("drawer-open", made)
    (tmp_path / "plain.yaml").write_text(load_recipe("drawer-open", made | {"offline": {}}).to_yaml())

    def record(skip):
        (tmp_path / "data.npz").unlink(missing_ok=True)
        options = ["--episodes", "3", "--skip", skip, "--out", str(tmp_path / "data.npz")]
        assert not main(["record", str(tmp_path / "plain.yaml"), *options])

    record("0")
    cut(recipe, out, 45, monkeypatch)
    record("3")
    with pytest.raises(DsrlError, match="offline.source: expected the data that the run began with, got others"):
        train(recipe, out, resume=True)
    record("0")
    train(recipe, out, resume=True, evaluate_after=False)


def test_only_one_process_at_a_time_is_at_a_run(fork_folder, tmp_path, monkeypatch):
    recipe, out, refused = recipe_of(fork_folder, env_steps=400), tmp_path / "run", []
    original = Collector.step

    def step(self, warm_up):
        if not refused:
            with pytest.raises(DsrlError, match="expected a run that no process is at") as error:
                train(recipe, out, resume=True)
            with pytest.raises(DsrlError, match="expected a run that no process is at"):
                train(recipe_of(fork_folder, env_steps=500), out)
            assert load_recipe(out / "recipe.yaml") == recipe
            refused.append(error)
        original(self, warm_up)

    monkeypatch.setattr(Collector, "step", step)
    train(recipe, out, evaluate_after=False)
    assert refused and train(recipe, out, resume=True, evaluate_after=False).head is not None


def test_half_a_decision_is_saved_by_nobody(fork_folder, tmp_path, monkeypatch):
    """Not even in the place of a checkpoint that the disk did not take."""
    recipe, out, disk = recipe_of(fork_folder, checkpoint_every=100), tmp_path / "run", FullDisk(monkeypatch)
    store = Collector._store

    def interrupted(self, *args):
        disk.full = self.env_steps < 300
        if self.env_steps >= 300:
            raise KeyboardInterrupt
        return store(self, *args)

    monkeypatch.setattr(Collector, "_store", interrupted)
    assert train(recipe, out).interrupted and not checkpoints(out / "checkpoints")


def test_outside_the_main_thread_a_run_trains_as_well(fork_folder, tmp_path):
    recipe = recipe_of(fork_folder, env_steps=300)
    worker = threading.Thread(target=train, args=(recipe, tmp_path / "run"), kwargs={"evaluate_after": False})
    worker.start()
    worker.join()
    assert load_checkpoint(tmp_path / "run" / "checkpoints")[1]["env_steps"] >= 300


# What is not finite


def test_a_loss_that_is_not_finite_is_undone_and_counted(fork_folder, tmp_path, monkeypatch, caplog):
    recipe, out = recipe_of(fork_folder), tmp_path / "run"
    original = LatentSAC.update

    def poisoned(self, batch):
        if self.updates in (60, 61, 150):
            batch.reward[0] = float("nan")
        return original(self, batch)

    monkeypatch.setattr(LatentSAC, "update", poisoned)
    run = train(recipe, out)
    assert caplog.text.count("a loss or weight that is not finite") >= 2 and run.evaluation["env_steps"] >= 1500
    tensors, _ = load_checkpoint(out / "checkpoints")
    assert all(torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point())


def test_undoing_the_first_updates_leaves_the_normaliser_fitted(fork_folder, tmp_path, monkeypatch):
    original = LatentSAC.update

    def update(self, batch):
        poisoned = replace(batch, reward=batch.reward * float("nan")) if self.updates == 3 else batch
        return original(self, poisoned)

    monkeypatch.setattr(LatentSAC, "update", update)
    head = train(recipe_of(fork_folder), tmp_path / "run", evaluate_after=False).head
    assert head.eyes.normalise.state_mean.abs().sum() > 0


def test_after_too_many_the_run_stops_and_the_last_good_checkpoint_is_intact(fork_folder, tmp_path, monkeypatch):
    recipe, out = recipe_of(fork_folder, max_faults=5), tmp_path / "run"
    original, since = LatentSAC.update, []

    def poisoned(self, batch):
        if self.updates >= 100:
            since.append(1)
            batch.reward[:] = float("nan")
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(LatentSAC, "update", poisoned)
        words = r"got 5 x loss; .*max_faults is 5.*newest checkpoint.* is from before and sound.*--resume"
        with pytest.raises(TooManyFaultsError, match=words):
            train(recipe, out)
    assert len(since) <= 5 * 2  # two updates a decision
    tensors, state = load_checkpoint(out / "checkpoints")
    assert all(torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point())
    assert train(recipe, out, resume=True).evaluation["env_steps"] >= 1500 and state["env_steps"] < 1500


def test_weights_that_are_not_finite_are_never_checkpointed(fork_folder, tmp_path, monkeypatch):
    """Finite losses, poisoned weights: what a NaN gradient in the very last update leaves."""
    recipe, out = recipe_of(fork_folder, max_faults=6), tmp_path / "run"
    original = LatentSAC.update

    def poisoned(self, batch):
        info = original(self, batch)
        if self.updates > 100:
            next(self.head.parameters()).data.fill_(float("nan"))
            return {name: torch.zeros_like(value) for name, value in info.items()}
        return info

    monkeypatch.setattr(LatentSAC, "update", poisoned)
    with pytest.raises(TooManyFaultsError):
        train(recipe, out)
    tensors, _ = load_checkpoint(out / "checkpoints")
    assert all(torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point())


@pytest.mark.parametrize("what", ["reward", "observation", "reset", "first reset"])
def test_an_episode_that_is_not_finite_is_dropped(fork_folder, tmp_path, monkeypatch, caplog, what):
    recipe, out = recipe_of(fork_folder), tmp_path / "run"
    real_advance, real_observe, real_begin = Fork.advance, Fork.observe, Fork.begin
    ill = {1_000_000, 1_000_003} if what == "first reset" else {1_000_004, 1_000_007}

    def begin(self, seed):
        real_begin(self, seed)
        self.ill, self.count = seed in ill, 0

    def advance(self, action):
        assert np.isfinite(action).all()
        self.count += 1
        reward, success, over = real_advance(self, action)
        return (float("nan") if self.ill and what == "reward" and self.count == 9 else reward), success, over

    def observe(self):
        seen = real_observe(self)
        if self.ill and ((what == "observation" and self.count > 8) or (what.endswith("reset") and self.count == 0)):
            seen["observation.state"][1] = float("nan")
        return seen

    for name, function in (("begin", begin), ("advance", advance), ("observe", observe)):
        monkeypatch.setattr(Fork, name, function)
    train(recipe, out, evaluate_after=False)
    tensors, state = load_checkpoint(out / "checkpoints")
    assert state["collector"]["faults"] == {"reset" if what.endswith("reset") else "episode": 2}
    assert f"episode of seed {min(ill)}" in caplog.text and state["env_steps"] >= 1500
    assert all(torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point())


def test_an_episode_of_validation_that_is_not_finite_is_lost_and_the_others_go_on(fork_folder, tmp_path, monkeypatch):
    from dsrl_vla import seeds
    from dsrl_vla.trainer import Trainer

    observe, begin, played = Fork.observe, Fork.begin, []

    def beginning(self, seed):
        begin(self, seed)
        self.ill = seed == seeds.VALIDATION + 1

    def observing(self):
        seen = observe(self)
        seen["observation.state"][1] *= float("nan") if self.ill else 1.0
        return seen

    def playing(self, head, first, episodes, tick=None):
        return play(self, head, first, episodes, played.append)

    play = Trainer.play
    for owner, name, function in (
        (Fork, "begin", beginning),
        (Fork, "observe", observing),
        (Trainer, "play", playing),
    ):
        monkeypatch.setattr(owner, name, function)
    train(recipe_of(fork_folder), tmp_path / "run", evaluate_after=False)
    _, state = load_checkpoint(tmp_path / "run" / "checkpoints")
    lost = [episode for episode in played if episode.seed == seeds.VALIDATION + 1]
    assert lost and not any(episode.success for episode in lost)
    assert any(episode.success for episode in played)
    assert state["collector"]["faults"] == {"episode": len(lost)}


def test_a_base_that_answers_nan_now_and_then_moves_nothing(fork_folder, fork_base, tmp_path, monkeypatch):
    recipe, out, calls = recipe_of(fork_folder), tmp_path / "run", []
    real_denoise, real_advance = type(fork_base)._denoise, Fork.advance

    def denoise(self, encoding, noise):
        calls.append(1)
        actions = real_denoise(self, encoding, noise)
        if len(calls) in (60, 75):
            actions[0] = float("nan")
        return actions

    def advance(self, action):
        assert np.isfinite(action).all()
        return real_advance(self, action)

    monkeypatch.setattr(type(fork_base), "_denoise", denoise)
    monkeypatch.setattr(Fork, "advance", advance)
    train(recipe, out, evaluate_after=False)
    assert load_checkpoint(out / "checkpoints")[1]["collector"]["faults"] == {"episode": 2}


# Full disks


class FullDisk:
    """A disk that is full while `full` is set."""

    def __init__(self, monkeypatch):
        import errno

        import safetensors.torch

        self.full, real, replace = False, safetensors.torch.save_file, os.replace

        def check():
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(safetensors.torch, "save_file", lambda *a, **k: (check(), real(*a, **k)))
        monkeypatch.setattr(os, "replace", lambda *a, **k: (check(), replace(*a, **k)))


def test_a_disk_that_is_full_for_a_while_is_survived(fork_folder, tmp_path, monkeypatch, caplog):
    recipe, out, disk = recipe_of(fork_folder), tmp_path / "run", FullDisk(monkeypatch)
    original = Collector.step

    def step(self, warm_up):
        disk.full = 400 < self.env_steps < 1100
        original(self, warm_up)

    monkeypatch.setattr(Collector, "step", step)
    run = train(recipe, out)
    assert "checkpoint not written, going on without" in caplog.text and "got a full one" in caplog.text
    assert run.evaluation["env_steps"] >= 1500 and load_checkpoint(out / "checkpoints")[1]["env_steps"] >= 1500
    assert not list(out.rglob(".*"))
    monkeypatch.undo()
    train(recipe, tmp_path / "straight", evaluate_after=False)
    assert equal(last(out), last(tmp_path / "straight"))


def test_a_disk_that_stays_full_is_an_error_at_the_end_and_the_last_checkpoint_is_there(
    fork_folder, tmp_path, monkeypatch
):
    recipe, out, disk = recipe_of(fork_folder), tmp_path / "run", FullDisk(monkeypatch)
    original, seen = Collector.step, []

    def step(self, warm_up):
        disk.full = disk.full or self.env_steps > 400
        seen.append(self.env_steps)
        original(self, warm_up)

    monkeypatch.setattr(Collector, "step", step)
    with pytest.raises(DsrlError, match="expected all of the run to be written, got no .*checkpoint.* a full one"):
        train(recipe, out)
    assert max(seen) > 1400  # the run went on
    assert 300 <= load_checkpoint(out / "checkpoints")[1]["env_steps"] < 500
    monkeypatch.undo()
    train(recipe, out, resume=True, evaluate_after=False)
    train(recipe, tmp_path / "straight", evaluate_after=False)
    assert equal(last(out), last(tmp_path / "straight"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "expected room on the disk, got a full one"),
        (safetensors.SafetensorError(f"I/O error: (os error {errno.EDQUOT})"), "expected room on the disk"),
        (safetensors.SafetensorError("I/O error: (os error 5)"), "expected a disk that takes what is written, got"),
    ],
)
def test_what_else_a_disk_may_say_is_no_end_of_a_run_either(error, words, tmp_path, caplog):
    from dsrl_vla.run_dir import disk_errors
    from dsrl_vla.writing import Writing

    def write():
        with disk_errors(tmp_path):
            raise error

    writing = Writing()
    writing.attempt("checkpoint", write)
    assert words in writing.lost["checkpoint"][1] and "going on without" in caplog.text


def test_a_full_disk_costs_neither_the_best_head_nor_its_action_critic(fork_folder, tmp_path, monkeypatch):
    recipe, out, disk = recipe_of(fork_folder, "na"), tmp_path / "run", FullDisk(monkeypatch)
    original = Collector.step

    def step(self, warm_up):
        disk.full = 400 < self.env_steps < 1450  # over all validations but the last
        original(self, warm_up)

    monkeypatch.setattr(Collector, "step", step)
    monkeypatch.setattr(trainer, "measure", falling())
    train(recipe, out, evaluate_after=False)
    assert {"head.safetensors", "action_critic.safetensors"} <= {path.name for path in (out / "best").iterdir()}
    assert json.loads((out / "finalists.json").read_text())["finalists"][0]["mean"] == 1.0


def falling():
    """Validations that get worse, so that the first stays the best."""
    scores = iter([1.0, 0.5, 0.25, 0.0, 0.0])

    def measured(*args, **kwargs):
        score = next(scores)
        return Measure(tuple(Episode(i, i < 4 * score, 10, 0.0) for i in range(4)))

    return measured


def test_lines_that_could_not_be_written_come_with_the_next(tmp_path, monkeypatch):
    import resource

    metrics = Metrics(tmp_path / "m" / "metrics.jsonl")
    metrics.append({"env_steps": 1})
    assert metrics.pending
    (tmp_path / "m").mkdir()
    metrics.append({"env_steps": 2})
    assert [r["env_steps"] for r in metrics.rows()] == [1, 2] and not metrics.pending
    with metrics.path.open("a") as file:
        file.write('{"env_steps": 3, "tor')  # cut short by a crash
    metrics.append({"env_steps": 4})
    assert [r["env_steps"] for r in metrics.rows()] == [1, 2, 4]
    size, limits = metrics.path.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limits[1]))  # the disk takes one line, and a bit
    try:
        for number in (5, 6, 7):
            metrics.append({"env_steps": number})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    metrics.append({"env_steps": 8})
    assert [r["env_steps"] for r in metrics.rows()] == [1, 2, 4, 5, 6, 7, 8]
    shutil.rmtree(tmp_path / "m")


@pytest.mark.usefixtures("at_a_terminal")
def test_one_signal_finishes_the_decision_and_on_a_robot_stops_it():
    from dsrl_vla.interrupts import stop_requests

    with stop_requests() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        with stop_requests(at_once=True), pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)


def test_a_run_under_nohup_outlives_its_terminal():
    from dsrl_vla.interrupts import stop_requests

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as asked:
            signal.raise_signal(signal.SIGHUP)
            assert not asked.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)
