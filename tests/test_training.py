import errno
import json
import signal

import imageio.v3 as iio
import numpy as np
import pytest
import yaml
from dsrl_vla import SteeredPolicy, SteeringHead, load_recipe, train
from dsrl_vla.cli import main
from dsrl_vla.collect import Collector
from dsrl_vla.errors import DsrlError, MissingExtraError
from dsrl_vla.latent_sac import LatentSAC
from dsrl_vla.run_dir import Metrics, load_checkpoint, save_checkpoint
from dsrl_vla.training import load_run

EVAL_KEYS = {
    "task", "episodes", "seeds", "base", "steered", "steered_stochastic", "controls", "env_steps",
    "train_seconds", "base_sha256_before", "base_sha256_after",
}  # fmt: skip


def test_steering_turns_a_coin_flip_into_success(fork_recipe, fork_base, tmp_path):
    """A real run: the base takes the walled side half of the time, and zero noise the pillar."""
    recipe = load_recipe(fork_recipe, {
        "train": {"env_steps": 12_000, "gradient_steps": 1.0, "validate_every": 2_000,
                  "validation_episodes": 20, "stop_at": 1.0},
        "eval": {"episodes": 60, "video_episodes": 0},
    })  # fmt: skip
    run = train(recipe, tmp_path / "run", base=fork_base)
    result = run.evaluation
    assert 0.25 <= result["base"]["success"] <= 0.75
    assert result["steered"]["success"] >= 0.95
    assert result["steered"]["ci95"][0] > max(c["ci95"][1] for c in [result["base"], *result["controls"].values()])
    assert result["difference"]["ci95"][0] > 0.1
    assert result["base_sha256_before"] == result["base_sha256_after"]


@pytest.fixture(scope="module")
def finished(fork_folder, tmp_path_factory):
    """A short finished run, with everything it leaves behind."""
    out = tmp_path_factory.mktemp("runs") / "short"
    recipe = load_recipe("drawer-open", short(fork_folder))
    return recipe, train(recipe, out), out


def short(folder, **train_fields):
    return {
        "name": "short",
        "base": {"uri": f"flow-mlp:{folder}"},
        "task": {"uri": "point:fork", "max_episode_steps": 40, "num_envs": 4},
        "head": {"network": {"width": 16, "layers": 1}},
        "critic": {"network": {"width": 16, "layers": 1}},
        "train": {"env_steps": 1500, "learning_starts": 32, "gradient_steps": 0.2, "validate_every": 500,
                  "stop_at": None,
                  "validation_episodes": 4, "checkpoint_every": 500} | train_fields,
        "eval": {"episodes": 6, "video_episodes": 1},
    }  # fmt: skip


def test_a_run_directory_holds_what_it_should(finished):
    recipe, run, out = finished
    assert load_recipe(out / "recipe.yaml") == recipe
    result = json.loads((out / "eval.json").read_text())
    assert set(result) >= EVAL_KEYS and result == run.evaluation
    assert set(result["controls"]) == {"zero", "clipped", "layout"}
    for measure in (result["base"], result["steered"], result["steered_stochastic"], *result["controls"].values()):
        assert 0 <= measure["ci95"][0] <= measure["success"] <= measure["ci95"][1] <= 1
    rows = Metrics(out / "metrics.jsonl").rows()
    assert [r["env_steps"] for r in rows] == sorted(r["env_steps"] for r in rows)
    assert sum("validation_success" in r for r in rows) >= 3
    assert len(list((out / "checkpoints").glob("step_*"))) == 2
    assert iio.imread(out / "curves.png").shape[2] >= 3


def test_the_video_shows_base_and_steered_side_by_side(finished):
    frames = iio.imread(finished[2] / "rollouts.mp4", plugin="pyav")
    assert frames.shape[1:] == (256, 512, 3) and len(frames) >= 11
    assert frames.std() > 10


def test_a_finished_run_gives_its_head_back(finished, fork_base, observation):
    _, run, out = finished
    recipe, head = load_run(out)
    seen = observation(fork_base)
    assert recipe.name == "short"
    assert np.array_equal(SteeredPolicy(fork_base, head).act(seen), SteeredPolicy(fork_base, run.head).act(seen))
    with pytest.raises(DsrlError, match="expected a run's directory"):
        load_run(out / "checkpoints")


def test_runs_are_not_overwritten_and_resumed_only_with_their_recipe(finished, fork_folder, tmp_path):
    recipe, _, out = finished
    with pytest.raises(DsrlError, match="Choose another --out, or go on with --resume"):
        train(recipe, out)
    other = load_recipe("drawer-open", short(fork_folder, seed=5))
    with pytest.raises(DsrlError, match="expected the recipe this run was started with"):
        train(other, out, resume=True)
    with pytest.raises(DsrlError, match="no recipe.yaml there"):
        train(recipe, tmp_path / "new", resume=True)
    with pytest.raises(DsrlError, match="no recipe.yaml there"):
        train("demo", tmp_path / "new", resume=True)  # by its name


