"""The server as its clients see it: openpi's protocol, the reserved keys, the fork's envelope, and who may come in."""

import dataclasses
import logging
import shutil
import subprocess
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dsrl_vla import SteeredPolicy, SteeringHead
from dsrl_vla.adapters.flow_mlp import FlowMLP
from dsrl_vla.errors import DsrlError
from dsrl_vla.observation import batch
from dsrl_vla.serving.keys import PRESETS, KeyMap, parse_keys
from dsrl_vla.serving.requests import Infer
from dsrl_vla.serving.server import PolicyServer, ServerConfig
from dsrl_vla.serving.service import Handles, Service
from dsrl_vla.serving.wire import pack, unpack
from dsrl_vla.serving.worker import Worker, _Job
from serving_parts import KEY, Failing, Line, Slow, Spoilt, health, make_head, start_cli
from websockets.exceptions import ConnectionClosed, InvalidStatus


@pytest.fixture(scope="module")
def head(tiny_pi0):
    return make_head(tiny_pi0)


@pytest.fixture(scope="module")
def plain(tiny_pi0, served):
    with Line(served(tiny_pi0).uri) as line:
        yield line


@pytest.fixture(scope="module")
def steered(tiny_pi0, head, served):
    with Line(served(tiny_pi0, head).uri) as line:
        yield line


def openpi(seen):
    """The same observation as a robot written for openpi sends it."""
    return {
        "observation/image": seen["observation.images.front"],
        "observation/wrist_image": seen["observation.images.wrist"],
        "observation/state": seen["observation.state"].astype(np.float64),
        "prompt": seen["task"],
    }


def test_a_client_gets_the_bases_own_actions_at_its_seed(plain, tiny_pi0, observation):
    seen = observation(tiny_pi0)
    reply = plain.ask({**seen, "dsrl/seed": 5})
    assert torch.equal(torch.tensor(reply["actions"])[:3], tiny_pi0.act(seen, seed=5))
    assert reply["actions"].shape == (6, 3) and reply["actions"].dtype == np.float32
    assert reply["dsrl/source"] == "prior" and reply["dsrl/seed"] == 5
    assert reply["server_timing"]["infer_ms"] > 0


def test_without_a_seed_the_base_draws_afresh_and_says_from_where(plain, tiny_pi0, observation):
    seen = observation(tiny_pi0)
    first, second = plain.ask(seen), plain.ask(seen)
    assert not np.array_equal(first["actions"], second["actions"])
    again = plain.ask({**seen, "dsrl/seed": second["dsrl/seed"]})
    assert np.array_equal(again["actions"], second["actions"])
    assert second["server_timing"]["prev_total_ms"] > 0


@pytest.mark.parametrize("images", ["uint8", "float", "channels first"])
def test_openpis_keys_mean_the_same(plain, tiny_pi0, observation, images):
    seen = observation(tiny_pi0, size=(32, 48))
    theirs = openpi(seen)
    for camera, key in (("front", "observation/image"), ("wrist", "observation/wrist_image")):
        if images == "float":
            theirs[key] = (theirs[key].astype(np.float32) + 0.25) / 255.25
            seen[f"observation.images.{camera}"] = (theirs[key] * 255).astype(np.uint8)
        if images == "channels first":
            theirs[key] = theirs[key].transpose(2, 0, 1)
    mine = plain.ask({**seen, "dsrl/seed": 1})
    assert np.array_equal(plain.ask({**theirs, "dsrl/seed": 1})["actions"], mine["actions"])


def test_a_head_steers_whoever_asks(steered, tiny_pi0, head, observation):
    seen, policy = observation(tiny_pi0), SteeredPolicy(tiny_pi0, head)
    reply = steered.ask(openpi(seen))
    assert reply["dsrl/source"] == "head"
    assert torch.equal(torch.tensor(reply["actions"])[:3], policy.act(seen))
    sampled = steered.ask({**seen, "dsrl/deterministic": False, "dsrl/seed": 3})
    assert torch.equal(torch.tensor(sampled["actions"])[:3], policy.act(seen, seed=3, deterministic=False))
    own = steered.ask({**seen, "dsrl/steer": False, "dsrl/seed": 3})
    assert own["dsrl/source"] == "prior"
    assert torch.equal(torch.tensor(own["actions"])[:3], tiny_pi0.act(seen, seed=3))


