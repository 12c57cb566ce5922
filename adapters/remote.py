"""``remote:ws://host:port[?deadline=<seconds>&ca=<file>]``: a base that another process serves (``dsrl-vla serve``).

The same contract over a socket. `encode` makes the server run its prefix once and keep it; what comes back is the
feature and a handle. `denoise` sends noise and gets actions. So a robot or a simulator needs neither the base's
packages nor its GPU, and training over the wire makes the prefix passes that training in process makes, no more.

The API key, where the server wants one, is read from ``DSRL_VLA_API_KEY``; it has no place in a URI or a recipe.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import torch
from dsrl_vla.errors import NotSteerableError, bad, unknown
from dsrl_vla.observation import PROMPT, Observations, select
from dsrl_vla.pairing import Fingerprint
from dsrl_vla.plain import from_plain
from dsrl_vla.policy import Encoding, FrozenPolicy
from dsrl_vla.serving import protocol as p
from dsrl_vla.serving.client import Client, ClientConfig, HandleGoneError, steering

log = logging.getLogger(__name__)
_OPTIONS = ("deadline", "ca")


class _Kept:
    """An encoding at the server. Gives itself back with the next request after it is forgotten here."""

    def __init__(self, handle: int, connection: int, given_back: deque[tuple[int, int]]):
        self.handle, self.connection, self._given_back = handle, connection, given_back

    def __del__(self) -> None:
        self._given_back.append((self.connection, self.handle))


@dataclass
class _Context:
    observations: Observations
    kept: _Kept


class RemoteBase(FrozenPolicy):
    """What the two kinds of served bases have in common: the spec a server announces, and replies that are checked."""

    def __init__(self, client: Client, uri: str):
        self.client = client
        about = steering(client.metadata, uri)
        served = p.spec_from_plain(about.get("spec"))
        # A head belongs to the base, wherever it runs: the name it remembers is the one the server has for it.
        self.spec = replace(served, uri=uri, repo_id=served.repo_id or served.uri)
        mark = about.get("fingerprint")
        if mark is not None:
            self._fingerprint = from_plain(Fingerprint, mark, "fingerprint", "key of the server's")

    def state_dict(self) -> Mapping[str, torch.Tensor]:
        """Empty: the weights are elsewhere."""
        return {}

    def close(self) -> None:
        """Hang up."""
        self.client.close()

    def _actions(self, reply: Mapping[str, Any], shape: tuple[int, ...]) -> torch.Tensor:
        """The actions of a reply to a request with noise.

        Raises:
            NotSteerableError: the reply does not say that this noise was used.
        """
        if reply.get(p.SOURCE) != "request":
            raise NotSteerableError(
                f"{self.spec.uri}: expected a reply that says the request's noise was used, got one from "
                f"'{reply.get(p.SOURCE, 'nobody knows')}'. A server that ignores noise cannot be steered."
            )
        actions = reply.get(p.ACTIONS)
        if not isinstance(actions, np.ndarray) or actions.shape != shape or actions.dtype.kind != "f":
            got = f"{actions.dtype} {actions.shape}" if isinstance(actions, np.ndarray) else type(actions).__name__
            raise bad(f"{self.spec.uri}: actions", f"floats of shape {shape}", got)
        return torch.from_numpy(np.array(actions, dtype=np.float32))

    def _shape(self, noise: torch.Tensor) -> tuple[int, ...]:
        return (*noise.shape[:3], self.spec.action_dim)


class RemotePolicy(RemoteBase):
    """A base behind a server that keeps encodings: one prefix pass per `encode`, however many noises follow."""

    def __init__(self, client: Client, uri: str):
        super().__init__(client, uri)
        self._given_back: deque[tuple[int, int]] = deque()

    def _encode(self, observations: Observations, batch: int) -> Encoding:
        feature, kept = self._keep(observations, batch, self.client.config.deadline_s)
        return Encoding(batch, feature, _Context(observations, kept))

    def _denoise(self, encoding: Encoding, noise: torch.Tensor) -> torch.Tensor:
        """As many noises of every row at a time as the server takes in one request."""
        each = max(1, p.MAX_SAMPLES // encoding.batch)
        return torch.cat([self._denoise_some(encoding, part) for part in noise.split(each, 1)], 1)

    def _denoise_some(self, encoding: Encoding, noise: torch.Tensor) -> torch.Tensor:
        """Encodes again where the server has lost the encoding: it restarted, or had to make room."""
        context: _Context = encoding.context
        until = time.monotonic() + self.client.config.deadline_s
        message = {p.OP: "denoise", p.NOISE: noise.cpu().numpy()}
        while True:
            left = lambda: until - time.monotonic()
            if context.kept.connection != self.client.connections:
                _, context.kept = self._keep(context.observations, encoding.batch, left())
            try:
                reply = self.client.request(message | {p.HANDLE: context.kept.handle} | self._release(), left())
                return self._actions(reply, self._shape(noise))
            except HandleGoneError:
                _, context.kept = self._keep(context.observations, encoding.batch, left())

    def _keep(self, observations: Observations, batch: int, seconds: float) -> tuple[torch.Tensor | None, _Kept]:
        message = {k: v if k == PROMPT else np.asarray(v) for k, v in observations.items()}
        reply = self.client.request(message | {p.OP: "encode"} | self._release(), seconds)
        feature, handle, width = reply.get(p.FEATURE), reply.get(p.HANDLE), self.spec.feature_dim
        if type(handle) is not int:
            raise bad(f"{self.spec.uri}: {p.HANDLE}", "a number", f"{handle!r}"[:80])
        kept = _Kept(handle, self.client.connections, self._given_back)
        if not width:
            return None, kept
        if not isinstance(feature, np.ndarray) or feature.shape != (batch, width) or feature.dtype != np.float32:
            got = f"{feature.dtype} {feature.shape}" if isinstance(feature, np.ndarray) else type(feature).__name__
            raise bad(f"{self.spec.uri}: {p.FEATURE}", f"float32 of shape ({batch}, {width})", got)
        return torch.from_numpy(feature.copy()), kept

    def sha256(self) -> str:
        """Of the weights, as the server's hash of them is now."""
        reply = self.client.request({p.OP: "sha256"})
        if not isinstance(reply.get("dsrl/sha256"), str):
            raise bad(f"{self.spec.uri}: sha256", "text", f"{reply.get('dsrl/sha256')!r}"[:80])
        return reply["dsrl/sha256"]

    def served(self) -> dict[str, int]:
        """What the server has done since it started: prefix_passes, observations, sampler_runs."""
        return dict(self.client.request({p.OP: "status"})["dsrl/status"])

    def _release(self) -> dict[str, list[int]]:
        """Handles that nobody holds any more, as a part of the next message."""
        gone = [self._given_back.popleft() for _ in range(len(self._given_back))]
        handles = [handle for connection, handle in gone if connection == self.client.connections]
        return {p.RELEASE: handles} if handles else {}


