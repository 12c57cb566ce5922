"""The real, unmodified openpi-client and openpi server against our ends of the wire. Needs no openpi models."""

import asyncio
import socket
import threading

import numpy as np
import pytest
import torch
from dsrl_vla import SteeredPolicy, load_base, probe
from dsrl_vla.errors import DsrlError, NotSteerableError
from dsrl_vla.noise import generators
from dsrl_vla.observation import batch, unsqueeze
from dsrl_vla.serving.wrapping import SteerablePolicy
from serving_parts import KEY, make_head

client = pytest.importorskip(
    "openpi_client.websocket_client_policy", reason="pip install --no-deps openpi-client==0.1.2, and dm-tree"
)


def call(uri, key=None):
    return client.WebsocketClientPolicy(uri, api_key=key)


@pytest.fixture
def robot(observation, fork_base):
    """What a robot written for openpi sends."""
    seen = observation(fork_base)
    return {"observation/state": seen["observation.state"].astype(np.float64), "prompt": "go"}, seen


def test_an_unmodified_client_gets_steered_actions(fork_base, served, robot):
    theirs, ours = robot
    head = make_head(fork_base)
    policy = call(served(fork_base, head, api_key=KEY).uri, KEY)
    assert policy.get_server_metadata()["dsrl"]["noise_shape"] == [4, 2]
    reply = policy.infer(theirs)
    assert reply["dsrl/source"] == "head" and reply["actions"].dtype == np.float32
    assert np.array_equal(reply["actions"], SteeredPolicy(fork_base, head).act(ours).numpy())
    assert reply["server_timing"]["infer_ms"] > 0


def test_the_action_chunk_broker_works_with_our_replies(fork_base, served, robot):
    broker = pytest.importorskip("openpi_client.action_chunk_broker").ActionChunkBroker
    theirs, ours = robot
    head = make_head(fork_base)
    server = served(fork_base, head)
    policy = broker(call(server.uri), action_horizon=4)
    expected = SteeredPolicy(fork_base, head).act(ours).numpy()
    for step in range(8):
        reply = policy.infer(theirs)
        assert np.array_equal(reply["actions"], expected[step % 4]) and reply["dsrl/source"] == "head"
    assert server.service.counts["prefix_passes"] == 2


def test_an_unmodified_client_can_send_noise_in_reserved_keys(fork_base, served, robot):
    theirs, ours = robot
    policy, noise = call(served(fork_base).uri), fork_base.spec.noise.sample(generators([3]))
    reply = policy.infer({**theirs, "dsrl/noise": noise[0, 0].numpy()})
    assert reply["dsrl/source"] == "request"
    expected = fork_base.denoise(fork_base.encode(unsqueeze(ours)), noise)[0, 0]
    assert np.array_equal(reply["actions"], expected.numpy())


def test_what_an_unmodified_client_gets_wrong_is_said_in_its_words_and_its_connection_lives(fork_base, served, robot):
    policy = call(served(fork_base).uri)
    with pytest.raises(RuntimeError, match="Error in inference server:\nobservation/state: expected to be in the obs"):
        policy.infer({"prompt": "go"})
    assert policy.infer(robot[0])["actions"].shape == (4, 2)
    with pytest.raises(Exception, match="401"):
        call(served(fork_base, api_key=KEY).uri, "not the key, not the key")


class Policy:
    """What openpi's `Policy` is to its server, over a flow MLP: ``infer(obs, *, noise=None)``."""

    def __init__(self, base):
        self.base, self.calls = base, 0
        self.metadata = {"reset_pose": [0.0, 1.0]}

    def infer(self, obs, *, noise=None):
        self.calls += 1
        assert noise is None or (noise.flags.writeable and noise.dtype == np.float32)
        seen = {"observation.state": np.asarray(obs["observation/state"], np.float32)}
        drawn = torch.zeros(1, 1, 4, 2) if noise is None else torch.from_numpy(noise)[None, None]
        actions = self.base.denoise(self.base.encode(unsqueeze(seen)), drawn)[0, 0]
        return {"actions": actions.numpy(), "state": np.zeros(4)}