def test_noise_of_the_requests_own(steered, tiny_pi0, observation):
    seen, rng = observation(tiny_pi0), np.random.default_rng(0)
    noise = rng.normal(size=(4, 6, 8)).astype(np.float32)
    expected = tiny_pi0.denoise(tiny_pi0.encode(batch([seen])), torch.from_numpy(noise)[None])[0].numpy()
    one = steered.ask({**seen, "dsrl/noise": noise[0]})
    assert one["dsrl/source"] == "request" and one["actions"].shape == (6, 3)
    assert np.allclose(one["actions"], expected[0], atol=1e-5)
    assert np.array_equal(steered.ask({**seen, "dsrl/noise": noise[:1]})["actions"], one["actions"])
    assert np.array_equal(steered.ask({**seen, "dsrl/noise": noise[0].astype(np.float64)})["actions"], one["actions"])
    assert np.array_equal(steered.ask({**seen, "dsrl/noise": noise[0].tolist()})["actions"], one["actions"])
    many = steered.ask({**seen, "dsrl/noise": noise})
    assert np.array_equal(many["actions"], expected)
    row = steered.ask({**seen, "dsrl/noise": noise[0, :1]})
    whole = steered.ask({**seen, "dsrl/noise": np.repeat(noise[0, :1], 6, 0)})
    assert np.array_equal(row["actions"], whole["actions"])


def test_several_samples_of_one_observation(steered, plain, tiny_pi0, observation):
    seen = observation(tiny_pi0)
    own = plain.ask({**seen, "dsrl/num_samples": 3, "dsrl/seed": 4, "dsrl/return": ["noise"]})
    assert own["actions"].shape == (3, 6, 3) and own["dsrl/noise"].shape == (3, 6, 8)
    assert len({a.tobytes() for a in own["actions"]}) == 3
    drawn = steered.ask({**seen, "dsrl/num_samples": 3, "dsrl/seed": 4, "dsrl/return": ["noise"]})
    assert len({a.tobytes() for a in drawn["actions"]}) == 3 and np.abs(drawn["dsrl/noise"]).max() <= 1
    assert plain.ask({**seen, "dsrl/num_samples": 1})["actions"].shape == (1, 6, 3)


def test_feature_and_noise_come_only_when_asked_for(steered, tiny_pi0, observation):
    """openpi's ActionChunkBroker slices every array of a reply by step."""
    seen = observation(tiny_pi0)
    arrays = lambda reply: {key for key, value in reply.items() if isinstance(value, np.ndarray)}
    assert arrays(steered.ask(seen)) == {"actions"}
    reply = steered.ask({**seen, "dsrl/return": ["feature", "noise"]})
    assert arrays(reply) == {"actions", "dsrl/feature", "dsrl/noise"}
    assert np.array_equal(reply["dsrl/feature"], tiny_pi0.encode(batch([seen])).feature[0].numpy())
    again = steered.ask({**seen, "dsrl/noise": reply["dsrl/noise"]})
    assert np.array_equal(again["actions"], reply["actions"])


def test_the_forks_envelope(steered, tiny_pi0, observation):
    seen, noise = observation(tiny_pi0), np.random.default_rng(0).normal(size=(1, 6, 8)).astype(np.float32)
    hidden, cache = steered.ask({"method": "get_prefix_rep", "obs": openpi(seen)})
    assert np.array_equal(hidden[:, -1, :], tiny_pi0.encode(batch([seen])).feature.numpy()) and cache == []
    reply = steered.ask({"method": "infer", "obs": openpi(seen) | {"noise": noise}})
    flat = steered.ask({**seen, "dsrl/noise": noise})
    assert reply["dsrl/source"] == "request" and np.array_equal(reply["actions"], flat["actions"])
    assert steered.ask({"method": "infer", "obs": openpi(seen)})["dsrl/source"] == "head"
    flat = steered.ask({**seen, "dsrl/op": "feature"})  # ours is a dictionary, as every reply
    assert np.array_equal(flat["dsrl/feature"], hidden[:, -1, :])
    assert "unknown method 'train'" in steered.ask({"method": "train", "obs": {}})


