"""The server: openpi's websocket protocol around a `Service`.

An unmodified openpi-client connects, reads metadata and sends observations. Strangers are kept out by an API key
(``Authorization: Api-Key …``, as openpi-client sends it), required off the loopback interface; pages in a browser by
their Origin header. What a client gets wrong is said in its own dialect, and its connection stays; what goes wrong
here gets a number, and the traceback goes to the log.
"""

from __future__ import annotations

import asyncio
import hmac
import http
import ipaddress
import logging
import secrets
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from websockets.asyncio.server import Server as WebsocketServer
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response

from ..errors import DsrlError, at_least, bad
from . import protocol as p
from .keys import KeyMap
from .requests import Feature, Reader, released, speaks_dsrl
from .service import GoneError, Reply, Service, Session
from .wire import MAX_BYTES, pack, unpack
from .worker import Worker, batch_sizes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerConfig:
    """Where to listen, and to whom."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: any free one."""
    api_key: str = field(default="", repr=False)
    """At least 16 characters; empty: none, on the loopback interface only."""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    keys: KeyMap = field(default_factory=KeyMap)
    prompt: str = ""
    """For observations that come without one."""
    max_batch: int = 16
    """Decisions of different clients that may share a prefix pass; the greatest power of two up to it counts."""
    max_handles: int = 4
    """Encodings kept for a connection; each may hold the KV cache of a whole batch."""
    max_connections: int = 32

    def __post_init__(self) -> None:
        if self.api_key and (len(self.api_key) < 16 or not self.api_key.isascii()):
            raise bad("API key", "16 ASCII characters or more", f"{len(self.api_key)}")
        if not self.api_key and not is_loopback(self.host):
            raise bad(
                "serve",
                f"an API key when listening on '{self.host}', which others can reach",
                "none",
                f"Set {p.API_KEY_VARIABLE} or --api-key-file, or listen on 127.0.0.1.",
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise bad("serve", "both a TLS certificate and its key, or neither", "one of them")
        if not 0 <= self.port < 65536:
            raise bad("serve.port", "from 0 to 65535", self.port)
        at_least(1, self, "serve", "max_batch", "max_handles", "max_connections")

    def ssl_context(self) -> ssl.SSLContext | None:
        """None without a certificate.

        Raises:
            DsrlError: certificate or key cannot be read.
        """
        if self.tls_cert is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.tls_cert, self.tls_key)
        except (OSError, ssl.SSLError) as error:
            raise bad("serve", "a TLS certificate and its key in PEM", f"{error}") from error
        return context


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address to listen on."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class PolicyServer:
    """Serves a base, steered or not, until stopped. Warms up before it listens.

    >>> with PolicyServer(Service(base, head), ServerConfig(port=0)) as server:   # in the background
    ...     server.uri                                                            # 'ws://127.0.0.1:40123'

    Raises:
        DsrlError: the port cannot be listened on; the keys do not fit the base's cameras.
    """

    def __init__(self, service: Service, config: ServerConfig | None = None):
        self.service, self.config = service, config or ServerConfig()
        self._ssl = self.config.ssl_context()
        self._reader = Reader(service.base.spec, service.seen, self.config.keys, self.config.prompt)
        self.config.keys.check(service.seen)
        self._metadata = pack(service.metadata())
        self._connections = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped: asyncio.Event | None = None
        self._thread: threading.Thread | None = None
        self._asked_to_stop = threading.Event()
        self.port = self.config.port

    @property
    def uri(self) -> str:
        """``ws://host:port`` or ``wss://host:port``."""
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        return f"{'wss' if self._ssl else 'ws'}://{host}:{self.port}"

    @property
    def listening(self) -> bool:
        """Whether clients can connect."""
        return self._loop is not None and not self._loop.is_closed()

    def serve_forever(self, listening: Callable[[], None] = lambda: None) -> None:
        """Warm up, listen, call `listening`, and serve until `stop`; not at all if that has come before."""
        self.service.warm_up(batch_sizes(self.config.max_batch))
        if not self._asked_to_stop.is_set():
            asyncio.run(self._run(listening))

    def start(self) -> PolicyServer:
        """Serve from a thread of its own; return once it listens, or has been stopped."""
        ready, failed = threading.Event(), []
        self._asked_to_stop.clear()

        def target() -> None:
            try:
                self.serve_forever(ready.set)
            except Exception as error:
                failed.append(error)
            finally:
                ready.set()

        thread = threading.Thread(target=target, name="policy-server", daemon=True)
        thread.start()
        self._thread = thread
        ready.wait()
        if failed:
            raise failed[0]
        return self

    def stop(self) -> None:
        """Close every connection and come to an end; at once, but for what the base is doing. May be called from any
        thread, and before it listens."""
        self._asked_to_stop.set()
        if self.listening:
            assert self._loop is not None and self._stopped is not None
            self._loop.call_soon_threadsafe(self._stopped.set)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> PolicyServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def _run(self, listening: Callable[[], None]) -> None:
        config = self.config
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        worker = Worker(self.service, config.max_batch)
        try:
            server = await serve(
                lambda connection: self._converse(connection, worker),
                config.host,
                config.port,
                ssl=self._ssl,
                origins=[None],
                compression=None,
                max_size=MAX_BYTES,
                max_queue=1,
                ping_interval=20,
                ping_timeout=60,
                close_timeout=1,
                process_request=self._admit,
            )
        except (OSError, OverflowError) as error:
            worker.close()
            raise bad("serve", f"to listen on {config.host}:{config.port}", f"{error}") from error
        try:
            self.port = _port_of(server)
            if not self._asked_to_stop.is_set():
                listening()
                await self._stopped.wait()
        finally:
            server.close()
            await server.wait_closed()
            await asyncio.to_thread(worker.close)

    def _admit(self, connection: ServerConnection, request: HttpRequest) -> Response | None:
        """Answer health checks; turn away those without the key, and those too many."""
        if request.path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if self.config.api_key:
            sent = request.headers.get_all("Authorization")
            wanted = f"Api-Key {self.config.api_key}"
            if len(sent) != 1 or not hmac.compare_digest(sent[0].encode(errors="surrogateescape"), wanted.encode()):
                return connection.respond(http.HTTPStatus.UNAUTHORIZED, "expected Authorization: Api-Key <key>\n")
        if self._connections >= self.config.max_connections:
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "too many connections\n")
        return None

    async def _converse(self, connection: ServerConnection, worker: Worker) -> None:
        session, took = self.service.session(self.config.max_handles), 0.0
        self._connections += 1
        try:
            await connection.send(self._metadata)
            while True:
                data = await connection.recv()
                start = time.perf_counter()
                await connection.send(await self._answer(data, connection, session, worker, took))
                took = time.perf_counter() - start
        except (ConnectionClosed, _HungUp):
            pass
        finally:
            self._connections -= 1

    async def _answer(
        self, data: bytes | str, connection: ServerConnection, session: Session, worker: Worker, took: float
    ) -> bytes | str:
        """The reply to one message, whatever it holds. Raises _HungUp when nobody waits for it any more."""
        start, message = time.perf_counter(), None
        try:
            if isinstance(data, str):
                raise bad("message", "a binary frame of msgpack", "a text frame")
            message = unpack(data)
            session.handles.release(released(message))
            request = self._reader.read(message)
            reply = await _while_open(connection, worker.submit(request, session))
            if isinstance(request, Feature) and "method" in message:
                # the fork takes the first of a pair, and its last token
                return pack([reply[p.FEATURE][:, None], []])
            timing = {"infer_ms": 1000 * (time.perf_counter() - start)}
            if took:
                timing["prev_total_ms"] = 1000 * took
            return pack(reply | {"server_timing": timing})
        except _HungUp:
            raise
        except GoneError as error:
            return _refusal(message, "gone", str(error))
        except DsrlError as error:
            return _refusal(message, "invalid", str(error))
        except Exception:
            number = secrets.token_hex(4)
            log.exception("internal error %s", number)
            return _refusal(message, "internal", f"internal error {number}; the server's log has it.")


class _HungUp(Exception):
    """The client is gone."""


async def _while_open(connection: ServerConnection, future: Future[Reply]) -> Reply:
    """What a job comes to. One whose client hangs up is called off, if it has not begun: otherwise clients that lose
    patience, and ask again, would keep the base busy with what nobody reads. Of one that has sent several messages
    ahead it is not heard that it hung up."""
    reply: asyncio.Future[Reply] = asyncio.wrap_future(future)
    closed: asyncio.Future[None] = asyncio.ensure_future(connection.wait_closed())
    both: list[asyncio.Future[Any]] = [reply, closed]
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not reply.done() or reply.cancelled():
            raise _HungUp
        return reply.result()
    finally:
        closed.cancel()
        reply.cancel()


def _refusal(message: Any, kind: p.Kind, words: str) -> bytes | str:
    """In the dialect of whoever asked: openpi-client raises what it gets as text, and lives on."""
    return pack({p.ERROR: {"kind": kind, "message": words}}) if speaks_dsrl(message) else f"{words}\n"


def _port_of(server: WebsocketServer) -> int:
    return next(iter(server.sockets)).getsockname()[1]