@pytest.fixture(scope="module")
def openpi_server():
    """openpi's own server around a policy, in a thread: start(policy, metadata) -> URI."""
    try:
        from openpi.serving.websocket_policy_server import WebsocketPolicyServer
    except ImportError:
        WebsocketPolicyServer = pytest.importorskip("openpi_server").WebsocketPolicyServer

    def start(policy, metadata=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = WebsocketPolicyServer(policy, "127.0.0.1", port, metadata)
        threading.Thread(target=lambda: asyncio.run(server.run()), daemon=True).start()
        return f"ws://127.0.0.1:{port}"

    return start


def test_the_real_server_ignores_noise_and_is_refused_by_name(fork_base, openpi_server, robot):
    policy = Policy(fork_base)
    uri = openpi_server(policy, {"reset_pose": [0.0]})
    with pytest.raises(
        NotSteerableError, match=f"remote:{uri}: expected a server that takes noise, got one that does"
    ):
        load_base(f"remote:{uri}", deadline_s=20)
    reply = call(uri).infer({**robot[0], "dsrl/noise": np.ones((4, 2), np.float32)})
    assert "dsrl/source" not in reply  # which is why


def translate(seen):
    return {"observation/state": seen["observation.state"]}


def test_the_real_server_around_a_wrapped_policy_can_be_steered(fork_base, openpi_server, observation, robot):
    from dataclasses import replace

    inner = Policy(fork_base)
    policy = SteerablePolicy(inner, replace(fork_base.spec, feature_dim=0), translate)
    uri = openpi_server(policy, policy.metadata)
    base = load_base(f"remote:{uri}", deadline_s=20)
    assert base.spec.noise == fork_base.spec.noise and base.spec.feature_dim == 0
    assert base.client.metadata["reset_pose"] == [0.0, 1.0]
    seen = batch([observation(fork_base, i) for i in range(2)])
    noise = fork_base.spec.noise.sample(generators([0, 1]), 3)
    encoding = base.encode(seen)
    assert encoding.feature is None and inner.calls == 0
    expected = fork_base.denoise(fork_base.encode(seen), noise)
    assert (base.denoise(encoding, noise) - expected).abs().max() < 1e-5 and inner.calls == 6
    assert probe(base, observation(fork_base)).noise_effect > 0
    steered = SteeredPolicy(base, make_head(base)).act(observation(fork_base))
    assert steered.shape == (4, 2)
    with pytest.raises(DsrlError, match="dsrl/noise: expected finite numbers of shape"):
        base.client.request({**robot[1], "dsrl/noise": np.zeros((3, 2), np.float32)})
    assert call(uri).infer(robot[0])["actions"].shape == (4, 2)  # a robot that knows nothing of us
    base.close()


def test_a_black_box_trains_over_the_wire(fork_base, fork_recipe, openpi_server, tmp_path):
    from dataclasses import replace

    from dsrl_vla import load_recipe, train

    policy = SteerablePolicy(Policy(fork_base), replace(fork_base.spec, feature_dim=0), translate)
    uri = f"remote:{openpi_server(policy, policy.metadata)}"
    over = {"base": {"uri": uri}, "train": {"env_steps": 400, "validation_episodes": 2}}
    run = train(load_recipe(fork_recipe, over), tmp_path / "run", evaluate_after=False)
    assert run.head.config.feature_dim == 0


def test_a_real_servers_failure_comes_as_its_last_line(fork_base, openpi_server, observation):
    from dsrl_vla.serving.client import ServerFailedError

    policy = SteerablePolicy(Policy(fork_base), fork_base.spec, lambda seen: {})
    base = load_base(f"remote:{openpi_server(policy, policy.metadata)}", deadline_s=20)
    noise = base.spec.noise.sample(generators([0]))
    with pytest.raises(ServerFailedError, match="expected a reply, got an error: KeyError: 'observation/state'"):
        base.denoise(base.encode(batch([observation(fork_base)])), noise)
    base.close()
