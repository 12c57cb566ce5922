"""Steered policies in LeRobot's own tools, unmodified: eval, rollout, the async server; on a tiny real SmolVLA."""

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("lerobot")
pytest.importorskip("lerobot_policy_dsrl")

import tiny_lerobot
from dsrl_vla import SteeredPolicy, SteeringHead, load_base
from dsrl_vla.adapters.lerobot.policy import camera_of
from dsrl_vla.errors import DsrlError
from dsrl_vla.head import HeadConfig
from dsrl_vla.networks import NetworkConfig
from dsrl_vla.noise import NoiseLayout
from lerobot_policy_dsrl import DsrlPolicy
from lerobot_policy_dsrl.export import write_policy

CAMERA, SERVED = "observation.image", "observation.images.image"
# LeRobot does not tell PushT the size it declares: what comes is 96 x 96
PUSHT = ["--env.type=pusht", "--env.episode_length=12", "--env.observation_height=96", "--env.observation_width=96"]


ANY_STATISTICS = tiny_lerobot.statistics


def pusht_statistics():
    column = ANY_STATISTICS(cameras=(), state=2, actions=2)
    image = {"mean": 0.5, "std": 0.25, "min": 0.0, "max": 1.0}
    return column | {CAMERA: {k: torch.full((3, 1, 1), v) for k, v in image.items()}}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """A SmolVLA of random weights for PushT."""
    from lerobot.configs import FeatureType, PolicyFeature

    folder = tmp_path_factory.mktemp("base")
    features = {
        "input_features": {
            CAMERA: PolicyFeature(FeatureType.VISUAL, (3, 96, 96)),
            "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
        },
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (2,))},
    }
    with mock.patch.object(tiny_lerobot, "statistics", pusht_statistics):
        tiny_lerobot.save("smolvla", folder, **features)
    return folder


@pytest.fixture(scope="module")
def base(base_folder):
    return load_base(f"lerobot:{base_folder}")


@pytest.fixture(scope="module")
def head(base):
    """A head of random weights, whose choices differ from one observation to the next."""
    layout = NoiseLayout(base.spec.noise, "chunk", 1.5, "live")
    torch.manual_seed(0)
    made = SteeringHead(HeadConfig.for_base(base.spec, layout, NetworkConfig(width=16, layers=1)))
    tiny_lerobot.randomise(made, scale=0.5)
    return made.eval()


@pytest.fixture(scope="module")
def steered(base, head, tmp_path_factory):
    folder = tmp_path_factory.mktemp("steered") / "policy"
    write_policy(folder, head, base)
    return folder


def ours(policy, episodes, steps=12):
    """Actions of our own `SteeredPolicy`, or base, on PushT, played by hand: (episodes, steps, 2)."""
    import gym_pusht  # noqa: F401
    import gymnasium as gym

    env = gym.make(
        "gym_pusht/PushT-v0", obs_type="pixels_agent_pos", disable_env_checker=True, max_episode_steps=steps
    )
    found = []
    for seed in episodes:
        seen, _ = env.reset(seed=seed)
        actions = []
        while len(actions) < steps:
            state = seen["agent_pos"].astype(np.float32)
            chunk = policy.act({"observation.state": state, "observation.images.image": seen["pixels"], "task": ""})
            for action in chunk.numpy()[: steps - len(actions)]:
                actions.append(action)
                seen = env.step(action)[0]
        found.append(np.stack(actions))
    env.close()
    return np.stack(found)


def command(name, *arguments, **environment):
    """Run one of LeRobot's commands, as installed."""
    program = Path(sys.executable).parent / name
    env = os.environ | {"SDL_VIDEODRIVER": "dummy", "OMP_NUM_THREADS": "1", "MUJOCO_GL": "egl"} | environment
    return subprocess.run([str(program), *arguments], env=env, capture_output=True, text=True, timeout=400)


