"""`robot:` on LeRobot's own classes: a robot by its registered type, a reward model of LeRobot's."""

import json

import numpy as np
import pytest
import yaml

pytest.importorskip("lerobot")

from dsrl_vla import make_task
from dsrl_vla.errors import DsrlError


def robot_file(tmp_path, **more):
    tree = {
        "robot": {"type": "dsrl_rehearsal", "uri": "metaworld:drawer-open-v3", "calibration_dir": str(tmp_path)},
        "prompt": "open the drawer",
        "fps": 1000,
        "operator": "none",
        "reset": "dsrl_vla.robots.rehearsal:place",
        "guards": {"limits": {"a*": [-1, 1]}, "rest": {"a*": 0.0}, "hold_after_s": 60},
    }
    path = tmp_path / "robot.yaml"
    path.write_text(yaml.safe_dump(tree | more))
    return f"robot:{path}"


def test_a_robot_of_lerobots_is_the_simulator_behind_it(tmp_path, nano):
    """The nano base drives MetaWorld through LeRobot's `Robot`, and sees and does what it does without."""
    from lerobot.robots import Robot

    pytest.importorskip("lerobot_policy_dsrl")
    robot, plain = make_task(robot_file(tmp_path), max_episode_steps=20), make_task("metaworld:drawer-open-v3")
    nano.check_task(robot.info)
    assert isinstance(robot.rig.robot, Robot) and robot.rig.robot.is_connected
    there, here = robot.reset(seed=3)[0], plain.reset(seed=3)[0]
    for step in range(2):
        for key, value in here.items():
            assert np.allclose(there[key], value, atol=1e-5), key
        for action in nano.act(here | {"task": plain.info.prompt}, seed=step).numpy()[:4]:
            there, here = robot.step(action)[0], plain.step(action)[0]
    robot.close(), plain.close()
    assert not robot.rig.robot.is_connected


def torch_images(images):
    import torch

    return torch.stack([torch.as_tensor(image).permute(2, 0, 1) / 255 for image in images.values()])


def test_a_robot_that_lerobot_does_not_know_is_refused_with_those_it_does(tmp_path):
    with pytest.raises(
        DsrlError, match=r"robot: expected LeRobot's configuration of a robot; types: .*so101_follower"
    ):
        make_task(robot_file(tmp_path, robot={"type": "so102_follower"}))


@pytest.fixture
def classifier(tmp_path):
    """A real reward classifier of random weights: its folder, and its config."""
    import torch
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.rewards.classifier.configuration_classifier import RewardClassifierConfig
    from lerobot.rewards.classifier.modeling_classifier import Classifier
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(0)
    encoder = ResNetModel(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 16], depths=[1, 1, 1], layer_type="basic")
    )
    encoder.save_pretrained(tmp_path / "encoder")
    feature = PolicyFeature(FeatureType.VISUAL, (3, 64, 64))
    config = RewardClassifierConfig(
        num_cameras=1, model_name=str(tmp_path / "encoder"), device="cpu", num_classes=2, hidden_dim=8,
        latent_dim=8, input_features={"observation.images.behindGripper": feature},
        output_features={"next.reward": PolicyFeature(FeatureType.REWARD, (1,))},
    )  # fmt: skip
    Classifier(config).save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier", config


def test_a_reward_model_of_lerobots_judges_every_step(classifier, tmp_path):
    """Where the probability it gives lies on either side of the threshold."""
    from dsrl_vla.robots.rewards import load_reward_model

    folder, _ = classifier
    images = {"observation.images.behindGripper": np.full((64, 64, 3), 200, np.uint8)}
    seen = images | {"observation.state": np.zeros(4, np.float32), "task": "push"}
    judge = load_reward_model(str(folder), 0.5)
    likely = float(judge.model.predict([torch_images(images)]).probabilities)
    assert 0.01 < likely < 0.99
    for threshold, success in ((likely - 0.005, True), (likely + 0.005, False)):
        assert load_reward_model(str(folder), threshold)(seen, np.zeros(4, np.float32))[1] is success
    for threshold, success in ((0.0, True), (1.0, False)):
        file = robot_file(tmp_path, reward=f"lerobot:{folder}", threshold=threshold)
        task = make_task(file, max_episode_steps=5)
        task.reset(seed=0)
        _, reward, terminated, _, info = task.step(np.zeros(4, np.float32))
        assert info["success"] is success and terminated is success and reward == (0.0 if success else -1.0)
        task.close()
    with pytest.raises(DsrlError, match="reward: expected an existing folder or a Hub repository"):
        make_task(robot_file(tmp_path, reward=f"lerobot:{tmp_path / 'nowhere'}"))
    with pytest.raises(DsrlError, match="reward: expected a LeRobot reward model, got"):
        make_task(robot_file(tmp_path, reward=f"lerobot:{tmp_path / 'encoder'}"))


def test_a_reward_model_sees_what_its_training_normalised(classifier, caplog):
    import torch
    from dsrl_vla.robots.rewards import load_reward_model
    from lerobot.rewards.classifier.processor_classifier import make_classifier_processor

    folder, config = classifier
    name = "observation.images.behindGripper"
    raw = torch.rand(1, 3, 64, 64)
    bare = load_reward_model(str(folder), 0.5)
    assert torch.equal(bare.preprocess({name: raw})[name], raw) and "not normalised" in caplog.text
    statistics = {name: {"mean": torch.full((3, 1, 1), 0.5), "std": torch.full((3, 1, 1), 0.1)}}
    make_classifier_processor(config, statistics)[0].save_pretrained(folder)
    found = load_reward_model(str(folder), 0.5).preprocess({name: raw})[name]
    assert torch.allclose(found, (raw - 0.5) / 0.1, atol=1e-4)
    path = folder / "classifier_preprocessor.json"
    tree = json.loads(path.read_text())
    tree["steps"].append({"class": "subprocess.Popen", "config": {"args": ["true"]}})
    path.write_text(json.dumps(tree))
    with pytest.raises(DsrlError, match="expected processor steps that are LeRobot's own, got 'subprocess.Popen'"):
        load_reward_model(str(folder), 0.5)


def test_a_reward_model_whose_head_did_not_load_does_not_judge(classifier):
    from dsrl_vla.robots.rewards import load_reward_model
    from safetensors.torch import load_file, save_file

    folder, _ = classifier
    tensors = load_file(folder / "model.safetensors")
    renamed = {key.replace("classifier_head", "head"): value for key, value in tensors.items()}
    del renamed["head.0.weight"]
    save_file(renamed, folder / "model.safetensors")
    with pytest.raises(DsrlError, match=r"weights to come from model.safetensors, got .*classifier_head.0.weight"):
        load_reward_model(str(folder), 0.5)
