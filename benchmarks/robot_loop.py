"""Training on a robot, rehearsed: operator's keys, take-overs, a call-off, kill -9 and resume; nothing is lost.

A simulated task stands behind LeRobot's `Robot` interface, and `dsrl-vla train` runs on it as on a real robot. The
robot keeps a flight log of its own, of every command it was sent, flushed at once. At the end every finished
episode of the log must be in the journal, command for command, and everything in the journal in the replay, bit
for bit. Writes ``benchmarks/results/robot_loop.json``.

    python benchmarks/robot_loop.py            # about a minute
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from dsrl_vla.adapters.flow_mlp import FlowMLP, FlowMLPConfig, clone_flow_mlp
from dsrl_vla.collect import Collector
from dsrl_vla.journal import FOLDER, EpisodeRecord, Journal
from dsrl_vla.live_collect import EpisodeCollector
from dsrl_vla.noise_bank import BankConfig, BankKeeper, Keeper
from dsrl_vla.recipe import load_recipe
from dsrl_vla.replay import Replay
from dsrl_vla.run_dir import load_checkpoint, write_json
from dsrl_vla.seeds import TRAINING
from dsrl_vla.tasks.live import VOID
from dsrl_vla.tasks.point import demonstrate

HERE = Path(__file__).parent
SCRIPT = [
    {"episode": 2, "step": 6, "say": "take-over"},  # until the end
    {"episode": 4, "step": 9, "say": "cut"},
    {"episode": 6, "step": 4, "say": "redo"},
    {"episode": 11, "step": 5, "say": "take-over"},
    {"episode": 11, "step": 16, "say": "take-over"},  # gives back
    {"episode": 13, "step": 3, "say": "discard"},
    {"episode": 14, "step": 30, "say": "failure"},
]


def prepare(folder: Path, fps: float, algorithm: str) -> tuple[Path, Path]:
    """A base, a robot's file and a recipe; return recipe and flight log."""
    base, log = folder / "base", folder / "flight.jsonl"
    FlowMLP(clone_flow_mlp([demonstrate(s) for s in range(150)], FlowMLPConfig(4, 2), steps=800)).save_pretrained(base)
    robot: dict[str, Any] = {"uri": "point:fork", "log": str(log)}
    lerobot = importlib.util.find_spec("lerobot") is not None
    robot |= {"type": "logged"} if lerobot else {"factory": "robot_parts:LoggedRobot"}
    lab = {
        "robot": robot,
        "imports": ["robot_parts"],
        "teleop": {"factory": "robot_parts:Guide"},
        "prompt": "go round the pillar to the goal",
        "fps": fps,
        "operator": "robot_parts:Operator",
        "reset": "dsrl_vla.robots.rehearsal:place",
        "guards": {"limits": {"a*": [-0.9, 0.9]}, "max_step": {"a*": 1.5}, "rest": {"a*": 0.0}, "hold_after_s": 60.0},
    }
    (folder / "robot.yaml").write_text(yaml.safe_dump(lab))
    recipe = {
        "name": "robot-loop",
        "base": {"uri": f"flow-mlp:{base}"},
        "task": {"uri": f"robot:{folder / 'robot.yaml'}", "max_episode_steps": 40, "num_envs": 1},
        "algorithm": algorithm,
        "head": {"network": {"width": 32, "layers": 1}},
        "critic": {"network": {"width": 32, "layers": 1}},
        "sac": {"batch": 64, "n_step": 3},
        "train": {"env_steps": 100_000, "learning_starts": 30, "gradient_steps": 1, "checkpoint_every": 150,
                  "validate_every": 100_000},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml", log


def launch(recipe: Path, out: Path, episodes: int, script: list[dict], resume: bool) -> subprocess.Popen:
    """`dsrl-vla train`, in a process of its own."""
    lab = {"script": script, "journal": str(out / FOLDER), "episodes": episodes}
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"ROBOT_LOOP": json.dumps(lab), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dsrl_vla.cli", "train", str(recipe), "--out", str(out)]
    return subprocess.Popen([*command, "--resume"] if resume else command, env=environment)


def flights(log: Path) -> list[dict[str, Any]]:
    """The flight log as scenes: seed and commands of each."""
    found: list[dict[str, Any]] = []
    for line in log.read_text().splitlines():
        row = json.loads(line)
        if "seed" in row:
            found.append({"seed": row["seed"], "actions": []})
        else:
            found[-1]["actions"].append(row["action"])
    return found


def kill_within_an_episode(process: subprocess.Popen, log: Path, journal: Journal, after: int) -> dict[str, str]:
    """kill -9 while an episode is under way; return the journal's files with their hashes, as they then are."""
    while True:
        numbers, scene = journal.numbers(), flights(log)[-1]
        finished = scene["seed"] in [TRAINING + number for number in numbers]
        if len(numbers) >= after and not finished and len(scene["actions"]) >= 3:
            break
        if process.poll() is not None:
            raise SystemExit(f"the run ended by itself, with status {process.returncode}")
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return hashes(journal)


def hashes(journal: Journal) -> dict[str, str]:
    """sha256 of every file of a journal."""
    files = sorted(journal.folder.glob("episode_*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def journal_against_log(records: list[EpisodeRecord], log: Path, first_seed: int) -> tuple[int, int]:
    """Find every episode of the journal in the flight log, by its seed, command for command.

    Returns:
        Commands in both, and the scenes that were flown and are not in the journal. A finished scene has one
        command more than its episode: to stand still.
    """
    scenes = [scene for scene in flights(log) if np.any(scene["actions"])]  # else it was only told to stand still
    for record in records:
        wanted = record.steps["action"]
        same = [
            scene
            for scene in scenes
            if scene["seed"] == first_seed + record.number
            and len(scene["actions"]) == len(wanted) + 1
            and np.allclose(np.array(scene["actions"][:-1]), wanted, atol=1e-6)
        ]
        assert same, f"episode {record.number} was not flown as the journal has it"
        scenes.remove(same[0])
    return sum(len(record.steps["action"]) for record in records), len(scenes)


def replay_of(records: list[EpisodeRecord], recipe_file: Path, keeper: Any) -> Replay:
    """What the replay has to hold when every record has been learnt from, in order."""
    recipe = load_recipe(recipe_file)
    replay = Replay(recipe.train.replay_capacity, tuple(records[0].decisions["latent"].shape[1:]))  # type: ignore[arg-type]
    collector = EpisodeCollector.__new__(EpisodeCollector)
    collector.replay, collector.sac, collector.keeper = replay, recipe.sac, keeper
    collector.env_steps = collector.decisions = collector.human_steps = 0
    collector.recent, collector.finished = [], []  # type: ignore[assignment]
    assert isinstance(collector, Collector)
    for record in records:
        collector._enter(record)
    return replay


def compare(replay: Replay, out: Path) -> int:
    """Bit for bit against the checkpoint; return the number of transitions."""
    found = load_checkpoint(out / "checkpoints")
    assert found is not None
    tensors, state = found
    for name, tensor in replay.tensors().items():
        assert torch.equal(tensors[f"replay.{name}"], tensor), f"{name} differs"
    assert state["added"] == replay.added
    return replay.added


def rehearse(
    folder: Path, episodes: int, kill_after: int, fps: float, script: list[dict], algorithm: str = "na"
) -> dict[str, Any]:
    """Train, kill, resume, and count; raises AssertionError where something is lost."""
    recipe, log = prepare(folder, fps, algorithm)
    out = folder / "run"
    journal = Journal(out / FOLDER)
    process = launch(recipe, out, episodes, script, resume=False)
    while not log.exists() or len(flights(log)) < 2:
        time.sleep(0.02)
    before = kill_within_an_episode(process, log, journal, kill_after)
    flown = flights(log)[-1]["actions"]
    rest = [line for line in script if line["episode"] > len(before)]
    resumed = launch(recipe, out, episodes, rest, resume=True)
    assert resumed.wait() == 130, "the operator ends the run by Ctrl-C"
    after = hashes(journal)
    assert before.items() <= after.items(), "an episode on the disk has changed"
    records = list(journal)
    commands, others = journal_against_log(records, log, TRAINING)
    void = sum(line["say"] in {str(word) for word in VOID} for line in script)
    assert others == void + 1, (
        f"flown and not in the journal: {others}; expected {void} void scenes and the killed one"
    )
    keeper = BankKeeper(BankConfig()) if algorithm == "na" else Keeper()
    transitions = compare(replay_of(records, recipe, keeper), out)
    human = [record for record in records if record.decisions["human"].any()]
    endings = [record.ending or "limit" for record in records]
    return {
        "algorithm": algorithm,
        "robot": "LeRobot Robot" if importlib.util.find_spec("lerobot") else "factory",
        "fps": fps,
        "episodes": len(records),
        "endings": {ending: endings.count(ending) for ending in sorted(set(endings))},
        "flown_and_not_in_journal": {"void_by_the_operators_word": void, "killed": 1},
        "take_overs": len(human),
        "steps_driven_by_a_person": int(sum(record.steps["human"].sum() for record in records)),
        "journalled_when_killed": len(before),
        "steps_of_the_episode_that_the_kill_cut": len(flown),
        "unchanged_after_resume": sum(after[name] == digest for name, digest in before.items()),
        "commands_in_journal_and_flight_log": commands,
        "transitions_in_replay_and_journal": transitions,
        "finished_episodes_lost": others - void - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--fps", type=float, default=30.0)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "robot_loop.json")
    args = parser.parse_args()
    found = []
    for algorithm in ("na", "sac"):
        with tempfile.TemporaryDirectory() as folder:
            found.append(rehearse(Path(folder), args.episodes, 8, args.fps, SCRIPT, algorithm))
        print(json.dumps(found[-1], indent=2))
    write_json(args.out, found)


if __name__ == "__main__":
    main()