def test_the_folder_holds_the_head_and_refers_to_the_base(steered, base, base_folder, head):
    names = {path.name for path in steered.iterdir()}
    assert names == {"config.json", "head.safetensors", "head_config.json",
                     "policy_preprocessor.json", "policy_postprocessor.json"}  # fmt: skip
    config = json.loads((steered / "config.json").read_text())
    assert config["type"] == "dsrl" and config["base"] == f"lerobot:{base_folder}"
    assert list(config["input_features"]) == [CAMERA, "observation.state"]
    size = sum(path.stat().st_size for path in steered.iterdir())
    weights = sum(p.numel() for p in head.parameters()) * 4
    assert size < weights + 30_000 < (base_folder / "model.safetensors").stat().st_size
    assert SteeringHead.from_pretrained(steered).config.base_uri == f"lerobot:{base_folder}"
    with pytest.raises(DsrlError, match="--out: expected a folder that does not exist"):
        write_policy(steered, head, base)


def test_a_camera_of_the_heads_own_is_asked_for_and_looked_at(base, tmp_path):
    from lerobot_policy_dsrl.modeling_dsrl import DsrlPolicy

    layout = NoiseLayout(base.spec.noise, "chunk", 1.5, "live")
    small, looks = NetworkConfig(width=16, layers=1), {"cameras": ("corner",), "image_size": 32}
    write_policy(tmp_path / "policy", SteeringHead(HeadConfig.for_base(base.spec, layout, small, **looks)), base)
    made = DsrlPolicy.from_pretrained(tmp_path / "policy", base=base)
    corner = "observation.images.corner"
    assert set(made.config.image_features) == {CAMERA, corner}
    batch = {CAMERA: torch.rand(1, 3, 96, 96), corner: torch.rand(1, 3, 40, 40), "task": [""]}
    made.predict_action_chunk(batch | {"observation.state": torch.zeros(1, 2)})
    assert made.source.policy.last_fallback == "" and made.source.policy.fallbacks == {}
    del made.config.input_features[corner]
    with pytest.raises(DsrlError, match="policy.input_features: expected the head's cameras corner, got fewer"):
        DsrlPolicy.from_pretrained(tmp_path / "policy", base=base, config=made.config)


def test_lerobot_eval_runs_it_and_its_actions_are_ours(steered, base, head, tmp_path):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    recorded = {}
    for steer in ("true", "false"):
        out = tmp_path / steer
        done = command("lerobot-eval", f"--policy.path={steered}", f"--policy.steer={steer}", *PUSHT,
                       "--eval.n_episodes=2", "--eval.batch_size=2", "--eval.use_async_envs=false",
                       "--eval.recording=true", "--seed=7", f"--output_dir={out}")  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(json.loads((out / "eval_info.json").read_text())["per_task"][0]["metrics"]["successes"]) == 2
        roots = sorted(path.parent.parent for path in out.glob("recordings/**/meta/info.json"))
        sets = [LeRobotDataset(root.name, root=root) for root in roots]
        recorded[steer] = np.stack([np.stack([np.asarray(row["action"]) for row in data.hf_dataset]) for data in sets])
    expected = ours(SteeredPolicy(base, head), [7, 8])
    assert recorded["true"].shape == (2, 12, 2) and np.allclose(recorded["true"], expected, atol=1e-3)
    assert np.abs(recorded["true"] - recorded["false"]).mean() > 0.05


def test_in_process_it_batches_keeps_its_queue_and_saves(steered, base, head, tmp_path):
    policy = DsrlPolicy.from_pretrained(steered)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 96, 96, 3), dtype=np.uint8)
    state = rng.normal(size=(2, 2)).astype(np.float32)
    batch = {
        "observation.state": torch.from_numpy(state),
        CAMERA: torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255,
        "task": ["push", "pull"],
    }
    seen = policy.observations(batch)
    assert np.array_equal(seen["observation.images.image"], images)  # to the bit, through LeRobot's floats
    with torch.inference_mode():
        actions = torch.stack([policy.select_action(batch) for _ in range(4)], 1)
    single = [{"observation.state": s, "observation.images.image": i, "task": t}
              for s, i, t in zip(state, images, batch["task"], strict=True)]  # fmt: skip
    expected = torch.stack([SteeredPolicy(base, head).act(o) for o in single])
    assert torch.allclose(actions[:, :3], expected, atol=1e-5)
    assert torch.equal(actions[:, 3], actions[:, 0])  # asked anew, and the same was seen
    policy.to("cpu", torch.float64)
    assert next(policy.parameters()).dtype == torch.float32 and policy.base is not None
    assert not any("base" in name for name in policy.state_dict())
    policy.save_pretrained(tmp_path / "again")
    assert torch.equal(DsrlPolicy.from_pretrained(tmp_path / "again").select_action(batch), actions[:, 0])
    with pytest.raises(DsrlError, match="real-time chunking"):
        policy.predict_action_chunk(batch, inference_delay=2)
    with pytest.raises(DsrlError, match="dsrl-vla train"):
        policy.forward(batch)
    assert policy.supports_rtc() is False


