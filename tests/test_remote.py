"""The adapter remote: what a client gets over the wire is what the base gives, or a clear error in time."""

import json
import os
import signal
import socket
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from dsrl_vla import SteeredPolicy, load_base, load_recipe, train
from dsrl_vla.collect import Collector
from dsrl_vla.errors import DsrlError, NotSteerableError
from dsrl_vla.head import HeadConfig, SteeringHead
from dsrl_vla.latent_sac import SACConfig
from dsrl_vla.networks import NetworkConfig
from dsrl_vla.noise import NoiseLayout, generators
from dsrl_vla.observation import batch
from dsrl_vla.replay import Replay
from dsrl_vla.rollout import TaskConfig, VectorTask
from dsrl_vla.serving import protocol
from dsrl_vla.serving.client import Client, ClientConfig, ServerFailedError, ServerUnavailableError
from dsrl_vla.serving.server import PolicyServer, ServerConfig
from dsrl_vla.serving.service import Service
from serving_parts import KEY, Failing, Slow, Spoilt, make_head, start_cli


@pytest.fixture
def connect_to():
    """Loads ``remote:`` bases that are closed in the end."""
    made = []

    def connect(uri, **options):
        made.append(load_base(f"remote:{uri}", **options))
        return made[-1]

    yield connect
    for base in made:
        base.close()


@pytest.mark.parametrize("name", ["tiny_pi0", "fork_base"])
def test_features_and_actions_are_those_of_the_base_bit_for_bit(name, request, observation, served, connect_to):
    base = request.getfixturevalue(name)
    remote = connect_to(served(base).uri)
    observations = batch([observation(base, i) for i in range(3)])
    noise = base.spec.noise.sample(generators([0, 1, 2]), 4)
    here, there = base.encode(observations), remote.encode(observations)
    assert torch.equal(here.feature, there.feature) and there.feature.dtype == torch.float32
    assert torch.equal(base.denoise(here, noise), remote.denoise(there, noise))
    assert remote.sha256() == base.sha256() and remote.state_dict() == {}


def test_the_spec_crosses_the_wire_and_a_head_knows_the_base_by_its_own_name(remote_pi0, tiny_pi0):
    spec = remote_pi0.spec
    assert spec.uri.startswith("remote:ws://") and spec.repo_id == "transformers:tiny"
    for field in ("adapter", "noise", "observation", "action_dim", "executed_steps", "sampler_steps", "feature_dim"):
        assert getattr(spec, field) == getattr(tiny_pi0.spec, field)
    assert remote_pi0.fingerprint() == tiny_pi0.fingerprint() and tiny_pi0.fingerprint().weights
    for trained_on, used_on in ((remote_pi0, tiny_pi0), (tiny_pi0, remote_pi0)):
        SteeredPolicy(used_on, make_head(trained_on))
    assert make_head(remote_pi0).config.base_model_name_or_path == "transformers:tiny"


def test_one_prefix_pass_per_decision_counted_at_the_server(fork_base, served, connect_to):
    server = served(fork_base)
    remote = connect_to(server.uri)
    layout = NoiseLayout(remote.spec.noise, "chunk", 1.5)
    head = SteeringHead(HeadConfig.for_base(remote.spec, layout, NetworkConfig(width=16, layers=1)))
    task = TaskConfig("point:fork", max_episode_steps=400, num_envs=4)
    with VectorTask(task, remote.spec.executed_steps) as vector:
        replay = Replay(500, layout.latent_shape)
        collector = Collector(remote, head, vector, replay, sac=SACConfig(), first_seed=0)
        for step in range(10):
            collector.step(warm_up=step < 5)
    assert remote.served() == {"prefix_passes": 10, "observations": 40, "sampler_runs": 10}
    assert server.service.counts["prefix_passes"] == 10


