"""Several processes that share the updates take the steps that one takes; the real launcher starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from dsrl_vla import load_recipe, train
from dsrl_vla.draws import Share, normal, uniform
from dsrl_vla.errors import DsrlError
from dsrl_vla.run_dir import load_checkpoint

CHILD = """
import sys
from dsrl_vla import load_recipe, train
run = train(load_recipe(sys.argv[1]), sys.argv[2], resume=len(sys.argv) > 3, evaluate_after=False)
run.head.save_pretrained(sys.argv[2] + ("-leader" if run.leads else "-follower"))
"""


def launch(*arguments, module=None, processes=2):
    """Run by accelerate's launcher, on CPUs."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1", "--mixed_precision",
                "no", "--dynamo_backend", "no", "--num_processes", str(processes), "--main_process_port", "0"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run([*launcher, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=300)


def tree(folder, algorithm, **more):
    return {
        "name": "short",
        "base": {"uri": f"flow-mlp:{folder}"},
        "task": {"uri": "point:fork", "max_episode_steps": 40, "num_envs": 4},
        "head": {"network": {"width": 16, "layers": 1}},
        "critic": {"network": {"width": 16, "layers": 1}},
        "algorithm": algorithm,
        "sac": {"batch": 64, "n_step": 3},
        "train": {"env_steps": 700, "learning_starts": 32, "gradient_steps": 0.5, "validate_every": 300,
                  "stop_at": None, "validation_episodes": 4, "checkpoint_every": 300},
        "eval": {"episodes": 4, "video_episodes": 0, "controls": False},
    } | more  # fmt: skip


@pytest.fixture
def written(fork_folder, tmp_path):
    """Writes a recipe; returns it, and its file."""

    def write(algorithm="sac", **more):
        path = tmp_path / "short.yaml"
        path.write_text(yaml.safe_dump({"extends": "drawer-open"} | tree(fork_folder, algorithm, **more)))
        return load_recipe(path), path

    return write


@pytest.mark.parametrize("algorithm, more", [("sac", {}), ("na", {"rollout": {"backend": "process"}})])
def test_two_processes_do_what_one_does(written, tmp_path, algorithm, more):
    recipe, path = written(algorithm, **more)
    (tmp_path / "child.py").write_text(CHILD)
    train(recipe, tmp_path / "one", evaluate_after=False)
    done = launch(tmp_path / "child.py", path, tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    (tensors, state), (others, other) = (load_checkpoint(tmp_path / name / "checkpoints") for name in ("one", "two"))
    assert state["updates"] == other["updates"] > 40 and state["env_steps"] == other["env_steps"]
    assert torch.equal(tensors["learner.generator"], others["learner.generator"])
    for name, tensor in tensors.items():
        if name.startswith(("learner.", "info.")) and tensor.is_floating_point():
            torch.testing.assert_close(others[name], tensor, rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
    for name in ("follower", "leader"):
        assert (tmp_path / f"two-{name}" / "head.safetensors").exists()
    print(done.stderr)