def test_moved_to_another_device_it_loads_its_base_there(steered, monkeypatch):
    """LeRobot's server loads first and moves then."""
    from dsrl_vla.recipe import BaseConfig

    policy, devices = DsrlPolicy.from_pretrained(steered), []
    monkeypatch.setattr(BaseConfig, "load", lambda self, **_: devices.append(self.device) or policy.base)
    policy.to("cpu").to(torch.float32).to("cuda")
    assert devices == ["cuda"] and policy.config.device == "cuda"


def test_unsteered_episodes_have_their_own_noise(steered):
    policy = DsrlPolicy.from_pretrained(steered)
    policy.config.steer = False
    plain = DsrlPolicy(policy.config, head=policy.head, base=policy.base)
    batch = {"observation.state": torch.zeros(2, 2), CAMERA: torch.zeros(2, 3, 32, 32), "task": ["push"] * 2}
    first = plain.predict_action_chunk(batch)
    assert not torch.equal(first[0], first[1])
    plain.reset()
    assert not torch.equal(plain.predict_action_chunk(batch), first)
    again = DsrlPolicy(policy.config, head=policy.head, base=policy.base)
    assert torch.equal(again.predict_action_chunk(batch), first)


def test_a_wrong_base_or_a_new_policy_is_refused(steered, base_folder):
    from lerobot.configs import PreTrainedConfig
    from lerobot_policy_dsrl import DsrlConfig

    with pytest.raises(DsrlError, match="from `dsrl-vla export-policy`"):
        DsrlPolicy(DsrlConfig(device="cpu"))
    policy = DsrlPolicy.from_pretrained(steered)
    executed, policy.config.n_action_steps = policy.config.n_action_steps, policy.config.n_action_steps + 1
    with pytest.raises(DsrlError, match=rf"policy.n_action_steps: expected {executed}, as in training"):
        DsrlPolicy(policy.config, head=policy.head, base=policy.base)
    config = PreTrainedConfig.from_pretrained(steered)
    config.base = "nano:"
    with pytest.raises(DsrlError, match="noise shape"):
        DsrlPolicy.from_pretrained(steered, config=config)
    with pytest.raises(DsrlError, match="a policy of type 'dsrl', got 'smolvla'"):
        DsrlPolicy.from_pretrained(base_folder)


def test_what_the_base_was_loaded_with_goes_along(base_folder, tmp_path):
    """A camera that goes by the task's name, in LeRobot's hands too."""
    camera = camera_of(next(iter(load_base(f"lerobot:{base_folder}").image_features)))
    options = {"cameras": {"front": camera}}
    base = load_base(f"lerobot:{base_folder}", **options)
    layout = NoiseLayout(base.spec.noise, "repeat", 1.5, "live")
    head = SteeringHead(HeadConfig.for_base(base.spec, layout, NetworkConfig(width=16, layers=1)))
    write_policy(tmp_path / "policy", head, base, options=options)
    policy = DsrlPolicy.from_pretrained(tmp_path / "policy")
    assert policy.config.base_options == options and "observation.images.front" in policy.config.image_features
    assert list(policy.base.spec.observation.cameras) == ["front"]


def test_lerobot_eval_runs_our_tasks_on_our_episodes(fork_recipe, tmp_path):
    """Any base, any task of ours: trained here, evaluated there, the same successes on the same seeds."""
    from dsrl_vla.cli import main

    run, out = tmp_path / "run", tmp_path / "steered"
    short = ["--train.env_steps", "400", "--eval.episodes", "6", "--eval.controls", "false", "--eval.video_episodes"]
    assert main(["train", str(fork_recipe), "--out", str(run), *short, "0"]) == 0
    assert main(["export-policy", str(run), "--out", str(out)]) == 0
    done = command("lerobot-eval", f"--policy.path={out}", "--env.type=dsrl", "--env.uri=point:fork",
                   "--env.episode_length=40", "--eval.n_episodes=6", "--eval.batch_size=3", "--seed=300000",
                   f"--output_dir={tmp_path / 'eval'}")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads((tmp_path / "eval" / "eval_info.json").read_text())["overall"]["pc_success"]
    mine = json.loads((run / "eval.json").read_text())["steered"]["success"]
    assert theirs == pytest.approx(100 * mine)