def test_training_over_the_wire_gives_the_same_head_bit_for_bit(fork_recipe, fork_base, served, tmp_path):
    server = served(fork_base)
    base, remote = fork_base, load_base(f"remote:{server.uri}")
    runs = {}
    for name, policy in (("here", base), ("there", remote)):
        run = train(load_recipe(fork_recipe), tmp_path / name, base=policy, evaluate_after=False)
        rows = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
        runs[name] = run.head.state_dict(), [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    (mine, told), (theirs, told_there) = runs["here"], runs["there"]
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert told == told_there and told[-1]["validation_success"] >= 0
    assert remote.sha256() == base.sha256()
    remote.close()


def test_a_recipe_names_a_remote_base(fork_recipe, fork_base, served, tmp_path):
    over = {"base": {"uri": f"remote:{served(fork_base).uri}?deadline=30"}, "train": {"env_steps": 300}}
    run = train(load_recipe(fork_recipe, over), tmp_path / "run", evaluate_after=False)
    SteeredPolicy(fork_base, run.head)
    again = load_recipe(tmp_path / "run" / "recipe.yaml").base.load()
    assert again.client.config.deadline_s == 30
    again.close()


def test_algorithms_that_keep_the_prefix_are_refused(fork_recipe, fork_base, served, tmp_path):
    uri = f"remote:{served(fork_base).uri}"
    with pytest.raises(DsrlError, match=r"algorithm: expected one that does without the base in its update"):
        train(load_recipe(fork_recipe, {"base": {"uri": uri}, "algorithm": "na-exact"}), tmp_path / "run")


def test_a_task_that_does_not_fit_is_refused(remote_pi0, fork_recipe, tmp_path):
    with pytest.raises(DsrlError, match=r"task point:fork: expected actions of width 3"):
        train(load_recipe(fork_recipe), tmp_path / "run", base=remote_pi0)


def test_encodings_are_given_back_when_they_are_forgotten(fork_base, served, observation, connect_to):
    remote = connect_to(served(fork_base, max_handles=2).uri)
    seen, noise = batch([observation(fork_base)]), fork_base.spec.noise.sample(generators([0]))
    kept = remote.encode(seen)
    for seed in range(10):
        remote.denoise(remote.encode(batch([observation(fork_base, seed)])), noise)
    passes = remote.served()["prefix_passes"]
    remote.denoise(kept, noise)
    assert remote.served()["prefix_passes"] == passes  # the others made room, so it is still there


def test_an_encoding_that_had_to_make_room_is_made_again(fork_base, served, observation, connect_to):
    remote = connect_to(served(fork_base, max_handles=2).uri)
    noise = fork_base.spec.noise.sample(generators([0]))
    seen = [batch([observation(fork_base, i)]) for i in range(4)]
    encodings = [remote.encode(each) for each in seen]
    for each, encoding in zip(seen, encodings, strict=True):
        assert torch.equal(remote.denoise(encoding, noise), fork_base.denoise(fork_base.encode(each), noise))


def test_a_restart_of_the_server_is_survived(fork_base, observation, connect_to):
    first = PolicyServer(Service(fork_base), ServerConfig(port=0)).start()
    remote = connect_to(first.uri, deadline_s=20)
    seen, noise = batch([observation(fork_base)]), fork_base.spec.noise.sample(generators([0]))
    encoding = remote.encode(seen)
    first.stop()
    with PolicyServer(Service(fork_base), ServerConfig(port=first.port)):
        assert torch.equal(remote.denoise(encoding, noise), fork_base.denoise(fork_base.encode(seen), noise))
        assert remote.client.connections == 2


def test_another_base_behind_the_same_address_is_noticed(fork_base, observation, connect_to):
    from dsrl_vla.adapters.flow_mlp import FlowMLP, FlowMLPConfig, FlowMLPModel

    first = PolicyServer(Service(fork_base), ServerConfig(port=0)).start()
    remote = connect_to(first.uri, deadline_s=20)
    first.stop()
    other = FlowMLP(FlowMLPModel(FlowMLPConfig(4, 2)))
    another = pytest.raises(DsrlError, match="expected the base that was served there before, got another one")
    with PolicyServer(Service(other), ServerConfig(port=first.port)), another:
        remote.encode(batch([observation(fork_base)]))


def test_other_processors_around_the_same_weights_are_noticed(tiny_pi0, observation, connect_to):
    """The same weights under other statistics would act on another scale."""
    first = PolicyServer(Service(tiny_pi0), ServerConfig(port=0)).start()
    remote = connect_to(first.uri, deadline_s=20)
    first.stop()
    service = Service(tiny_pi0)
    service.fingerprint = replace(service.fingerprint, processors={"statistics": "others"})
    another = pytest.raises(DsrlError, match="expected the base that was served there before, got another one")
    with PolicyServer(service, ServerConfig(port=first.port)), another:
        remote.encode(batch([observation(tiny_pi0)]))


def test_more_noises_than_a_request_may_hold_go_in_several(fork_base, served, observation, connect_to):
    base = connect_to(served(fork_base).uri)
    seen = batch([observation(fork_base, i) for i in range(32)])
    noise = torch.randn(32, 9, *fork_base.spec.noise.shape)  # the bank of 32 environments: 288
    wanted = fork_base.denoise(fork_base.encode(seen), noise)
    assert torch.allclose(base.denoise(base.encode(seen), noise), wanted, atol=1e-5)
    assert base.served() == {"prefix_passes": 1, "observations": 32, "sampler_runs": 2}
    with pytest.raises(DsrlError, match="at most 256 rows in one request, got 257"):
        base.encode(batch([observation(fork_base)] * 257))


def test_a_closed_base_says_so_and_can_be_closed_again(fork_base, observation, connect_to):
    with PolicyServer(Service(fork_base), ServerConfig(port=0)) as server:
        remote = connect_to(server.uri)
        remote.close()
        remote.close()
        with pytest.raises(ServerUnavailableError, match="expected an open client, got one that was closed"):
            remote.act(observation(fork_base), seed=0)


def test_a_base_that_is_closed_while_a_request_waits_says_so_to_the_one_that_waits(fork_base, served, observation):
    base, found = Slow(fork_base.model), []
    base.seconds = 0.0
    remote = load_base("remote:" + served(base).uri)
    base.seconds = 3.0
    encoding = remote.encode(batch([observation(fork_base)]))

    def wait():
        try:
            remote.denoise(encoding, torch.zeros(1, 1, *remote.spec.noise.shape))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.3)
    remote.close()
    thread.join(2.0)
    assert not thread.is_alive() and isinstance(found[0], ServerUnavailableError) and "was closed" in str(found[0])


