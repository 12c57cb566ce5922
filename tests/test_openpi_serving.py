"""openpi's own server and client, unmodified, with ours: both directions, in openpi's environment."""

import asyncio
import contextlib
import http.client
import socket
import threading
import time

import numpy as np
import pytest
import torch
from dsrl_vla import SteeredPolicy, SteeringHead, load_base
from dsrl_vla.errors import NotSteerableError
from dsrl_vla.head import HeadConfig
from dsrl_vla.networks import NetworkConfig
from dsrl_vla.noise import NoiseLayout, generators
from dsrl_vla.observation import batch, unsqueeze
from dsrl_vla.serving.server import PolicyServer, ServerConfig
from dsrl_vla.serving.service import Service
from dsrl_vla.serving.wrapping import SteerablePolicy

pytest.importorskip("openpi.policies.policy")
as_openpi = pytest.importorskip("openpi_parts").as_openpi

BASES = ["openpi_jax_pi0_float32", "openpi_torch_pi05_bfloat16"]


@pytest.fixture(params=BASES)
def name(request):
    return request.param


@pytest.fixture
def base(openpi_zoo, name):
    return openpi_zoo.base(name)


@pytest.fixture
def head(base):
    torch.manual_seed(0)
    layout = NoiseLayout(base.spec.noise, "repeat", 1.5, "all")
    return SteeringHead(HeadConfig.for_base(base.spec, layout, NetworkConfig(width=16, layers=1))).eval()


@contextlib.contextmanager
def ours(base, head=None):
    with PolicyServer(Service(base, head), ServerConfig(port=0)) as server:
        yield server


@contextlib.contextmanager
def theirs(policy):
    """openpi's server around `policy`; gives its port."""
    from openpi.serving.websocket_policy_server import WebsocketPolicyServer

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    loop = asyncio.new_event_loop()
    running = loop.create_task(WebsocketPolicyServer(policy, "127.0.0.1", port, policy.metadata).run())

    def run():
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(running)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    for _ in range(100):
        with contextlib.suppress(OSError):
            health = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            health.request("GET", "/healthz")
            assert health.getresponse().status == 200
            break
        time.sleep(0.1)
    yield port
    loop.call_soon_threadsafe(running.cancel)
    thread.join(10)


def client(port):
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    return WebsocketClientPolicy("127.0.0.1", port)


def steered(base, head, observation):
    """The whole chunk that head and base give, (H, A)."""
    observations = unsqueeze(observation)
    encoding = base.encode(observations)
    return base.denoise(encoding, head.noise(observations, encoding, None))[0, 0].numpy()


def test_openpis_client_gets_steered_actions_from_our_server(base, head, observation):
    seen = observation(base)
    expected = steered(base, head, seen)
    with ours(base, head) as server:
        robot = client(server.port)
        assert robot.get_server_metadata()["dsrl"]["noise_shape"] == [8, 32]
        assert np.array_equal(robot.infer(as_openpi(seen))["actions"], expected)
        assert np.array_equal(robot.infer(seen)["actions"], expected)  # LeRobot's keys will do as well
        noise = base.spec.noise.sample(generators([0]))
        reply = robot.infer(as_openpi(seen) | {"dsrl/noise": noise[0, 0].numpy()})
        assert reply["dsrl/source"] == "request"
        assert np.array_equal(reply["actions"], base.denoise(base.encode(unsqueeze(seen)), noise)[0, 0].numpy())
        with pytest.raises(RuntimeError, match="observation/state: expected to be in the observation"):
            robot.infer({"prompt": "open the drawer"})
        assert np.array_equal(robot.infer(as_openpi(seen))["actions"], expected)  # and goes on


def test_openpis_runtime_and_chunk_broker_run_on_our_server(base, head, observation):
    from openpi_client.action_chunk_broker import ActionChunkBroker
    from openpi_client.runtime.agents.policy_agent import PolicyAgent
    from openpi_client.runtime.environment import Environment
    from openpi_client.runtime.runtime import Runtime

    class Robot(Environment):
        """Twelve steps, of which each observation is another."""

        def __init__(self):
            self.seen, self.executed = [observation(base, seed) for seed in range(12)], []

        def reset(self):
            """The runtime also calls this when the episode is over."""

        def is_episode_complete(self):
            return len(self.executed) >= len(self.seen)

        def get_observation(self):
            return as_openpi(self.seen[len(self.executed)])

        def apply_action(self, action):
            self.executed.append(action["actions"])

    robot = Robot()
    with ours(base, head) as server:
        agent = PolicyAgent(ActionChunkBroker(client(server.port), action_horizon=5))
        Runtime(environment=robot, agent=agent, subscribers=[], max_hz=0).run()
        asked = server.service.counts["prefix_passes"]
    expected = np.concatenate([steered(base, head, robot.seen[step])[:5] for step in (0, 5, 10)])
    assert asked == 3
    assert np.array_equal(np.stack(robot.executed), expected[:12])


def test_our_client_steers_our_server_with_one_prefix_pass_a_decision(base, head, observation):
    seen = observation(base)
    with ours(base) as server:
        remote = load_base(f"remote:{server.uri}")
        assert remote.spec.noise == base.spec.noise and remote.spec.feature_dim == 64
        with SteeredPolicy(remote, head).disabled() as policy:
            assert torch.equal(policy.act(seen, seed=3), base.act(seen, seed=3))
        before = remote.served()["prefix_passes"]
        assert torch.equal(SteeredPolicy(remote, head).act(seen), SteeredPolicy(base, head).act(seen))
        assert remote.served()["prefix_passes"] == before + 1
        many, noise = batch([observation(base, i) for i in range(2)]), base.spec.noise.sample(generators([0, 1]), 8)
        assert torch.equal(remote.denoise(remote.encode(many), noise), base.denoise(base.encode(many), noise))
        assert remote.sha256() == base.sha256()
        remote.close()


def test_our_client_steers_openpis_server_through_a_wrapper(base, name, openpi_zoo, observation):
    policy, seen = openpi_zoo.policy(name), observation(base)
    translate = lambda one: base.keys.translate(unsqueeze(one), 1)[0]
    with theirs(SteerablePolicy(policy, base.spec, translate)) as port:
        remote = load_base(f"remote:ws://127.0.0.1:{port}")
        assert remote.spec.feature_dim == 0  # openpi's server keeps no prefix
        assert torch.equal(remote.act(seen, seed=5), base.act(seen, seed=5))
        noise = base.spec.noise.sample(generators([0]), 3)
        singly = torch.cat([base.denoise(base.encode(unsqueeze(seen)), noise[:, k : k + 1]) for k in range(3)], 1)
        assert torch.equal(remote.denoise(remote.encode(unsqueeze(seen)), noise), singly)
        plain = client(port).infer(as_openpi(seen))["actions"]  # whoever sends no noise is served as before
        assert plain.shape == (8, 7)
        remote.close()


def test_our_client_refuses_to_steer_an_openpi_server_as_it_is(openpi_zoo, name):
    with theirs(openpi_zoo.policy(name)) as port, pytest.raises(NotSteerableError):
        load_base(f"remote:ws://127.0.0.1:{port}")