def test_ctrl_c_saves_and_resume_finishes(fork_folder, tmp_path, monkeypatch, caplog):
    recipe, out = load_recipe("drawer-open", short(fork_folder)), tmp_path / "run"
    original, calls = Collector.step, []

    def interrupted(self, warm_up):
        calls.append(1)
        if len(calls) == 60:
            raise KeyboardInterrupt
        original(self, warm_up)

    with monkeypatch.context() as patch:
        patch.setattr(Collector, "step", interrupted)
        run = train(recipe, out)
    assert run.interrupted and run.evaluation is None and "--resume" in caplog.text
    _, state = load_checkpoint(out / "checkpoints")
    assert 0 < state["env_steps"] < 1500 and state["updates"] > 0
    run = train(recipe, out, resume=True)
    assert run.evaluation["env_steps"] >= 1500
    steps = [r["env_steps"] for r in Metrics(out / "metrics.jsonl").rows()]
    assert steps == sorted(steps)


def test_ctrl_c_while_learning_offline_is_no_finished_run(fork_recipe, fork_folder, tmp_path, monkeypatch, caplog):
    data, original = tmp_path / "fork.npz", LatentSAC.update
    assert main(["record", str(fork_recipe), "--out", str(data), "--episodes", "8"]) == 0
    tree = short(fork_folder, env_steps=0) | {"algorithm": "na", "offline": {"source": str(data), "updates": 40}}
    recipe, out = load_recipe("drawer-open", tree), tmp_path / "run"

    def update(self, batch):
        if self.updates == 24:
            signal.raise_signal(signal.SIGINT)
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(LatentSAC, "update", update)
        assert train(recipe, out).evaluation is None
    assert f"dsrl-vla train {out}/recipe.yaml --out {out} --resume" in caplog.text
    assert load_checkpoint(out / "checkpoints")[1]["updates"] == 25
    assert train(recipe, out, resume=True).evaluation["updates"] == 40
    assert isinstance(SteeringHead.from_pretrained(out / "best"), SteeringHead)


def test_a_start_that_failed_does_not_hold_the_directory(fork_folder, tmp_path):
    tree, out = short(fork_folder), tmp_path / "run"
    with pytest.raises(DsrlError, match="a folder with config.json"):
        train(load_recipe("drawer-open", tree | {"base": {"uri": "flow-mlp:/nowhere"}}), out)
    train(load_recipe("drawer-open", tree), out, evaluate_after=False)
    with pytest.raises(DsrlError, match="expected a new directory, got one that holds a run"):
        train(load_recipe("drawer-open", tree), out)
    other = load_recipe("drawer-open", tree | {"sac": {"gamma": 0.5}})
    with pytest.raises(DsrlError, match=r"another one, which differs in .*sac.gamma.* Give the same options again"):
        train(other, out, resume=True)


def test_a_base_that_is_not_the_recipes_is_said(fork_folder, fork_base, tmp_path, caplog):
    train(load_recipe("drawer-open", short(fork_folder)), tmp_path / "run", base=fork_base, evaluate_after=False)
    assert (
        f"the base is 'flow-mlp:', but other commands will load the recipe's, 'flow-mlp:{fork_folder}'" in caplog.text
    )


def test_the_warm_up_lasts_until_there_is_something_to_learn_from(fork_folder, tmp_path):
    recipe = load_recipe("drawer-open", short(fork_folder, learning_starts=1))
    assert train(recipe, tmp_path / "run", evaluate_after=False).head


def test_a_camera_that_the_task_lacks_is_refused_at_once(fork_folder, tmp_path):
    recipe = load_recipe("drawer-open", short(fork_folder) | {"head": {"cameras": ["wrist"]}})
    with pytest.raises(DsrlError, match=r"head.cameras: expected cameras of the task 'point:fork' .* got 'wrist'"):
        train(recipe, tmp_path / "run")


def test_a_run_that_ends_before_it_has_learnt_is_an_error(fork_folder, tmp_path):
    recipe = load_recipe("drawer-open", short(fork_folder, env_steps=600, learning_starts=500))
    wanted = r"more than the 500 decisions of train.learning_starts, got \d+ decisions: nothing has been learnt"
    with pytest.raises(DsrlError, match=wanted + r"\. About \d{4} steps make so many"):
        train(recipe, tmp_path / "run")


def test_what_returns_over_many_decisions_take_is_told_as_what_kept_it_from_learning(fork_folder, tmp_path, caplog):
    recipe = load_recipe("drawer-open", short(fork_folder, env_steps=40, learning_starts=8, gradient_steps=3))
    wanted = r"more than the 40 decisions of the first returns over sac.n_step in task.num_envs environments"
    with pytest.raises(DsrlError, match=wanted + ", got 12 decisions: nothing has been learnt. About 160 steps"):
        train(recipe, tmp_path / "run")
    assert "train.env_steps 40 may not do for the 40 decisions of the first returns" in caplog.text
    enough = load_recipe("drawer-open", short(fork_folder, env_steps=161, learning_starts=8, gradient_steps=3))
    assert train(enough, tmp_path / "enough", evaluate_after=False).head