def test_lerobot_rollout_drives_a_robot_with_it(fork_base, tmp_path):
    fork_base.save_pretrained(tmp_path / "base")
    base = load_base(f"flow-mlp:{tmp_path / 'base'}")
    layout = NoiseLayout(base.spec.noise, "repeat", 1.5, "live")
    head = SteeringHead(HeadConfig.for_base(base.spec, layout, NetworkConfig(width=16, layers=1)))
    write_policy(tmp_path / "steered", head, base)
    done = command("lerobot-rollout", f"--policy.path={tmp_path / 'steered'}", "--robot.type=dsrl_rehearsal",
                   "--robot.uri=point:fork", "--fps=20", "--duration=1", "--return_to_initial_position=false",
                   "--play_sounds=false", HF_LEROBOT_CALIBRATION=str(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """LeRobot's server writes logs into the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def served(steered, tmp_path_factory):
    """The same with its camera under a name that the async server passes on (``observation.images.…`` alone)."""
    folder = tmp_path_factory.mktemp("served") / "policy"
    shutil.copytree(steered, folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace(f'"{CAMERA}"', f'"{SERVED}"'))
    return folder


def specs(steered):
    from lerobot.async_inference.helpers import RemotePolicyConfig

    names = ["x", "y"]
    features = {
        "observation.state": {"dtype": "float32", "shape": (2,), "names": names},
        SERVED: {"dtype": "image", "shape": (96, 96, 3), "names": ["height", "width", "channels"]},
    }
    return RemotePolicyConfig("dsrl", str(steered), features, 3, "cpu", {})


def raw():
    from lerobot.async_inference.helpers import TimedObservation

    image = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    seen = {"x": 0.25, "y": -0.5, "image": image, "task": "push"}
    return TimedObservation(timestamp=time.time(), timestep=0, observation=seen, must_go=True), image


def expected_chunk(base, head, image):
    observation = {"observation.state": np.array([0.25, -0.5], np.float32), "observation.images.image": image}
    return SteeredPolicy(base, head).act(observation | {"task": "push"})


def test_the_async_server_in_process(served, base, head, elsewhere):
    from lerobot.async_inference.configs import PolicyServerConfig
    from lerobot.async_inference.policy_server import PolicyServer
    from lerobot_policy_dsrl.server import allow

    allow()
    server = PolicyServer(PolicyServerConfig())
    context = mock.Mock()
    server.Ready(None, context)
    server.SendPolicyInstructions(mock.Mock(data=pickle.dumps(specs(served))), context)
    observation, image = raw()
    actions = torch.stack([timed.get_action() for timed in server._predict_action_chunk(observation)])
    assert torch.allclose(actions, expected_chunk(base, head, image), atol=1e-4)


def test_the_async_server_over_grpc(served, base, head, elsewhere):
    import grpc
    from lerobot.transport import services_pb2, services_pb2_grpc
    from lerobot.transport.utils import send_bytes_in_chunks

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).parent / "dsrl-policy-server"
    server = subprocess.Popen([str(program), "--host=127.0.0.1", f"--port={port}"], stderr=subprocess.PIPE, text=True)
    try:
        channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        grpc.channel_ready_future(channel).result(timeout=120)
        stub = services_pb2_grpc.AsyncInferenceStub(channel)
        stub.Ready(services_pb2.Empty())
        stub.SendPolicyInstructions(services_pb2.PolicySetup(data=pickle.dumps(specs(served))))
        observation, image = raw()
        stub.SendObservations(send_bytes_in_chunks(pickle.dumps(observation), services_pb2.Observation, silent=True))
        answer = pickle.loads(stub.GetActions(services_pb2.Empty()).data)
        actions = torch.stack([timed.get_action() for timed in answer])
        assert torch.allclose(actions, expected_chunk(base, head, image), atol=1e-4)
    finally:
        server.terminate()
        server.wait(30)
