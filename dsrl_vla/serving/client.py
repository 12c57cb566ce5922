"""The client: one request at a time over a websocket that is opened again when it breaks, all within a deadline.

Requests of this protocol carry their noise and have no effect beyond their reply, so that one whose connection broke
is simply sent again. What cannot be had by the deadline is a `ServerUnavailableError`, raised within a tenth of a
second of it, whatever the peer does: the network lives in a thread of its own, and is left behind when it is late.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import ssl
import threading
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidHandshake, InvalidStatus, WebSocketException

from ..errors import DsrlError, NotSteerableError, bad, first_line
from . import protocol as p
from .wire import MAX_BYTES, WireError, pack, unpack

log = logging.getLogger(__name__)
_BACKOFF, _BACKOFF_CAP = 0.05, 2.0
_LONGEST_S = 86_400.0
_FINAL = (400, 401, 403, 404)
Result = TypeVar("Result")


class ServerUnavailableError(DsrlError, ConnectionError):
    """No answer by the deadline: the server is gone, slow, or cannot be reached."""


class ServerFailedError(DsrlError, RuntimeError):
    """The server answered that it failed; its log says why."""


class HandleGoneError(DsrlError):
    """The server no longer keeps this encoding."""


@dataclass(frozen=True)
class ClientConfig:
    """Whom to call, and how long to wait."""

    uri: str
    """``ws://host:port`` or ``wss://host:port``."""
    api_key: str = field(default="", repr=False)
    deadline_s: float = 60.0
    """Seconds for a request, reconnecting and sending again included."""
    ca: Path | None = None
    """Certificates to trust, PEM; by default the system's."""

    def __post_init__(self) -> None:
        if not self.uri.startswith(("ws://", "wss://")):
            raise bad("remote", "ws://<host>:<port> or wss://<host>:<port>", f"'{self.uri}'")
        if not 0 < self.deadline_s <= _LONGEST_S:
            raise bad("remote deadline", f"seconds above 0 and at most {_LONGEST_S}", self.deadline_s)

    def ssl_context(self) -> ssl.SSLContext | None:
        """For wss."""
        if not self.uri.startswith("wss://"):
            return None
        try:
            return ssl.create_default_context(cafile=self.ca)
        except (OSError, ssl.SSLError) as error:
            raise bad("remote ca", "a file of certificates in PEM", f"{error}") from error