def test_the_handshake_says_what_a_client_must_know(steered, plain, tiny_pi0):
    about = steered.metadata["dsrl"]
    assert about["protocol"] == 1 and about["noise_shape"] == [6, 8] and about["handles"] is True
    assert about["layout"] == {"name": "repeat", "bound": 1.0, "columns": "live"}
    assert about["sha256"] == tiny_pi0.sha256() and plain.metadata["dsrl"]["layout"] is None
    assert about["spec"]["action_dim"] == 3 and about["spec"]["noise"]["live"] == [True] * 3 + [False] * 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dsrl/noise": np.zeros((5, 8), np.float32)}, "dsrl/noise: expected shape (6, 8), (1, 8) or (K, 6, 8)"),
        ({"dsrl/noise": np.full((6, 8), np.nan, np.float32)}, "noise: expected finite values"),
        ({"dsrl/noise": np.full((6, 8), 1e300)}, "noise: expected finite values"),
        ({"dsrl/noise": "loud"}, "dsrl/noise: expected numbers"),
        ({"dsrl/noise": [["loud"] * 8] * 6}, "dsrl/noise: expected numbers"),
        ({"dsrl/noise": np.zeros((257, 6, 8), np.float32)}, "with K up to 256"),
        ({"dsrl/noise": np.zeros((2, 6, 8), np.float32), "dsrl/num_samples": 3}, "dsrl/num_samples: expected the 2"),
        ({"dsrl/seed": -1}, "dsrl/seed: expected an integer from 0"),
        ({"dsrl/seed": 1.5}, "dsrl/seed: expected an integer from 0"),
        ({"dsrl/num_samples": 0}, "dsrl/num_samples: expected an integer from 1 to 256"),
        ({"dsrl/steer": "no"}, "dsrl/steer: expected true or false"),
        ({"dsrl/return": ["everything"]}, "unknown thing to return 'everything'"),
        ({"dsrl/return": "feature"}, "dsrl/return: expected a list"),
        ({"dsrl/nosie": 1}, "unknown reserved key 'dsrl/nosie'. Did you mean 'dsrl/noise'"),
        ({"dsrl/op": "train"}, "unknown operation 'train'"),
        ({"dsrl/op": np.zeros(2)}, "unknown operation"),
        ({"dsrl/op": "denoise", "dsrl/handle": 99, "dsrl/noise": np.zeros((1, 1, 6, 8), np.float32)}, "Encode again"),
        ({"dsrl/op": "denoise", "dsrl/noise": np.zeros((1, 1, 6, 8), np.float32)}, "dsrl/handle: expected an integer"),
        ({"dsrl/op": "denoise", "dsrl/handle": 1}, "dsrl/noise: expected an array (B, K, H, D)"),
        ({"dsrl/op": "encode"}, "observation.state: expected shape (B, 5)"),
        ({"dsrl/seed": 1, "observation.state": np.zeros(4, np.float32)}, "observation.state: expected shape (B, 5)"),
        ({"dsrl/seed": 1, "observation.state": "here"}, "observation.state: expected numbers"),
        ({"dsrl/seed": 1, "observation.state": ["x" * 60_000, *"abcd" * 4000]}, "observation.state: expected numbers"),
        (
            {"dsrl/seed": 1, "observation.state": [[1], [2, 3]]},
            "observation.state: expected an array, got a ragged list",
        ),
        ({"dsrl/seed": 1, "observation.images.front": np.zeros((32, 32, 3))}, "expected uint8"),
        ({"dsrl/seed": 1, "task": 7}, "prompt: expected text"),
    ],
)
def test_a_bad_request_is_refused_by_name_and_the_connection_lives(plain, tiny_pi0, observation, change, words):
    seen = observation(tiny_pi0)
    reply = plain.ask({**seen, **change})
    assert words in reply["dsrl/error"]["message"] and "Traceback" not in reply["dsrl/error"]["message"]
    assert plain.ask(seen)["actions"].shape == (6, 3)


def test_a_batch_is_looked_at_before_it_is_gone_through(plain, tiny_pi0, observation):
    """Rows and prompts that take no bytes on the wire would take gigabytes here."""
    seen = batch([observation(tiny_pi0)]) | {"dsrl/op": "encode"}
    refused = lambda change: plain.ask(seen | change)["dsrl/error"]["message"]
    assert "task: expected a list of 1 prompts" in refused({"task": np.zeros((2_000_000, 0), np.uint8)})
    assert "expected at most 256 rows" in refused({"observation.state": np.zeros((300, 5), np.float32)})
    assert "a row or more" in refused({"observation.state": np.zeros((0, 5), np.float32)})
    assert "internal" not in refused({"observation.state": 1.0})
    assert "dsrl/handle" in plain.ask(seen | {"notes": [["a"], ["b", "c"]]})  # nobody reads them


def test_jobs_of_clients_that_hang_up_are_called_off(fork_base, served, observation):
    class Counting(Slow):
        calls = 0

        def _encode(self, observations, batch):
            type(self).calls += 1
            time.sleep(0.4)
            return super()._encode(observations, batch)

    base = Counting(fork_base.model)
    server, seen = served(base), observation(base)
    before, request = base.calls, pack({k: v[None] for k, v in seen.items()} | {"dsrl/op": "encode"})
    for _ in range(8):
        with Line(server.uri) as line:
            line.socket.send(request)
    with Line(server.uri) as line:
        assert line.ask(seen)["actions"].shape == (4, 2)
    assert base.calls - before <= 3  # the first may have begun, and its successor


def test_it_stops_at_once_whatever_is_queued(fork_base, observation):
    base = Slow(fork_base.model)
    base.seconds = 0.0
    server = PolicyServer(Service(base), ServerConfig(port=0, max_batch=1)).start()
    base.seconds, lines = 0.5, [Line(server.uri) for _ in range(10)]
    for line in lines:
        line.socket.send(pack(observation(base)))
    time.sleep(0.2)
    start = time.monotonic()
    server.stop()
    assert time.monotonic() - start < 3 and not server.listening
    for line in lines:
        with pytest.raises(ConnectionClosed):
            line.socket.recv(timeout=10)


