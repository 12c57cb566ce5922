"""What the tests of server and client share: a bare client, a head, and bases with something wrong with them."""

import contextlib
import http.client
import os
import subprocess
import sys
import time
from urllib.parse import urlsplit

import numpy as np
import torch
from dsrl_vla import SteeringHead
from dsrl_vla.adapters.flow_mlp import FlowMLP
from dsrl_vla.head import HeadConfig
from dsrl_vla.networks import NetworkConfig
from dsrl_vla.noise import NoiseLayout
from dsrl_vla.serving.wire import pack, unpack
from websockets.sync.client import connect

KEY = "sixteen-characters-or-more"


class Line:
    """A client's end, as plain as can be."""

    def __init__(self, uri, **options):
        self._stack = contextlib.ExitStack()
        options = {"compression": None, "max_size": None, "proxy": None} | options
        self.socket = self._stack.enter_context(connect(uri, **options))
        self.metadata = unpack(self.socket.recv())

    def ask(self, message):
        self.socket.send(pack(message))
        reply = self.socket.recv(timeout=60)
        return reply if isinstance(reply, str) else unpack(reply)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stack.close()


def make_head(base, bound=1.0, **more):
    torch.manual_seed(1)
    layout = NoiseLayout(base.spec.noise, "repeat", bound)
    more.setdefault("fingerprint", base.fingerprint())
    return SteeringHead(HeadConfig.for_base(base.spec, layout, NetworkConfig(width=16, layers=1), **more)).eval()


class Failing(FlowMLP):
    """Breaks down when the state's first number says so."""

    def _denoise(self, encoding, noise):
        if (encoding.feature > 1e6).any():
            raise RuntimeError("secret: /home/someone/weights")
        actions = super()._denoise(encoding, noise)
        return actions * float("nan") if self.poison else actions

    poison = False

    def _encode(self, observations, batch):
        encoding = super()._encode(observations, batch)
        if (np.asarray(observations["observation.state"])[:, 0] > 100).any():
            encoding.feature.fill_(1e7)
        return encoding


class Slow(FlowMLP):
    """Takes its time, some of it computing."""

    seconds = 0.3

    def _denoise(self, encoding, noise):
        until, product = time.monotonic() + self.seconds, torch.ones(200, 200)
        while time.monotonic() < until:
            product = (product @ product).clamp(0, 1)
        return super()._denoise(encoding, noise)


class Spoilt(FlowMLP):
    """Its actions are NaN under noise that is the same at every step of the chunk, as a head's is in `repeat`."""

    def _denoise(self, encoding, noise):
        same = (noise == noise[:, :, :1]).all(dim=(2, 3))
        return torch.where(same[:, :, None, None], torch.nan, super()._denoise(encoding, noise))


def health(uri):
    where, start = urlsplit(uri), time.perf_counter()
    link = http.client.HTTPConnection(where.hostname, where.port, timeout=10)
    link.request("GET", "/healthz")
    status = link.getresponse().status
    link.close()
    return status, time.perf_counter() - start


def start_cli(*argv, **env):
    """``dsrl-vla serve`` in a process of its own; returns it and the URI it prints."""
    command = [sys.executable, "-m", "dsrl_vla.cli", "serve", *map(str, argv), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | env)
    said = process.stdout.readline()
    assert said.startswith("serving "), said
    return process, said.split()[-1]


def corrupt(data, rng):
    """A message with something wrong: cut, flipped, spliced, grown, or nothing but noise."""
    kind, data = rng.randrange(6), bytearray(data)
    if kind == 0:
        return bytes(data[: rng.randrange(len(data))])
    if kind == 1:
        for _ in range(rng.randrange(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    if kind == 2:
        at, of = sorted(rng.randrange(len(data)) for _ in range(2))
        del data[at:of]
    if kind == 3:
        at = rng.randrange(len(data))
        data[at:at] = rng.randbytes(rng.randrange(1, 64))
    if kind == 4:
        return rng.randbytes(rng.randrange(1, 400))
    if kind == 5:  # lengths and types, where they hurt most
        for marker in (b"shape", b"dtype", b"data", b"__ndarray__"):
            at = data.find(marker)
            if at >= 0 and rng.random() < 0.5:
                data[at + len(marker)] = rng.choice([0xDD, 0xDF, 0xC6, 0xC9, 0xC1, 0xC0, 0xCF, 0x9F, 0x80])
    return bytes(data)
