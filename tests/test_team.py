"""Several processes that share the updates take the steps that one takes; the real launcher starts them."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from dsrl_vla import load_recipe, train
from dsrl_vla.draws import Share, normal, uniform
from dsrl_vla.errors import DsrlError
from dsrl_vla.offline_sources import write_npz
from dsrl_vla.recording import record
from dsrl_vla.rollout import TaskConfig
from dsrl_vla.run_dir import load_checkpoint
from dsrl_vla.sources import PriorNoise

CHILD = """
import atexit, os, sys
from pathlib import Path

def count_threads():
    tasks = Path("/proc/self/task")  # of Linux
    left = sum("gloo" in task.joinpath("comm").read_text() for task in tasks.glob("*"))
    Path(sys.argv[2]).with_name("gloo-" + os.environ["RANK"]).write_text(str(left))

if __name__ == "__main__":
    atexit.register(count_threads)  # first, so that it is called last

from dsrl_vla import load_recipe, train

if __name__ == "__main__":
    run = train(load_recipe(sys.argv[1]), sys.argv[2], resume=len(sys.argv) > 3, evaluate_after=False)
    run.head.save_pretrained(sys.argv[2] + ("-leader" if run.leads else "-follower"))
"""

FAULT = """
import os
from dsrl_vla.latent_sac import LatentSAC

update = LatentSAC.update

def failing(self, batch):
    if os.environ["RANK"] == "{rank}" and self.updates == 7:
        {fault}
    return update(self, batch)

LatentSAC.update = failing
"""


def launch(*arguments, processes=2):
    """Run by accelerate's launcher: `--multi_gpu` makes it start several processes, which find no GPU to use."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes", str(processes),
                "--main_process_port", "0"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=300
    )


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


WORKER = {"rollout": {"backend": "process"}}
IMITATING = WORKER | {"sac": {"batch": 64, "n_step": 3, "imitate": 1.0}, "offline": {"updates": 20}}


@pytest.mark.parametrize("algorithm, more", [("sac", {}), ("na", WORKER), ("sac", IMITATING)])
def test_two_processes_do_what_one_does(written, fork_base, tmp_path, algorithm, more):
    if "offline" in more:
        more = more | {"offline": more["offline"] | {"source": str(tmp_path / "shown.npz")}}
        shown = record(fork_base, TaskConfig("point:fork", 40, 1), PriorNoise(fork_base.spec.noise), range(6))
        write_npz(tmp_path / "shown.npz", shown)
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
            torch.testing.assert_close(others[name], tensor, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    for name in ("follower", "leader"):
        assert (tmp_path / f"two-{name}" / "head.safetensors").exists()
    left = [(tmp_path / f"gloo-{rank}").read_text() for rank in (0, 1)]
    assert left == ["0", "0"], "gloo's threads want the interpreter when it is gone, and abort"


def test_the_command_line_is_launched_too_and_ends_well(written, tmp_path):
    """Only the first process writes and prints; a batch that cannot be shared is refused before anything is run."""
    _, path = written()
    done = launch("-m", "dsrl_vla.cli", "train", path, "--out", tmp_path / "run", "--train.env_steps", "200")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("run directory:") == 1
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["updates"] > 0
    done = launch("-m", "dsrl_vla.cli", "train", path, "--out", tmp_path / "odd", "--sac.batch", "63")
    assert done.returncode != 0 and "sac.batch: expected a multiple of the 2 processes, got 63" in done.stderr
    done = launch("-m", "dsrl_vla.cli", "train", path, "--out", tmp_path / "odd", "--train.device", "cuda")
    assert done.returncode != 0 and "train.device: expected cpu for 2 processes" in done.stderr


def test_a_leader_that_fails_inside_an_update_takes_the_others_with_it(written, tmp_path):
    """The others wait for its gradients, and would take a word to stop for them."""
    _, path = written()
    (tmp_path / "child.py").write_text(
        FAULT.format(rank=0, fault="raise ValueError('a fault inside an update')") + CHILD
    )
    failed = launch(tmp_path / "child.py", path, tmp_path / "run")
    assert failed.returncode != 0 and "a fault inside an update" in failed.stderr
    assert not list(tmp_path.glob("run-*")), "nobody went on to the end"


def test_a_follower_that_dies_is_missed_by_name(written, tmp_path):
    _, path = written()
    (tmp_path / "child.py").write_text(FAULT.format(rank=1, fault="os._exit(9)") + CHILD)
    failed = launch(tmp_path / "child.py", path, tmp_path / "run")
    assert failed.returncode != 0 and not list(tmp_path.glob("run-*"))
    assert "process 0 of 2: expected every other process to go on, got no word from it" in failed.stderr
    assert "The run goes on from its last checkpoint, with --resume." in failed.stderr


def test_rows_are_dealt_what_they_are_dealt_by_one_process():
    seeded = lambda: torch.Generator().manual_seed(3)
    for draw in (normal, uniform):
        everything = draw((64, 2, 3), seeded())
        shares = [draw((16, 2, 3), Share(seeded(), rank, 4)) for rank in range(4)]
        assert torch.equal(torch.cat(shares), everything)


def test_the_learner_that_asks_the_base_is_not_for_followers(written):
    from dsrl_vla.head import HeadConfig, SteeringHead
    from dsrl_vla.learners import build_learner

    recipe, _ = written()
    base = recipe.base.load()
    head = SteeringHead(HeadConfig.for_base(base.spec, recipe.noise.over(base.spec.noise), recipe.head.network))
    with pytest.raises(DsrlError, match="algorithm: expected sac or na, .* got na-exact"):
        build_learner("na-exact", None, head, recipe.critic, recipe.sac, recipe.na, (0, 1), 0)