def test_it_can_be_stopped_while_it_warms_up(fork_base):
    base, begun = Slow(fork_base.model), threading.Event()
    heard: list[PolicyServer] = []

    class Told(Slow):
        def _denoise(self, encoding, noise):
            begun.set()
            return super()._denoise(encoding, noise)

    server = PolicyServer(Service(Told(base.model)), ServerConfig(port=0))
    thread = threading.Thread(target=lambda: heard.append(server.start()), daemon=True)
    thread.start()
    assert begun.wait(30)
    server.stop()
    thread.join(30)
    assert heard == [server] and not server.listening


@pytest.mark.parametrize("broken", [1, 3])
def test_a_head_that_fails_leaves_each_sample_the_bases_own(fork_base, observation, broken, monkeypatch):
    """Of three samples; where only some fail, the others are the head's."""
    service = Service(fork_base, make_head(fork_base))
    seen, session = observation(fork_base), service.session(1)
    asked, latent = [], SteeringHead.latent

    def failing(self, *args):
        asked.append(0)
        if len(asked) <= broken:
            raise RuntimeError("broken")
        return latent(self, *args)

    monkeypatch.setattr(SteeringHead, "latent", failing)
    request = dataclasses.replace(parse_infer(fork_base, seen, 7), samples=3, many=True)
    found = service.run(request, session)
    own = service.run(dataclasses.replace(request, steer=False), session)["actions"]
    same = [np.array_equal(*pair) for pair in zip(found["actions"], own, strict=True)]
    assert same == [True] * broken + [False] * (3 - broken)
    assert found["dsrl/source"] == ("prior" if broken == 3 else "head") and "broken" in found["dsrl/fallback"]


def test_whoever_knows_nothing_of_us_is_told_in_text(plain, tiny_pi0, observation):
    """An unmodified openpi-client raises what it is sent as text."""
    seen = openpi(observation(tiny_pi0))
    del seen["observation/state"]
    assert plain.ask(seen).startswith("observation/state: expected to be in the observation, got only observation/im")
    plain.socket.send("hello")
    assert "expected a binary frame of msgpack" in plain.socket.recv()
    assert "expected a dictionary" in plain.ask([1, 2])
    assert "expected numbers" in plain.ask(openpi(observation(tiny_pi0)) | {"observation/state": "x"})
    glaring = {"observation/image": np.full((8, 8, 3), 2.0)}
    assert "floats in [0, 1]" in plain.ask(openpi(observation(tiny_pi0)) | glaring)


@pytest.mark.parametrize("keys", [lambda seen: seen, openpi])
def test_a_prompt_is_asked_for_and_found_under_either_name(tiny_pi0, served, observation, keys):
    seen, prompt = keys(observation(tiny_pi0)), observation(tiny_pi0)["task"]
    without = {key: value for key, value in seen.items() if key not in ("task", "prompt")}
    with Line(served(tiny_pi0).uri) as line:
        assert "prompt: expected to be in the observation" in line.ask(without)
        expected = line.ask({**seen, "dsrl/seed": 0})["actions"]
        for name in ("task", "prompt"):
            assert np.array_equal(line.ask({**without, name: prompt, "dsrl/seed": 0})["actions"], expected)


def test_a_failure_inside_is_a_number_to_the_client_and_a_traceback_in_the_log(fork_base, served, observation, caplog):
    base = Failing(fork_base.model)
    with Line(served(base).uri) as line, caplog.at_level(logging.ERROR):
        seen = observation(base)
        said = line.ask({**seen, "observation.state": np.full_like(seen["observation.state"], 200)})
        assert said.startswith("internal error ") and "secret" not in said
        number = said.split()[2].rstrip(";")
        assert any(number in record.getMessage() and record.exc_info for record in caplog.records)
        base.poison = True
        refusal = line.ask({**seen, "dsrl/seed": 1})["dsrl/error"]["message"]  # no robot is to get NaN
        assert refusal.startswith("actions: expected finite values")
        base.poison = False
        assert line.ask(seen)["actions"].shape == (4, 2)


def test_clients_that_ask_together_share_a_prefix_pass(fork_base, served, observation):
    base, clients = Slow(fork_base.model), 8
    server = served(base, make_head(base))
    seen = [observation(base, i) for i in range(clients)]
    found = [None] * clients

    def ask(i):
        with Line(server.uri) as line:
            found[i] = line.ask({**seen[i], "dsrl/steer": i % 2 == 0, "dsrl/seed": i})

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.service.counts["observations"] == clients
    assert server.service.counts["prefix_passes"] <= 5
    policy = SteeredPolicy(fork_base, make_head(fork_base))
    for i, reply in enumerate(found):
        expected = policy.act(seen[i]) if i % 2 == 0 else fork_base.act(seen[i], seed=i)
        assert reply["dsrl/source"] == ("head" if i % 2 == 0 else "prior")
        assert np.allclose(reply["actions"], expected.numpy(), atol=1e-5)