def test_noise_that_spoils_the_actions_is_fallen_back_from_as_in_process(fork_base, served, observation, connect_to):
    base, seen = Spoilt(fork_base.model), observation(fork_base)
    head = make_head(base)
    policies = [SteeredPolicy(each, head) for each in (base, connect_to(served(base).uri))]
    mine, theirs = (policy.act(seen, seed=3) for policy in policies)
    assert torch.equal(mine, theirs) and torch.equal(mine, base.act(seen, seed=3))
    assert [policy.fallbacks for policy in policies] == [{"base": 1}] * 2


def late(call, deadline):
    """How many seconds after its deadline a call gives up."""
    start = time.monotonic()
    with pytest.raises(ServerUnavailableError) as error:
        call()
    assert f"expected an answer within {deadline:g} s, got none" in str(error.value)
    assert isinstance(error.value, DsrlError) and isinstance(error.value, ConnectionError)
    return time.monotonic() - start - deadline


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="stops a process")
def test_a_server_that_hangs_or_dies_costs_a_deadline_and_no_more(fork_base, fork_folder, observation, connect_to):
    process, uri = start_cli(f"flow-mlp:{fork_folder}", "--threads", "1")
    try:
        remote = connect_to(uri, deadline_s=0.5)
        seen, noise = batch([observation(fork_base)]), fork_base.spec.noise.sample(generators([0]))
        encoding = remote.encode(seen)
        expected = fork_base.denoise(fork_base.encode(seen), noise)
        os.kill(process.pid, signal.SIGSTOP)
        hung = [late(lambda: remote.denoise(encoding, noise), 0.5) for _ in range(3)]
        os.kill(process.pid, signal.SIGCONT)
        assert torch.equal(remote.denoise(encoding, noise), expected)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        dead = [late(lambda: remote.denoise(encoding, noise), 0.5) for _ in range(3)]
    finally:
        process.kill()
    assert np.median(hung) <= 0.1 and np.median(dead) <= 0.1, (hung, dead)


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="stops a process")
def test_a_server_killed_while_it_is_waited_for_is_followed_by_the_next(
    fork_base, fork_folder, observation, connect_to
):
    """The request is on its way when the server dies; a new one on the same port answers the next."""
    process, uri = start_cli(f"flow-mlp:{fork_folder}", "--threads", "1")
    try:
        remote = connect_to(uri, deadline_s=2.0)
        seen, noise = batch([observation(fork_base)]), fork_base.spec.noise.sample(generators([0]))
        encoding = remote.encode(seen)
        os.kill(process.pid, signal.SIGSTOP)
        threading.Timer(0.5, process.kill).start()
        assert late(lambda: remote.denoise(encoding, noise), 2.0) <= 0.2
        process.wait()
    finally:
        process.kill()
    again = Service(load_base(f"flow-mlp:{fork_folder}"))
    with PolicyServer(again, ServerConfig(port=int(uri.rpartition(":")[2]))):
        assert torch.equal(remote.denoise(encoding, noise), fork_base.denoise(fork_base.encode(seen), noise))