class Client:
    """A connection to a policy server.

    Safe to use from several threads; they take turns.

    Raises:
        ServerUnavailableError: nobody answers by the deadline. DsrlError: the server refuses the connection, or says
            something that is not openpi's protocol.
    """

    def __init__(self, config: ClientConfig):
        self.config = config
        self._ssl = config.ssl_context()
        self._lock = threading.Lock()
        self._gate = threading.Lock()  # between what is asked of the network's thread and its end
        self._closed = False
        self._connection: ClientConnection | None = None
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=_run, args=(self._loop,), name="policy-client", daemon=True).start()
        self.metadata: dict[str, Any] = {}
        """What the server opened with."""
        self.connections = 0
        """How often a connection was opened; handles do not outlive theirs."""
        try:
            self.connect()
        except BaseException:
            self.close()
            raise

    def connect(self) -> None:
        """Open the connection now, if it is not; raises as the constructor does."""
        self._within(self._open(), self.config.deadline_s)

    def request(self, message: dict[str, Any], seconds: float | None = None) -> dict[str, Any]:
        """Send a message and return the decoded reply.

        Args:
            seconds: until the deadline; by default the config's.

        Raises:
            ServerUnavailableError: none by then. ServerFailedError: it failed. HandleGoneError: see there.
            DsrlError: the server refused the request, in its words; or its reply is malformed.
        """
        seconds = self.config.deadline_s if seconds is None else seconds
        data = pack(message)
        if len(data) > MAX_BYTES:
            raise bad("request", f"at most {MAX_BYTES} bytes", len(data), "Send a smaller batch, or smaller images.")
        return self._read(self._within(self._exchange(data), seconds))

    def close(self) -> None:
        """Close the connection and end the thread; a request that waits in another is told so. Once is enough."""

        def end() -> None:
            self._abandon()
            self._loop.stop()

        with self._gate:
            if not self._closed:
                self._closed = True
                self._loop.call_soon_threadsafe(end)

    def _within(self, work: Coroutine[Any, Any, Result], seconds: float) -> Result:
        """Run in the network's thread; at the deadline leave it, and its connection, behind."""
        until = time.monotonic() + seconds
        if not self._lock.acquire(timeout=max(0.0, seconds)):
            work.close()
            raise self._late(seconds, "busy with another thread's request")
        try:
            gone = ServerUnavailableError(f"{self.config.uri}: expected an open client, got one that was closed.")
            with self._gate:
                if self._closed:
                    work.close()
                    raise gone
                future = asyncio.run_coroutine_threadsafe(work, self._loop)
            try:
                return future.result(max(0.0, until - time.monotonic()))
            except concurrent.futures.CancelledError:
                raise gone from None
            except (concurrent.futures.TimeoutError, KeyboardInterrupt) as error:
                future.cancel()
                with contextlib.suppress(RuntimeError):  # it has just been closed
                    self._loop.call_soon_threadsafe(self._abandon)
                if isinstance(error, KeyboardInterrupt):
                    raise
                raise self._late(seconds, self._trouble) from None
        finally:
            self._lock.release()

    def _late(self, seconds: float, why: str) -> ServerUnavailableError:
        words = f"expected an answer within {max(seconds, self.config.deadline_s):.3g} s, got none ({why})."
        return ServerUnavailableError(f"{self.config.uri}: {words}")

    _trouble = "it is connected, and silent"

    async def _exchange(self, data: bytes) -> bytes | str:
        wait = _BACKOFF
        while True:
            connection = await self._open()
            try:
                await connection.send(data)
                return await connection.recv()
            except (OSError, WebSocketException) as error:
                self._abandon()
                if getattr(connection, "close_code", None) == 1009:
                    raise bad("request", "a message that the server takes", "one it calls too big") from error
                self._trouble = f"the connection broke: {first_line(error)}"
            await asyncio.sleep(wait)
            wait = min(2 * wait, _BACKOFF_CAP)

    async def _open(self) -> ClientConnection:
        """The open connection, or a new one, however often that takes."""
        if self._connection is not None:
            return self._connection
        wait = _BACKOFF
        while True:
            try:
                connection = await self._dial()
            except InvalidStatus as error:
                if error.response.status_code in _FINAL:
                    raise self._turned_away(error.response.status_code) from error
                self._trouble = first_line(error)
            except ssl.SSLError as error:
                raise bad(self.config.uri, "a certificate that can be trusted", f"{error}") from error
            except (OSError, InvalidHandshake, WebSocketException) as error:
                self._trouble = first_line(error)
            else:
                self._connection, self._trouble = connection, Client._trouble
                self.connections += 1
                return connection
            if wait == _BACKOFF:
                words = "%s: nobody answers yet (%s); it is tried again, for %g s in all (deadline)"
                log.warning(words, self.config.uri, self._trouble, self.config.deadline_s)
            await asyncio.sleep(wait)
            wait = min(2 * wait, _BACKOFF_CAP)

    async def _dial(self) -> ClientConnection:
        headers = {"Authorization": f"Api-Key {self.config.api_key}"} if self.config.api_key else None
        connection = await connect(
            self.config.uri, ssl=self._ssl, additional_headers=headers, compression=None, max_size=MAX_BYTES,
            open_timeout=None, ping_interval=None, close_timeout=0.1, proxy=None,
        )  # fmt: skip
        try:
            self._greet(await connection.recv())
        except BaseException:
            connection.transport.abort()
            raise
        return connection

    def _greet(self, data: bytes | str) -> None:
        found = unpack(data) if isinstance(data, bytes) else None
        if not isinstance(found, dict):
            raise bad(self.config.uri, "a policy server, which opens with its metadata", "something else")
        if self.metadata and _identity(found) != _identity(self.metadata):
            raise bad(self.config.uri, "the base that was served there before", "another one")
        self.metadata = found

    def _turned_away(self, status: int) -> DsrlError:
        if status == 401:
            return bad(self.config.uri, "an API key that the server takes", "401", f"Set {p.API_KEY_VARIABLE}.")
        return bad(self.config.uri, "a policy server", f"HTTP status {status}")

    def _abandon(self) -> None:
        """Forget the connection: what may still come over it would answer an earlier request."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.transport.abort()

    def _read(self, data: bytes | str) -> dict[str, Any]:
        if isinstance(data, str):
            last = data.strip().splitlines()[-1:] or ["nothing"]
            raise ServerFailedError(f"{self.config.uri}: expected a reply, got an error: {last[0][:300]}")
        reply = unpack(data)
        if not isinstance(reply, dict):
            raise WireError(f"{self.config.uri}: expected a reply, a dictionary, got a {type(reply).__name__}.")
        error = reply.get(p.ERROR)
        if error is None:
            return reply
        kind, words = (error.get("kind"), error.get("message")) if isinstance(error, dict) else ("", error)
        raised = {"gone": HandleGoneError, "invalid": DsrlError}.get(str(kind), ServerFailedError)
        raise raised(f"{self.config.uri}: {words}"[:500])


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """Until it is stopped; then whoever still waits is told, and what it holds of the system is given back."""
    loop.run_forever()
    loop.run_until_complete(_call_off(asyncio.all_tasks(loop)))
    loop.close()


async def _call_off(tasks: set[asyncio.Task]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def steering(metadata: dict[str, Any], uri: str) -> dict[str, Any]:
    """What a server says about steering.

    Raises:
        NotSteerableError: nothing, as openpi's own server does: it takes no noise, and silently ignores it. DsrlError:
            another version of the protocol.
    """
    found = metadata.get(p.META)
    if not isinstance(found, dict):
        raise NotSteerableError(
            f"{uri}: expected a server that takes noise, got one that does not say so, such as openpi's own, which "
            f"silently ignores it. Serve the policy with `dsrl-vla serve openpi:<config>`, or wrap it for openpi's "
            "server with dsrl_vla.serving.wrapping.SteerablePolicy."
        )
    if found.get("protocol") != p.PROTOCOL:
        fix = "Install one version of dsrl-vla at both ends."
        raise bad(uri, f"protocol {p.PROTOCOL}", f"{found.get('protocol')!r}"[:40], fix)
    return found


def _identity(metadata: dict[str, Any]) -> Any:
    """Weights, processors and interface; not the behaviour, whose digits another machine may round otherwise."""
    found = metadata.get(p.META)
    if not isinstance(found, dict):
        return None
    mark = found.get("fingerprint")
    mark = (mark.get("weights"), mark.get("processors")) if isinstance(mark, dict) else None
    return found.get("sha256"), found.get("spec"), mark