def test_batches_are_powers_of_two_all_of_them_warm(fork_base, observation):
    from dsrl_vla.serving.requests import Encode, Infer
    from dsrl_vla.serving.worker import Worker

    sizes, blocked = [], threading.Event()

    class Recording(FlowMLP):
        def fingerprint(self):
            return None

        def _encode(self, observations, batch):
            sizes.append(batch)
            if len(sizes) == 1:
                blocked.wait(10)  # the queue fills up meanwhile
            return super()._encode(observations, batch)

    service = Service(Recording(fork_base.model))
    worker, seen = Worker(service, max_batch=6), batch([observation(fork_base)])
    one, whole = Infer(seen, None, 0), Encode(seen, 1)
    session = service.session(1)
    futures = [worker.submit(one, session)]
    while not sizes:
        time.sleep(0.01)
    futures += [worker.submit(request, session) for request in [*[one] * 7, whole, one, one]]
    blocked.set()
    for future in futures:
        future.result(10)
    assert sizes == [1, 4, 2, 1, 1, 2]
    sizes.clear(), blocked.clear()
    futures = [worker.submit(one, session)]
    while not sizes:
        time.sleep(0.01)
    futures += [worker.submit(one, session) for _ in range(8)]
    assert all(future.cancel() for future in futures[1:4])  # their clients have hung up
    blocked.set()
    for future in futures[4:]:
        future.result(10)
    worker.close()
    assert sizes == [1, 4, 1]
    sizes[:] = [0]
    with PolicyServer(service, ServerConfig(port=0, max_batch=6)):
        assert sizes[1:] == [1, 2, 4, 1]


def test_one_clients_trouble_is_not_everybodys(fork_base, observation):
    from dsrl_vla.serving.requests import Infer
    from dsrl_vla.serving.worker import Worker

    base = Failing(fork_base.model)
    service = Service(base)
    worker, session = Worker(service, max_batch=8), service.session(1)
    good, bad = batch([observation(base)]), batch([observation(base)])
    bad["observation.state"] += 200
    blocked = threading.Event()
    first = worker.submit(Infer(good, None, 0), session)
    first.add_done_callback(lambda _: blocked.wait(10))  # the queue fills up meanwhile
    futures = [worker.submit(Infer(each, None, 0), session) for each in (good, bad, good)]
    blocked.set()
    assert futures[0].result(10)["actions"].shape == (4, 2) and futures[2].result(10)["actions"].shape == (4, 2)
    with pytest.raises(RuntimeError):
        futures[1].result(10)
    worker.close()


def test_health_checks_are_answered_while_the_base_is_busy(fork_base, served, observation):
    base = Slow(fork_base.model)
    server = served(base)
    base.seconds = 2.0
    with Line(server.uri) as line:
        line.socket.send(pack(observation(base)))
        time.sleep(0.1)
        found = [health(server.uri) for _ in range(10)]
        pong = line.socket.ping()
        assert pong.wait(1)
        with pytest.raises(TimeoutError):
            line.socket.recv(timeout=0)  # it is still at it
        assert "actions" in unpack(line.socket.recv())
    assert {status for status, _ in found} == {200}
    assert np.median([seconds for _, seconds in found]) < 0.05


def test_it_warms_up_before_it_listens(fork_base):
    calls = []

    class Recording(FlowMLP):
        def _denoise(self, encoding, noise):
            calls.append(listening)
            return super()._denoise(encoding, noise)

    listening = False
    server = PolicyServer(Service(Recording(fork_base.model)), ServerConfig(port=0))

    def now():
        nonlocal listening
        listening = True
        threading.Thread(target=server.stop).start()

    server.serve_forever(now)
    assert calls and not any(calls)


def test_a_head_that_knows_how_far_training_went_is_not_switched_off_by_warming_up(nano):
    """What is made up to warm up with is foreign to every trained head."""
    head = SteeringHead.from_pretrained("shipped:drawer-open")
    service = Service(nano, head)
    service.warm_up((1, 2, 4, 8, 16))
    assert head.config.furthest and service.policy.steering
    guard = service.session(1).guard
    assert guard.fallbacks == {} and guard.decisions == 0 and not service.counts


def test_actions_that_only_the_heads_noise_spoils_are_the_bases_own(fork_base, served, observation):
    base = Spoilt(fork_base.model)
    seen = observation(base)
    service = Service(base, make_head(base))
    service.warm_up()
    with Line(served(base, make_head(base)).uri) as line:
        reply = line.ask({**seen, "dsrl/seed": 3})
    assert torch.equal(torch.tensor(reply["actions"])[: base.spec.executed_steps], base.act(seen, seed=3))
    assert reply["dsrl/source"] == "prior" and "NaN" in reply["dsrl/fallback"]
    request = [parse_infer(base, seen, seed) for seed in range(10)]
    session = service.session(1)
    for each in request:
        service.run(each, session)
    assert session.guard.fallbacks == {"base": 10} and session.guard.latched
    assert service.counts["noise.prior"] == service.counts["fallbacks"] == 10