def test_a_server_slower_than_the_deadline_answers_the_next_request(fork_base, observation, connect_to):
    base = Slow(fork_base.model)
    server = PolicyServer(Service(base), ServerConfig(port=0)).start()
    remote = connect_to(server.uri, deadline_s=1.0)
    base.seconds = 1.5
    encoding = remote.encode(batch([observation(base)]))
    noise = base.spec.noise.sample(generators([0]))
    assert late(lambda: remote.denoise(encoding, noise), 1.0) <= 0.1
    base.seconds = 0.0
    time.sleep(1.0)
    assert torch.equal(remote.denoise(encoding, noise), fork_base.denoise(encoding_of(fork_base, observation), noise))
    server.stop()


def encoding_of(base, observation):
    return base.encode(batch([observation(base)]))


def test_threads_that_share_a_connection_get_their_own_answers(fork_base, served, observation, connect_to):
    remote = connect_to(served(fork_base, max_handles=8).uri)
    noise, wrong = fork_base.spec.noise.sample(generators([0])), []

    def work(first):
        for seed in range(first, first + 20):
            seen = batch([observation(fork_base, seed)])
            found = remote.denoise(remote.encode(seen), noise)
            if not torch.equal(found, fork_base.denoise(fork_base.encode(seen), noise)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(100 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_failure_of_the_served_base_is_said_to_be_the_servers(fork_base, served, observation, connect_to):
    base = Failing(fork_base.model)
    remote = connect_to(served(base).uri)
    broken = batch([observation(base)])
    broken["observation.state"] += 200
    with pytest.raises(ServerFailedError, match="internal error [0-9a-f]{8}; the server's log has it"):
        remote.denoise(remote.encode(broken), base.spec.noise.sample(generators([0])))


def test_bad_observations_are_refused_here_and_there(remote_fork, observation):
    with pytest.raises(DsrlError, match="observation.state: expected shape"):
        remote_fork.encode({"observation.state": np.zeros((1, 3), np.float32)})
    with pytest.raises(DsrlError, match=r"ws://.*: observation.state: expected shape \(B, 4\)"):
        remote_fork.client.request({"dsrl/op": "encode", "observation.state": np.zeros((1, 3), np.float32)})


def test_a_client_that_finds_nobody_leaves_nothing_behind(free_port):
    before = threading.active_count(), len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(5):
        with pytest.raises(ServerUnavailableError):
            Client(ClientConfig(f"ws://127.0.0.1:{free_port}", deadline_s=0.05))
    time.sleep(0.2)
    assert threading.active_count() <= before[0]
    assert not before[1] or len(os.listdir("/proc/self/fd")) <= before[1]


@pytest.fixture
def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_keys(fork_base, served, connect_to, monkeypatch):
    uri = served(fork_base, api_key=KEY).uri
    for wrong in ("", KEY + "!"):
        with pytest.raises(
            DsrlError, match=f"an API key that the server takes, got 401. Set {protocol.API_KEY_VARIABLE}"
        ):
            connect_to(uri, api_key=wrong)
    monkeypatch.setenv(protocol.API_KEY_VARIABLE, KEY)
    assert connect_to(uri).spec.action_dim == 2


@pytest.mark.parametrize(
    ("uri", "options", "words"),
    [
        ("http://x:1", {}, "remote: expected ws://<host>:<port> or wss://<host>:<port>, got 'http://x:1'"),
        ("ws://127.0.0.1:9?deadlin=1", {}, "unknown remote option 'deadlin'. Did you mean 'deadline'"),
        ("ws://127.0.0.1:9?deadline=soon", {}, "remote option deadline: expected seconds, got 'soon'"),
        ("ws://127.0.0.1:9?deadline=0", {}, "remote deadline: expected seconds above 0"),
        (
            "ws://127.0.0.1:9?deadline=inf",
            {},
            "remote deadline: expected seconds above 0 and at most 86400.0, got inf",
        ),
        ("ws://127.0.0.1:9?deadline=0.3", {}, "expected an answer within 0.3 s, got none"),
        ("ws://127.0.0.1:9", {"device": "cuda"}, "base.device: expected the default, for the server chooses it"),
        ("wss://127.0.0.1:9?ca=nowhere.pem", {}, "remote ca: expected a file of certificates in PEM"),
    ],
)
def test_what_the_loader_refuses(uri, options, words):
    with pytest.raises(DsrlError) as error:
        load_base(f"remote:{uri}", **options)
    assert words in str(error.value)


def test_dtype_is_the_servers_affair(fork_base, served, connect_to, tiny_pi0_bf16):
    with pytest.raises(
        DsrlError, match="base.dtype: expected float32, in which it is served, got bfloat16. Give --dtype"
    ):
        connect_to(served(fork_base).uri, dtype="bfloat16")
    uri = served(tiny_pi0_bf16).uri
    assert connect_to(uri, dtype="bfloat16").spec.dtype == connect_to(uri).spec.dtype == "bfloat16"


class Liar(Service):
    """A server that does not do what it says."""

    def __init__(self, base, **changes):
        super().__init__(base)
        self.changes = changes

    def run(self, request, handles):
        reply = super().run(request, handles)
        return {k: self.changes.get(k, v) for k, v in reply.items() if self.changes.get(k, v) is not None}

    def metadata(self):
        found = super().metadata()
        found["dsrl"] |= self.changes.get("metadata", {})
        return found


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"dsrl/source": ()}, NotSteerableError, "A server that ignores noise cannot be steered"),
        ({"dsrl/source": "prior"}, NotSteerableError, "got one from 'prior'"),
        (
            {"actions": np.zeros((1, 1, 4, 3), np.float32)},
            DsrlError,
            r"actions: expected floats of shape \(1, 1, 4, 2\)",
        ),
        ({"actions": "none"}, DsrlError, "got str"),
        (
            {"dsrl/feature": np.zeros((1, 3), np.float32)},
            DsrlError,
            r"dsrl/feature: expected float32 of shape \(1, 64\)",
        ),
        ({"dsrl/handle": "x"}, DsrlError, "dsrl/handle: expected a number"),
        ({"metadata": {"protocol": 2}}, DsrlError, "expected protocol 1, got 2. Install one version"),
        ({"metadata": {"spec": None}}, DsrlError, "server metadata, spec: expected a mapping"),
        ({"metadata": {"spec": {"noise": {}}}}, DsrlError, "server metadata, spec"),
    ],
)
def test_a_server_that_lies_is_caught(fork_base, observation, connect_to, changes, error, words):
    with PolicyServer(Liar(fork_base, **changes), ServerConfig(port=0)) as server, pytest.raises(error, match=words):
        remote = connect_to(server.uri)
        remote.denoise(remote.encode(batch([observation(remote)])), remote.spec.noise.sample(generators([0])))


@pytest.mark.parametrize("where", ["noise.horizon", "noise.live", "observation.cameras", "action_dim"])
@pytest.mark.parametrize("value", [-1, 1.5, "3", None, [], {"a": 1}, 10**9, [True] * 3])
def test_a_spec_from_a_stranger_is_read_with_care(fork_base, where, value):
    tree = protocol.spec_to_plain(fork_base.spec)
    assert protocol.spec_from_plain(tree) == fork_base.spec
    place = tree
    for key in where.split(".")[:-1]:
        place = place[key]
    place[where.split(".")[-1]] = value
    with pytest.raises(DsrlError):
        protocol.spec_from_plain(tree)
