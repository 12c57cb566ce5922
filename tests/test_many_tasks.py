"""One head, many tasks: mixed rollouts, evaluation task by task."""

import json
from dataclasses import replace

import numpy as np
import pytest
from dsrl_vla import load_recipe, rollout, train
from dsrl_vla.adapters.flow_mlp import FlowMLP, FlowMLPConfig, clone_flow_mlp
from dsrl_vla.episodes import run_episodes
from dsrl_vla.errors import DsrlError
from dsrl_vla.rollout import TaskConfig, VectorTask
from dsrl_vla.sources import PriorNoise
from dsrl_vla.tables import print_evaluation
from dsrl_vla.tasks.point import demonstrate
from dsrl_vla.trainer import Trainer

BOTH = TaskConfig("point:fork", 40, 5, more=("point:mirror",))


@pytest.fixture(scope="module")
def both_folder(tmp_path_factory):
    """A base cloned on demonstrations of both tasks, half of which take the wrong side."""
    episodes = [demonstrate(seed, name=name) for seed in range(120) for name in ("fork", "mirror")]
    base = FlowMLP(clone_flow_mlp(episodes, FlowMLPConfig(4, 2), steps=1500))
    folder = tmp_path_factory.mktemp("both")
    base.save_pretrained(folder)
    return folder


def test_environments_take_turns_and_speak_their_own_prompts(nano):
    config = TaskConfig("metaworld:drawer-open-v3", 120, 3, more=("metaworld:push-v3",))
    with VectorTask(config, nano.spec.executed_steps) as task:
        assert [uri.split(":")[1] for uri in task.uris] == ["drawer-open-v3", "push-v3", "drawer-open-v3"]
        prompts = task.reset([0, 0, 0])["task"]
        assert prompts[0] == prompts[2] != prompts[1]


def test_every_task_plays_every_seed_as_it_would_alone(fork_base):
    prior = PriorNoise(fork_base.spec.noise)
    with VectorTask(BOTH, fork_base.spec.executed_steps) as task:
        both = run_episodes(fork_base, task, prior, range(9))
    assert [(e.task, e.seed) for e in both] == [(uri, s) for uri in BOTH.uris for s in range(9)]
    for uri in BOTH.uris:
        with VectorTask(TaskConfig(uri, 40, 3), fork_base.spec.executed_steps) as task:
            alone = run_episodes(fork_base, task, prior, range(9))
        assert alone == [e for e in both if e.task == uri]


def test_one_head_learns_two_tasks_that_want_opposite_noise(both_folder, tmp_path, capsys):
    """Whatever constant noise does for one, it undoes for the other: only looking at the task helps."""
    tree = {
        "base": {"uri": f"flow-mlp:{both_folder}"},
        "task": {"uri": "point:fork", "more": ["point:mirror"], "max_episode_steps": 40, "num_envs": 10},
        "head": {"network": {"width": 32, "layers": 1}},
        "critic": {"network": {"width": 32, "layers": 1}},
        "sac": {"batch": 64, "gamma": 0.95, "actor_lr": 1e-3, "critic_lr": 1e-3},
        "train": {"env_steps": 16000, "learning_starts": 200, "gradient_steps": 0.5, "validate_every": 2000,
                  "validation_episodes": 15, "stop_at": 0.95},
        "eval": {"episodes": 30, "video_episodes": 1},
    }  # fmt: skip
    result = train(load_recipe("drawer-open", tree), tmp_path / "run").evaluation
    print_evaluation(result)
    assert result["episodes"] == 60 and set(result["tasks"]) == set(BOTH.uris)
    assert result["base"]["success"] < 0.7 and result["steered"]["success"] >= 0.85
    for one in result["tasks"].values():
        assert one["steered"]["success"] >= 0.75
    assert "point:mirror" in capsys.readouterr().out
    pooled = [t["steered"]["success"] for t in result["tasks"].values()]
    assert np.isclose(np.mean(pooled), result["steered"]["success"])
    assert json.loads((tmp_path / "run" / "eval.json").read_text()) == result
    assert (tmp_path / "run" / "rollouts.mp4").stat().st_size > 0


def test_tasks_that_do_not_fit_together_are_refused():
    with pytest.raises(DsrlError, match="task.num_envs: expected 2 or more, one for every task, got 1"):
        TaskConfig("point:fork", 40, 1, more=("point:mirror",))
    with pytest.raises(DsrlError, match="task.more: expected tasks with the same observation and action spaces"):
        VectorTask(TaskConfig("point:fork", 40, 2, more=("metaworld:push-v3",)), 4)


def other_info(monkeypatch, **change):
    """point:mirror with something else in its `TaskInfo`."""
    make = rollout.make_task

    def made(uri, **options):
        env = make(uri, **options)
        if uri == "point:mirror":
            env.info = replace(env.info, **change)
        return env

    monkeypatch.setattr(rollout, "make_task", made)


def test_tasks_that_are_measured_otherwise_are_refused(monkeypatch):
    other_info(monkeypatch, measure="return")
    with pytest.raises(DsrlError, match="task.more: expected tasks that are measured alike, got return and success"):
        VectorTask(BOTH, 4)


def test_no_value_is_cut_to_what_another_task_can_give(both_folder, tmp_path, monkeypatch):
    other_info(monkeypatch, reward_range=(-7.0, 3.0))
    recipe = load_recipe("drawer-open", {"base": {"uri": f"flow-mlp:{both_folder}"}, "sac": {"gamma": 0.5}})
    base = recipe.base.load()
    with VectorTask(BOTH, 4) as task:
        made = Trainer(recipe, base, task, task, tmp_path)
    assert made.learner.bounds == (-12.0, 8.0) and task.infos[0].reward_range == (-1.0, 0.0)