def test_one_robots_broken_sensor_switches_the_head_off_for_that_robot_alone(tiny_pi0, served, observation):
    seen, head = observation(tiny_pi0), make_head(tiny_pi0)
    head.config = dataclasses.replace(head.config, furthest={"state": (1.0,) * tiny_pi0.spec.observation.state_dim})
    broken = {**seen, "observation.state": np.full_like(seen["observation.state"], 1e4)}
    uri = served(tiny_pi0, head).uri
    with Line(uri) as one, Line(uri) as other:
        assert {one.ask(broken)["dsrl/source"] for _ in range(10)} == {"prior"}
        assert one.ask(seen)["dsrl/fallback"] == "latched" and other.ask(seen)["dsrl/source"] == "head"
        assert one.ask({"dsrl/op": "status"})["dsrl/status"]["fallbacks"] == 11
    with Line(uri) as again:
        assert again.ask(seen)["dsrl/source"] == "head"


def test_a_service_whose_policy_is_disabled_serves_the_base(fork_base, observation):
    service = Service(fork_base, make_head(fork_base))
    request, session = Infer(batch([observation(fork_base)]), None, 3), service.session(1)
    assert service.run(request, session)["dsrl/source"] == "head"
    with service.policy.disabled():
        assert service.run(request, session)["dsrl/source"] == "prior"


def test_noise_that_spoils_one_clients_actions_costs_the_others_nothing(fork_base, observation):
    """Neither a second run of the base, nor a second entry in the book of fallbacks."""
    base = Spoilt(fork_base.model)
    service, seen = Service(base, make_head(base)), batch([observation(base)])
    poison = torch.zeros(1, 1, *base.spec.noise.shape)
    sessions = [service.session(1) for _ in range(2)]
    good, refused = service.infer([Infer(seen, None, 3), Infer(seen, poison, 3)], sessions)
    assert "NaN" in good["dsrl/fallback"] and isinstance(refused, DsrlError)
    assert sessions[0].guard.fallbacks == {"base": 1} and sessions[0].guard.decisions == 1


def test_a_batch_that_fails_and_is_run_one_by_one_is_counted_once(fork_base, observation, monkeypatch, caplog):
    head = make_head(fork_base)
    service, seen = Service(fork_base, head), batch([observation(fork_base)])
    monkeypatch.setattr(head, "latent", lambda *_: 1 / 0)
    real = fork_base._denoise

    def short_of_memory(encoding, noise):
        if encoding.batch > 1:
            raise RuntimeError("out of memory")
        return real(encoding, noise)

    monkeypatch.setattr(fork_base, "_denoise", short_of_memory, raising=False)
    sessions = [service.session(1) for _ in range(2)]
    jobs = [_Job(Infer(seen, None, i), session) for i, session in enumerate(sessions)]
    worker = Worker(service, 2)
    worker._run(jobs)
    worker.close()
    assert [job.future.result()["dsrl/source"] for job in jobs] == ["prior", "prior"]
    assert "each is run alone" in caplog.text
    assert all(s.guard.decisions == 1 and s.guard.fallbacks == {"exception": 1} for s in sessions)


def parse_infer(base, seen, seed):
    return Infer(batch([seen]), None, seed=seed)


@pytest.mark.parametrize("own", [(), ("wrist",), ("front", "wrist"), ("side", "wrist")])
def test_a_heads_own_cameras_do_not_change_the_bases_order(tiny_pi0, own):
    service = Service(tiny_pi0)
    service.policy = SimpleNamespace(head=SimpleNamespace(config=SimpleNamespace(cameras=own)))
    assert list(service.seen.cameras)[:2] == list(tiny_pi0.spec.observation.cameras)
    assert set(service.seen.cameras) == {*tiny_pi0.spec.observation.cameras, *own}


def test_encodings_are_kept_for_a_connection_and_not_without_end(plain, tiny_pi0, observation):
    seen, noise = batch([observation(tiny_pi0)]), np.zeros((1, 1, 6, 8), np.float32)
    handles = [plain.ask({**seen, "dsrl/op": "encode"})["dsrl/handle"] for _ in range(6)]
    ask = lambda handle: plain.ask({"dsrl/op": "denoise", "dsrl/handle": handle, "dsrl/noise": noise})
    assert [ask(h).get("dsrl/error", {}).get("kind") for h in handles] == ["gone"] * 2 + [None] * 4
    two = plain.ask({"dsrl/op": "denoise", "dsrl/handle": handles[-1], "dsrl/noise": np.repeat(noise, 2, 0)})
    assert "noise: expected shape (1, K, 6, 8)" in two["dsrl/error"]["message"]
    plain.ask({"dsrl/op": "status", "dsrl/release": handles})
    assert ask(handles[-1])["dsrl/error"]["kind"] == "gone"


def test_numbers_of_other_connections_are_not_ones_own():
    one, other = Handles(2), Handles(2)
    mine, theirs = one.keep("mine"), other.keep("theirs")
    assert mine != theirs and one.get(mine) == "mine"
    with pytest.raises(DsrlError, match="Encode again"):
        other.get(mine)