class RemoteBlackBox(RemoteBase):
    """A base behind a server that only answers observations with actions: each noise sends the observation again.

    Its `sha256` is that of no weights, and proves nothing.
    """

    def __init__(self, client: Client, uri: str):
        super().__init__(client, uri)
        self.spec = replace(self.spec, feature_dim=0)

    def _encode(self, observations: Observations, batch: int) -> Encoding:
        return Encoding(batch, None, [_single(observations, row) for row in range(batch)])

    def _denoise(self, encoding: Encoding, noise: torch.Tensor) -> torch.Tensor:
        shape = self._shape(noise)
        rows = [
            self._actions(self.client.request({**observation, p.NOISE: one.numpy()}), shape[2:])
            for observation, many in zip(encoding.context, noise.cpu(), strict=True)
            for one in many
        ]
        return torch.stack(rows).view(shape)


def _single(observations: Observations, row: int) -> dict[str, Any]:
    return {key: value[0] for key, value in select(observations, [row]).items()}


def load(
    source: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    uri: str = "",
    api_key: str = "",
    deadline_s: float | None = None,
) -> RemoteBase:
    """Connect to a server.

    Args:
        source: ``ws://host:port``, or ``wss://`` for TLS; ``?deadline=<seconds>`` for every call, reconnecting and
            sending again included, 60 by default; ``ca=<file>`` of certificates to trust.
        dtype, device: the server's affair; anything but the defaults is refused unless it is what is served.
        api_key: by default, what ``DSRL_VLA_API_KEY`` holds.

    Raises:
        NotSteerableError: the server does not take noise. ServerUnavailableError: nobody answers.
        DsrlError: the server wants another key, another version, or another dtype or device was asked for.
    """
    address, _, query = source.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for name in options:
        if name not in _OPTIONS:
            raise unknown("remote option", name, _OPTIONS)
    if device != "cpu":
        fix = "Give --device to dsrl-vla serve."
        raise bad("base.device", "the default, for the server chooses it", f"'{device}'", fix)
    key = api_key or os.environ.get(p.API_KEY_VARIABLE, "")
    ca = Path(options["ca"]).expanduser() if "ca" in options else None
    config = ClientConfig(address, key, _seconds(options, deadline_s), ca)
    if key and address.startswith("ws://") and not _loopback(address):
        log.warning("%s: the API key travels in the clear; serve with TLS and use wss://.", address)
    client = Client(config)
    uri = uri or f"remote:{source}"
    try:
        about = steering(client.metadata, uri)
        base = (RemotePolicy if about.get("handles") is True else RemoteBlackBox)(client, uri)
        if dtype not in ("float32", base.spec.dtype):
            fix = "Give --dtype to dsrl-vla serve."
            raise bad("base.dtype", f"{base.spec.dtype}, in which it is served", dtype, fix)
    except Exception:
        client.close()
        raise
    return base


def _seconds(options: Mapping[str, str], given: float | None) -> float:
    if given is not None:
        return given
    try:
        return float(options.get("deadline", "60"))
    except ValueError as error:
        raise bad("remote option deadline", "seconds", f"'{options['deadline']}'") from error


def _loopback(address: str) -> bool:
    from urllib.parse import urlsplit

    from dsrl_vla.serving.server import is_loopback

    return is_loopback(urlsplit(address).hostname or "")