def test_a_broken_newest_checkpoint_falls_back_to_the_one_before(finished, fork_folder, tmp_path):
    import shutil

    recipe, _, out = finished
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    older, newest = sorted((copy / "checkpoints").glob("step_*"))
    (newest / "tensors.safetensors").write_bytes(b"half a file")
    _, state = load_checkpoint(copy / "checkpoints")
    assert f"step_{state['env_steps']:09d}" == older.name
    (older / "state.json").write_text("{")
    with pytest.raises(DsrlError, match="expected a checkpoint that can be read"):
        load_checkpoint(copy / "checkpoints")


def test_a_full_disk_is_said_and_the_last_checkpoint_is_left_alone(tmp_path, monkeypatch):
    import safetensors.torch
    import torch

    save_checkpoint(tmp_path, 1, {"x": torch.ones(2)}, {"env_steps": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(DsrlError, match=r"expected room on the disk, got a full one .* --resume"):
        save_checkpoint(tmp_path, 2, {"x": torch.zeros(2)}, {"env_steps": 2})
    tensors, state = load_checkpoint(tmp_path)
    assert state["env_steps"] == 1 and torch.equal(tensors["x"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["step_000000001"]


def test_a_tracker_gets_the_curve(fork_folder, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = load_recipe("drawer-open", short(fork_folder, env_steps=600, tracker="tensorboard"))
    train(recipe, tmp_path / "run", evaluate_after=False)
    events = next((tmp_path / "run").rglob("events.out.tfevents.*"))
    found = EventAccumulator(str(events.parent))
    found.Reload()
    assert {"success", "q", "validation_success"} <= set(found.Tags()["scalars"])


@pytest.mark.parametrize(
    ("method", "error", "said"),
    [
        (
            "log",
            OSError("No space left on device"),
            "the tracker failed, and is done without: No space left on device",
        ),
        (
            "init_trackers",
            RuntimeError("api_key not configured\nlog in"),
            "the tracker 'tensorboard' does not start, and is done without: api_key not configured",
        ),
    ],
)
def test_a_tracker_that_fails_is_done_without(method, error, said, fork_folder, tmp_path, monkeypatch, caplog):
    from accelerate import Accelerator

    def failing(*_, **__):
        raise error

    monkeypatch.setattr(Accelerator, method, failing)
    recipe = load_recipe("drawer-open", short(fork_folder, env_steps=600, tracker="tensorboard"))
    assert not train(recipe, tmp_path / "run", evaluate_after=False).interrupted
    assert caplog.text.count(said) == 1


def test_a_tracker_that_is_not_installed_names_the_command(fork_folder, tmp_path, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    recipe = load_recipe("drawer-open", short(fork_folder, tracker="wandb"))
    with pytest.raises(MissingExtraError, match=r"pip install 'dsrl-vla\[wandb\]'"):
        train(recipe, tmp_path / "run")


def test_the_best_head_is_what_is_kept(finished):
    rows = [r for r in Metrics(finished[2] / "metrics.jsonl").rows() if "validation_success" in r]
    assert isinstance(SteeringHead.from_pretrained(finished[2] / "best"), SteeringHead)
    found = json.loads((finished[2] / "finalists.json").read_text())["finalists"]
    assert [each["mean"] for each in found] == [max(r["validation_success"] for r in rows)]


def test_a_heads_folder_is_not_trained_into(finished, fork_folder, tmp_path):
    finished[1].head.save_pretrained(tmp_path / "head")
    with pytest.raises(DsrlError, match="a new directory, got one that holds a head"):
        train(load_recipe("drawer-open", short(fork_folder)), tmp_path / "head")


def test_a_recipe_of_ones_own_is_not_written_over(fork_folder, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    path = out / "recipe.yaml"
    path.write_text("# mine\n" + yaml.safe_dump(short(fork_folder) | {"extends": "drawer-open"}))
    with pytest.raises(DsrlError, match="a new directory, got one with a recipe of your own"):
        train(load_recipe(path), out, evaluate_after=False)
    assert path.read_text().startswith("# mine")


def test_layout_auto_takes_preflights_word_and_a_resumed_run_its_first_one(fork_folder, tmp_path, monkeypatch):
    import dsrl_vla.steerability as steerability

    short_preflight = steerability.PreflightConfig(episodes=8, best_of=2, layouts=("chunk", "knots:2"), bounds=(1.0,))
    monkeypatch.setattr(steerability, "PreflightConfig", lambda columns: short_preflight)
    tree = short(fork_folder)
    tree["noise"] = {"layout": "auto"}
    recipe, out = load_recipe("drawer-open", tree), tmp_path / "run"
    run = train(recipe, out, evaluate_after=False)
    advice = json.loads((out / "preflight.json").read_text())["recommendation"]
    assert (run.head.layout.name, run.head.layout.bound) == (advice["layout"], 1.0)
    monkeypatch.setattr(steerability, "preflight", None)
    again = train(recipe, out, resume=True, evaluate_after=False)
    assert again.head.layout == run.head.layout
    with pytest.raises(DsrlError, match="noise.layout: expected a layout by name here, got auto"):
        recipe.noise.over(run.head.layout.space)
