"""Export to a real LeRobotDataset, and back in as offline data."""

import numpy as np
import pytest

pytest.importorskip("lerobot")

from dsrl_vla.errors import DsrlError
from dsrl_vla.offline import OfflineConfig, demonstrations
from dsrl_vla.offline_sources import read_episodes

CAMERA = "observation.images.behindGripper"


@pytest.fixture(scope="module")
def recorded(nano):
    """Two episodes of the embedded base, every step of them: one cut off, one marked as a success."""
    from dsrl_vla.recording import record
    from dsrl_vla.rollout import TaskConfig
    from dsrl_vla.sources import PriorNoise

    config = TaskConfig("metaworld:drawer-open-v3", max_episode_steps=11, num_envs=1)
    episodes = list(record(nano, config, PriorNoise(nano.spec.noise), [1, 2]))
    episodes[1]["success"][-1] = episodes[1]["terminated"] = True
    episodes[1]["reward"][-1] = 0.0
    return episodes


def check_same(found, episodes, tolerance):
    assert len(found) == len(episodes)
    for mine, theirs in zip(found, episodes, strict=True):
        assert mine["task"] == theirs["task"] and mine["terminated"] is bool(theirs["terminated"])
        for key in ("observation.state", "action", "reward", "success", "noise", "decision"):
            assert mine[key].shape == theirs[key].shape, key
            assert np.array_equal(mine[key], theirs[key].astype(mine[key].dtype)), key
        assert mine[CAMERA].dtype == np.uint8 and mine[CAMERA].shape == theirs[CAMERA].shape
        assert np.abs(mine[CAMERA].astype(int) - theirs[CAMERA].astype(int)).mean() <= tolerance


@pytest.mark.parametrize(("videos", "tolerance"), [(False, 0), (True, 6)])
def test_episodes_come_back_as_they_went(recorded, tmp_path, videos, tolerance):
    from dsrl_vla.lerobot_export import write_lerobot_dataset

    assert [len(set(e["decision"])) for e in recorded] == [2, 2]
    assert np.abs(np.diff(recorded[0]["noise"], axis=0)).sum((1, 2)).nonzero()[0].tolist() == [7]
    out = tmp_path / "set"
    assert write_lerobot_dataset(out, recorded, fps=80, videos=videos) == 2
    check_same(list(read_episodes(OfflineConfig(source=str(out)))), recorded, tolerance)
    with pytest.raises(DsrlError, match="--out: expected a folder that does not exist"):
        write_lerobot_dataset(out, recorded, fps=80)


def test_lerobot_itself_reads_what_was_written(recorded, tmp_path):
    from dsrl_vla.lerobot_export import write_lerobot_dataset
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    write_lerobot_dataset(tmp_path / "set", recorded, fps=80, videos=False)
    found = LeRobotDataset("set", root=tmp_path / "set")
    assert (found.num_episodes, found.num_frames, found.fps) == (2, 22, 80)
    assert found.features["noise"]["shape"] == (8, 8) and found.features[CAMERA]["dtype"] == "image"
    assert [bool(found[i]["next.done"]) for i in (9, 10, 20, 21)] == [False, True, False, True]
    assert np.isfinite(found.meta.stats["noise"]["mean"]).all()


def test_an_exported_dataset_trains_offline(nano, recorded, tmp_path):
    from dsrl_vla.head import HeadConfig, SteeringHead
    from dsrl_vla.latent_sac import SACConfig
    from dsrl_vla.lerobot_export import write_lerobot_dataset
    from dsrl_vla.networks import NetworkConfig
    from dsrl_vla.noise import NoiseLayout
    from dsrl_vla.noise_bank import BankConfig, BankKeeper
    from dsrl_vla.offline import OfflineLoader
    from dsrl_vla.replay import Replay

    write_lerobot_dataset(tmp_path / "set", recorded, fps=80, videos=False)
    config = OfflineConfig(source=str(tmp_path / "set"))
    small = NetworkConfig(width=16, layers=1)
    head = SteeringHead(HeadConfig.for_base(nano.spec, NoiseLayout(nano.spec.noise, "repeat", 1.5, "live"), small))
    replay = Replay(100, head.layout.latent_shape)
    loader = OfflineLoader(nano, head, BankKeeper(BankConfig(size=2)), SACConfig(n_step=1), config)
    loader.fill(replay, read_episodes(config))
    assert len(replay) == 3  # the cut episode's last decision has no successor
    assert replay.discount[: len(replay)].tolist()[-1] == 0.0


def test_a_teleoperated_dataset_without_rewards_is_relabelled(tmp_path):
    """As LeRobot records it: state, action, one camera; no reward."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    joints = [f"j{i}.pos" for i in range(3)]
    features = {
        "observation.state": {"dtype": "float32", "shape": (3,), "names": joints},
        "action": {"dtype": "float32", "shape": (3,), "names": joints},
        "observation.image": {"dtype": "image", "shape": (16, 16, 3), "names": ["height", "width", "channels"]},
    }
    dataset = LeRobotDataset.create("teleop", 30, features, root=tmp_path / "teleop", use_videos=False)
    rng = np.random.default_rng(0)
    for _ in range(2):
        for _ in range(5):
            frame = {k: rng.normal(size=3).astype(np.float32) for k in ("observation.state", "action")}
            frame["observation.image"] = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            dataset.add_frame(frame | {"task": "stack"})
        dataset.save_episode()
    dataset.finalize()
    source = OfflineConfig(source=str(tmp_path / "teleop"), relabel="demonstrations")
    episodes = list(read_episodes(source))
    assert [e["reward"].tolist() for e in episodes] == [[-1, -1, -1, -1, 0]] * 2 and episodes[0]["terminated"]
    assert episodes[0]["observation.images.image"].shape == (5, 16, 16, 3) and episodes[0]["task"] == "stack"


def test_a_robots_journal_is_exported_with_its_takeovers(fork_base, tmp_path):
    from dsrl_vla.cli import main
    from test_robots import collector

    made, _ = collector(fork_base, tmp_path, [(0, 6, "take-over"), (1, 5, "success")])
    with made.task:
        for _ in range(2):
            made.step(warm_up=True)
    run, out = tmp_path / "run", tmp_path / "set"
    assert main(["export", str(run), "--out", str(out), "--images", "png"]) == 0
    first, second = read_episodes(OfflineConfig(source=str(out)))
    record = made.journal.read(0)
    assert np.allclose(first["action"], record.steps["action"])
    assert first["human"].tolist() == [False] * 5 + [True] * 7 and not first["noise"][5:].any()
    assert second["success"][-1] and second["terminated"] and not first["terminated"]


def test_the_rollouts_of_a_run_are_exported(fork_recipe, tmp_path):
    from dsrl_vla.cli import main

    run, out = tmp_path / "run", tmp_path / "set"
    short = ["--train.env_steps", "400", "--eval.episodes", "1", "--eval.controls", "false", "--eval.video_episodes"]
    assert main(["train", str(fork_recipe), "--out", str(run), *short, "0"]) == 0
    assert main(["export", str(run), "--out", str(out), "--episodes", "3"]) == 0
    episodes = list(read_episodes(OfflineConfig(source=str(out))))
    assert len(episodes) == 3 and episodes[0]["noise"].shape[1:] == (4, 2)
    assert main(["export", str(run), "--out", str(out), "--source", "journal"]) == 2


def test_demonstrations_all_succeed():
    made = demonstrations({"action": np.zeros((3, 1))})
    assert made["reward"].tolist() == [-1, -1, 0] and made["terminated"] is True