def test_handles_let_go_of_the_least_recently_used():
    handles = Handles(2)
    first, second = handles.keep("a"), handles.keep("b")
    handles.get(first)
    handles.keep("c")
    assert handles.get(first) == "a" and len(handles) == 2
    with pytest.raises(DsrlError, match="Encode again"):
        handles.get(second)


def test_a_key_keeps_strangers_out(fork_base, served, observation):
    server = served(fork_base, api_key=KEY)
    for words in (None, "Api-Key " + KEY[:-1], KEY, "Bearer é"):
        with pytest.raises(InvalidStatus, match="401"):
            Line(server.uri, additional_headers={"Authorization": words} if words else {})
    assert health(server.uri)[0] == 200
    with Line(server.uri, additional_headers={"Authorization": f"Api-Key {KEY}"}) as line:
        assert "actions" in line.ask(observation(fork_base))
    assert KEY not in repr(server.config)


def test_a_page_in_a_browser_is_turned_away(fork_base, served):
    with pytest.raises(InvalidStatus, match="403"):
        Line(served(fork_base).uri, origin="https://example.org")


def test_no_more_than_so_many_connections(fork_base, served, observation):
    server = served(fork_base, max_connections=2)
    with Line(server.uri), Line(server.uri), pytest.raises(InvalidStatus, match="503"):
        Line(server.uri)
    time.sleep(0.2)
    with Line(server.uri) as line:
        assert "actions" in line.ask(observation(fork_base))


def test_a_message_over_the_limit_closes_the_connection(fork_base, served, observation):
    server = served(fork_base)
    line = Line(server.uri)
    with pytest.raises(ConnectionClosed) as closed:
        line.socket.send(bytes(65 * 1024**2))
        line.socket.recv(timeout=30)
    assert closed.value.rcvd.code == 1009
    with Line(server.uri) as line:
        assert "actions" in line.ask(observation(fork_base))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"host": "0.0.0.0"}, "expected an API key when listening on '0.0.0.0'"),
        ({"host": "robot.local"}, "expected an API key when listening on 'robot.local'"),
        ({"api_key": "short"}, "API key: expected 16 ASCII characters or more"),
        ({"tls_cert": "cert.pem"}, "expected both a TLS certificate and its key"),
        ({"max_batch": 0}, "serve.max_batch: expected 1 or more"),
    ],
)
def test_unsafe_or_impossible_settings_are_refused(options, words):
    with pytest.raises(DsrlError) as error:
        ServerConfig(**options)
    assert words in str(error.value)
    ServerConfig(host="0.0.0.0", api_key=KEY), ServerConfig(host="::1"), ServerConfig(host="127.3.2.1")


def test_a_port_in_use_is_said_in_a_sentence(fork_base, served):
    with pytest.raises(DsrlError, match="serve: expected to listen on 127.0.0.1:"):
        PolicyServer(Service(fork_base), ServerConfig(port=served(fork_base).port)).start()


def test_tls(fork_base, served, observation, tmp_path):
    import ssl

    from dsrl_vla import load_base

    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no openssl to make a certificate with: {error}")
    server = served(fork_base, tls_cert=cert, tls_key=key, api_key=KEY)
    assert server.uri.startswith("wss://")
    with pytest.raises(ssl.SSLError):
        Line(server.uri)
    with pytest.raises(DsrlError, match="expected a certificate that can be trusted"):
        load_base(f"remote:{server.uri}", api_key=KEY, deadline_s=5)
    base = load_base(f"remote:{server.uri}?ca={cert}", api_key=KEY)
    assert torch.equal(base.act(observation(base), seed=1), fork_base.act(observation(base), seed=1))
    base.close()
    with pytest.raises(DsrlError, match="certificate and its key in PEM"):
        PolicyServer(Service(fork_base), ServerConfig(tls_cert=key, tls_key=key))


def test_key_maps():
    from dsrl_vla.observation import ObservationSpec

    spec = ObservationSpec(3, {"high": None, "left": None})
    image = np.zeros((4, 5, 3), np.uint8)
    message = {"state": np.arange(3.0), "images": {"cam_high": image + 1, "cam_left_wrist": image.transpose(2, 0, 1)}}
    found = PRESETS["aloha"].translate(message, spec, "fold")
    assert found["observation.images.high"].max() == 1 and found["observation.images.left"].shape == (4, 5, 3)
    assert found["observation.state"].dtype == np.float32 and found["task"] == "fold"
    own = parse_keys("left=a>b,high=c,state=q+g,prompt=say")
    assert own == KeyMap(("q", "g"), {"left": "a>b", "high": "c"}, prompt="say")
    found = own.translate({"a": {"b": image}, "c": image, "q": [1, 2], "g": 3.0, "say": "go"}, spec)
    assert found["observation.state"].tolist() == [1, 2, 3] and found["task"] == "go"
    for text, words in [("libro", "Did you mean 'libero'"), ("a=", "expected <camera>=<openpi's key>")]:
        with pytest.raises(DsrlError, match=words):
            parse_keys(text)
    with pytest.raises(DsrlError, match="unknown camera 'lefft'. Did you mean 'left'"):
        parse_keys("lefft=a,high=c").check(spec)
    with pytest.raises(DsrlError, match="a place for camera 'high'"):
        parse_keys("left=a").check(spec)
    with pytest.raises(DsrlError, match="a wrist camera's place for 'wrist', got 'observation/image'. Name them"):
        KeyMap().translate({"observation/state": np.zeros(3)}, ObservationSpec(3, {"wrist": None, "front": None}))
    three = ObservationSpec(3, {"a": None, "b": None, "c": None})
    with pytest.raises(DsrlError, match="expected a place for each camera of a, b, c"):
        KeyMap().translate({"observation/state": np.zeros(3)}, three)


