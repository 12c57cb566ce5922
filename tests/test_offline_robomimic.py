"""Robomimic's hdf5 layout, written in process; no file of Robomimic's own is at hand."""

import json
import sys

import numpy as np
import pytest
from dsrl_vla.errors import DsrlError, MissingExtraError
from dsrl_vla.offline import OfflineConfig
from dsrl_vla.offline_sources import read_episodes

h5py = pytest.importorskip("h5py")
ORDER = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2, "object": 10}


def write(path, lengths=(5, 4, 6), environment="Lift", widths=ORDER, succeeded=lambda i: i != 1, image=False):
    """demo_0, demo_2, demo_10: an order that sorting by name gets wrong."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": environment, "type": 1})
        for i, length in enumerate(lengths):
            demo = data.create_group(f"demo_{(0, 2, 10)[i]}")
            for key, width in widths.items():
                demo[f"obs/{key}"] = rng.normal(size=(length, width))
            demo["obs/robot0_joint_pos"] = rng.normal(size=(length, 7))  # there, and not of the state
            if image:
                demo["obs/agentview_image"] = rng.integers(0, 256, (length, 8, 8, 3), dtype=np.uint8)
            demo["actions"] = rng.uniform(-1, 1, (length, 7))
            demo["rewards"] = np.eye(length)[-1] * succeeded(i)
            demo["dones"] = np.eye(length, dtype=np.int64)[-1]
    return path


def read(path, **config):
    return list(read_episodes(OfflineConfig(source=str(path), **config)))


def test_state_actions_and_ends_are_as_written(tmp_path):
    path = write(tmp_path / "low_dim.hdf5")
    episodes = read(path)
    assert [len(e["action"]) for e in episodes] == [5, 4, 6]  # demo_10 comes after demo_2
    with h5py.File(path) as file:
        demo = file["data/demo_10"]
        state = np.concatenate([demo[f"obs/{key}"][:] for key in ORDER], 1)
        assert np.array_equal(episodes[2]["observation.state"], state.astype(np.float32))
        assert np.array_equal(episodes[2]["action"], demo["actions"][:].astype(np.float32))
        assert np.array_equal(episodes[2]["reward"], demo["rewards"][:])
    assert episodes[0]["observation.state"].shape == (5, 19) and episodes[0]["task"] == "lift the cube"
    assert [e["terminated"] for e in episodes] == [True, False, True]  # done without success is a cut


def test_relabelled_as_the_tasks_reward(tmp_path):
    episodes = read(write(tmp_path / "a.hdf5"), relabel="sparse_success", episodes=2)
    assert [e["reward"].tolist() for e in episodes] == [[-1, -1, -1, -1, 0], [-1, -1, -1, -1]]


def test_images_by_camera_and_a_second_robot(tmp_path):
    arms = ORDER | {key.replace("robot0", "robot1"): w for key, w in ORDER.items() if key != "object"}
    path = write(tmp_path / "image.hdf5", environment="TwoArmTransport", widths=arms | {"object": 41}, image=True)
    episode = read(path, episodes=1)[0]
    assert episode["observation.images.agentview"].shape == (5, 8, 8, 3)
    with h5py.File(path) as file:
        obs = file["data/demo_0/obs"]
        assert np.array_equal(episode["observation.images.agentview"], obs["agentview_image"][:])
        assert np.array_equal(episode["observation.state"][:, 9:12], obs["robot1_eef_pos"][:].astype(np.float32))
    assert episode["observation.state"].shape == (5, 59)


def test_what_is_not_such_a_file_is_refused_by_name(tmp_path):
    with pytest.raises(DsrlError, match=r"demo_0/obs/object: expected shape \(T, 10\), .* got \(5, 14\)"):
        read(write(tmp_path / "wide.hdf5", widths=ORDER | {"object": 14}))
    with pytest.raises(DsrlError, match=r"expected the keys robot0_eef_pos \(3\), robot0_eef_quat \(4\)"):
        read(write(tmp_path / "less.hdf5", widths={"robot0_eef_pos": 3, "object": 10}))
    path = write(tmp_path / "bare.hdf5")
    with h5py.File(path, "a") as file:
        del file["data/demo_0/dones"]
    with pytest.raises(DsrlError, match="data/demo_0: expected a field 'dones'"):
        read(path)
    path = write(tmp_path / "short.hdf5")
    with h5py.File(path, "a") as file:
        del file["data/demo_0/rewards"]
        file["data/demo_0/rewards"] = np.zeros(3)
    with pytest.raises(DsrlError, match="reward: expected 5 rows, as actions has, got 3"):
        read(path)
    h5py.File(tmp_path / "empty.hdf5", "w").close()
    with pytest.raises(DsrlError, match="expected groups data/demo_0"):
        read(tmp_path / "empty.hdf5")
    (tmp_path / "text.hdf5").write_text("no")
    with pytest.raises(DsrlError, match="expected an hdf5 file"):
        read(tmp_path / "text.hdf5")


def test_without_h5py_the_extra_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.hdf5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingExtraError, match=r"dsrl-vla\[robomimic\]"):
        read(path)
