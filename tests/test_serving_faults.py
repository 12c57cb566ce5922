"""What strangers and accidents do to a server: it answers the next good request, and does not grow."""

import json
import random
import socket
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from dsrl_vla.serving.wire import pack, unpack
from serving_parts import KEY, Line, corrupt, health, start_cli
from websockets.exceptions import ConnectionClosed, InvalidStatus

MESSAGES, MIB = 10_000, 1024**2


def resident(pid):
    """Bytes of memory a process has resident."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        pytest.skip("reads /proc")
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmRSS"))


@pytest.fixture(scope="module")
def process(fork_folder):
    """``dsrl-vla serve`` in a process of its own, warm; (process, URI)."""
    process, uri = start_cli(f"flow-mlp:{fork_folder}", "--threads", "1", DSRL_VLA_API_KEY=KEY)
    yield process, uri
    process.terminate()
    assert process.wait(20) == 0  # whatever happened before, it ends as it should


def call(uri):
    return Line(uri, additional_headers={"Authorization": f"Api-Key {KEY}"})


def patiently(ask):
    """What there is no room for is asked for again: on a busy machine it takes a moment to notice who has gone."""
    for _ in range(100):
        try:
            return ask()
        except InvalidStatus:
            time.sleep(0.1)
    raise AssertionError("nobody's place was given to another for ten seconds")


def served_right(uri, fork_base, observation):
    """A good request gets the base's action."""
    seen = observation(fork_base)
    with call(uri) as line:
        reply = line.ask({**seen, "dsrl/seed": 1})
    return np.allclose(reply["actions"], fork_base.act(seen, seed=1).numpy(), atol=1e-5)


def test_ten_thousand_hostile_messages(process, fork_base, observation):
    running, uri = process
    assert served_right(uri, fork_base, observation)
    before, rng = resident(running.pid), random.Random(1)
    good = observation(fork_base)
    noise = np.zeros((1, 1, 4, 2), np.float32)
    seeds = [
        pack({**good, "dsrl/seed": 1, "dsrl/num_samples": 2, "dsrl/return": ["noise"]}),
        pack({"observation.state": good["observation.state"][None], "dsrl/op": "encode", "dsrl/release": [1]}),
        pack({"dsrl/op": "denoise", "dsrl/handle": 1, "dsrl/noise": noise}),
        pack({"method": "infer", "obs": {"observation/state": good["observation.state"], "noise": noise[0]}}),
    ]
    replies = refused = 0
    with call(uri) as line:
        for _ in range(MESSAGES // 50):
            for _ in range(50):
                line.socket.send(corrupt(rng.choice(seeds), rng))
            for _ in range(50):
                reply = line.socket.recv(timeout=60)
                decoded = reply if isinstance(reply, str) else unpack(reply)
                replies += 1
                refused += isinstance(decoded, str) or "dsrl/error" in decoded
                assert "internal" not in str(decoded) and "Traceback" not in str(decoded)
    assert replies == MESSAGES and refused > MESSAGES // 2
    assert served_right(uri, fork_base, observation)
    assert resident(running.pid) - before < 100 * MIB


def test_messages_over_the_limit_do_not_fill_the_memory(process, fork_base, observation):
    running, uri = process
    assert served_right(uri, fork_base, observation)
    before = resident(running.pid)
    for _ in range(3):
        with call(uri) as line, pytest.raises(ConnectionClosed) as closed:
            line.socket.send(bytes(65 * MIB))
            line.socket.recv(timeout=60)
        assert closed.value.rcvd.code == 1009
    assert served_right(uri, fork_base, observation)
    assert resident(running.pid) - before < 100 * MIB


def test_large_good_messages_are_let_go_of(process, fork_base, observation):
    running, uri = process
    with call(uri) as line:
        line.ask({**observation(fork_base), "ballast": bytes(60 * MIB)})
        before = resident(running.pid)
        for _ in range(4):
            assert "actions" in line.ask({**observation(fork_base), "ballast": bytes(60 * MIB)})
    assert resident(running.pid) - before < 100 * MIB


def test_frames_that_are_cut_off_and_bytes_that_are_no_websocket(process, fork_base, observation):
    running, uri = process
    where, rng = urlsplit(uri), random.Random(2)
    upgrade = (
        f"GET / HTTP/1.1\r\nHost: {where.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
        f"Authorization: Api-Key {KEY}\r\n\r\n"
    ).encode()
    before = resident(running.pid)
    for number in range(200):
        raw = socket.create_connection((where.hostname, where.port), timeout=10)
        if number % 2:
            raw.sendall(rng.randbytes(rng.randrange(1, 2000)))
        else:  # a handshake, then a frame that promises more than comes, or none that could be one
            raw.sendall(upgrade)
            raw.recv(4096)
            length = rng.choice([b"\xfe\xff\xff", b"\xff\x00\x00\x00\x00\x03\xff\xff\xff", b"\xff" + b"\xff" * 8])
            raw.sendall(
                rng.choice([b"\x82", b"\x02", b"\x80", b"\xf3"]) + length + rng.randbytes(rng.randrange(1, 500))
            )
        raw.close()
    assert served_right(uri, fork_base, observation)
    assert resident(running.pid) - before < 100 * MIB


def test_clients_that_hang_up_while_they_are_waited_for(process, fork_base, observation):
    running, uri = process
    for _ in range(50):
        line = patiently(lambda: call(uri))
        line.socket.send(pack(observation(fork_base)))
        line.socket.socket.close()
    assert patiently(lambda: served_right(uri, fork_base, observation))


def test_a_client_that_does_not_read_holds_up_nobody(process, fork_base, observation):
    running, uri = process
    before = resident(running.pid)
    with call(uri) as deaf:
        request = pack({**observation(fork_base), "dsrl/num_samples": 256, "dsrl/return": ["noise"]})
        stop = threading.Event()

        def pour():
            try:
                while not stop.is_set():
                    deaf.socket.send(request)
            except (ConnectionClosed, OSError):
                pass

        thread = threading.Thread(target=pour, daemon=True)
        thread.start()
        time.sleep(1.0)
        start = time.perf_counter()
        assert served_right(uri, fork_base, observation)
        assert time.perf_counter() - start < 5
        stop.set()
        deaf.socket.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread from its send; closing alone does not
        thread.join(10)
    assert resident(running.pid) - before < 100 * MIB


def test_guessing_at_the_key_gets_nowhere(process, fork_base, observation):
    running, uri = process
    rng = random.Random(3)
    for _ in range(50):
        guess = "".join(rng.choice(KEY) for _ in range(len(KEY)))
        with pytest.raises(InvalidStatus, match="401"):
            Line(uri, additional_headers={"Authorization": f"Api-Key {guess}"})
    assert health(uri)[0] == 200
    assert served_right(uri, fork_base, observation)


def test_a_long_conversation_does_not_grow(process, fork_base, observation):
    running, uri = process
    seen = pack(observation(fork_base))
    with call(uri) as line:
        for number in range(2000):
            if number == 500:
                before = resident(running.pid)
            line.socket.send(seen)
            line.socket.recv(timeout=60)
    assert resident(running.pid) - before < 4 * MIB


def test_metadata_is_small(process):
    _, uri = process
    with call(uri) as line:
        assert len(json.dumps(line.metadata)) < 4096