def test_the_command_serves_a_base_with_a_head_until_it_is_told_to_stop(fork_base, fork_folder, tmp_path, observation):
    head = make_head(fork_base)
    head.save_pretrained(tmp_path / "head")
    (tmp_path / "key").write_text(KEY + "\n")
    options = ["--head", tmp_path / "head", "--api-key-file", tmp_path / "key", "--host", "0.0.0.0", "--threads", "1"]
    process, uri = start_cli(f"flow-mlp:{fork_folder}", *options)
    try:
        headers = {"Authorization": f"Api-Key {KEY}"}
        with Line(uri.replace("0.0.0.0", "127.0.0.1"), additional_headers=headers) as line:
            seen = observation(fork_base)
            reply = line.ask(seen)
            assert reply["dsrl/source"] == "head"
            expected = SteeredPolicy(fork_base, head).act(seen).numpy()
            assert np.allclose(reply["actions"], expected, atol=1e-6)
            process.terminate()
            with pytest.raises(ConnectionClosed):
                line.socket.recv(timeout=20)
        assert process.wait(20) == 0
    finally:
        process.kill()


def test_a_run_is_served_with_its_base_and_its_best_head(fork_base, fork_recipe, tmp_path):
    from dsrl_vla import load_recipe
    from dsrl_vla.cli.serving import ServeArgs, load
    from dsrl_vla.training import load_run

    (tmp_path / "recipe.yaml").write_text(load_recipe(fork_recipe).to_yaml())
    make_head(fork_base).save_pretrained(tmp_path / "best")
    base, head = load(ServeArgs(str(tmp_path)))
    assert base.sha256() == fork_base.sha256() and head.layout.bound == 1.0
    make_head(base, bound=0.5).save_pretrained(tmp_path / "other")
    assert load(ServeArgs(str(tmp_path), head=str(tmp_path / "other")))[1].layout.bound == 0.5
    assert load(ServeArgs(base.spec.uri))[1] is None
    shutil.copy(tmp_path / "recipe.yaml", tmp_path / "other")  # as a head's folder has it
    served = load(ServeArgs(str(tmp_path / "other")))
    assert served[0].sha256() == base.sha256() and served[1].layout.bound == 0.5
    with pytest.raises(DsrlError, match="validated a head, got one without best/. It is a head's folder"):
        load_run(tmp_path / "other")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["serve", "nowhere"],
            "base or run: expected a base's URI such as 'nano:', or a run's directory, got",
        ),
        (["serve", "flow-mlp:x", "--host", "0.0.0.0"], "expected an API key when listening on '0.0.0.0'"),
        (["serve", "flow-mlp:x", "--api-key-file", "none"], "--api-key-file: expected a file that can be read"),
        (["serve", "flow-mlp:x", "--threads", "-2"], "serve.threads: expected 0 or more, got -2"),
        (["serve", "flow-mlp:x", "--port", "70000"], "serve.port: expected from 0 to 65535, got 70000"),
        (["serve", "flow-mlp:x", "--keys", "libro"], "unknown key map 'libro'. Did you mean 'libero'"),
    ],
)
def test_what_the_command_refuses(argv, message, capsys):
    from dsrl_vla.cli import main

    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_a_heads_file_does_not_choose_who_gets_this_machines_key(fork_base, tmp_path, monkeypatch):
    """Nor who gets what its robot sees: a downloaded head may name any address."""
    from dsrl_vla.cli.serving import ServeArgs, load

    monkeypatch.setenv("DSRL_VLA_API_KEY", KEY)
    head = make_head(fork_base)
    head.config = dataclasses.replace(head.config, base_model_name_or_path="remote:ws://127.0.0.1:9?deadline=1")
    head.save_pretrained(tmp_path)
    words = r"no address on the network, got 'remote:.*If you trust it: dsrl-vla serve 'remote:.*--head"
    with pytest.raises(DsrlError, match=words):
        load(ServeArgs(str(tmp_path)))


def test_a_shipped_head_is_served_on_its_own_base():
    from dsrl_vla.cli.serving import ServeArgs, load

    base, head = load(ServeArgs("shipped:drawer-open"))
    assert (base.spec.uri, head.config.base_uri) == ("nano:", "nano:")
