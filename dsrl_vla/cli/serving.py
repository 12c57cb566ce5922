"""``serve``: a base, steered or not, for robots that speak openpi's protocol and for ``remote:``."""

from __future__ import annotations

import logging
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from ..errors import at_least, bad


@dataclass(frozen=True)
class ServeArgs:
    """Serve a base, with or without a head, over openpi's websocket protocol. An unmodified openpi-client gets
    steered actions; remote:ws://host:port trains on it from another environment. Observations may use openpi's keys
    or ours."""

    target: tyro.conf.Positional[str]
    """A base's URI (nano:, openpi:pi05_libero, transformers:owner/name), or a run's directory, a head's folder or a
    shipped head (shipped:drawer-open): its base and head."""
    head: str | None = None
    """A head: a folder or a Hub repository."""
    host: str = "127.0.0.1"
    """Where to listen. Anywhere but on this machine alone needs an API key."""
    port: int = 8000
    """0: any free one."""
    api_key_file: Path | None = None
    """File that holds the API key; by default DSRL_VLA_API_KEY does."""
    tls_cert: Path | None = None
    """Certificate chain, PEM."""
    tls_key: Path | None = None
    dtype: str = ""
    """Of the base; by default its adapter's, or the run's."""
    device: str = ""
    stochastic: bool = False
    """Sample the head instead of taking its mode."""
    keys: str = "libero"
    """openpi's keys: libero, droid, aloha, or <camera>=<key>,…,state=<key>[+<key>],prompt=<key>."""
    prompt: str = ""
    """For observations that come without one."""
    max_batch: int = 16
    """Decisions of different clients that may share a prefix pass; 1: results do not depend on who else asks."""
    max_handles: int = 4
    """Encodings kept for each connection."""
    threads: int = 0
    """Torch threads; 0: torch's own choice."""


def run_serve(argv: list[str]) -> int:
    """Serve a base, steered or not, to robots that speak openpi's protocol."""
    args = tyro.cli(ServeArgs, prog="dsrl-vla serve", args=argv)
    from ..serving.keys import parse_keys
    from ..serving.server import PolicyServer, ServerConfig
    from ..serving.service import Service

    config = ServerConfig(
        args.host,
        args.port,
        _api_key(args.api_key_file),
        args.tls_cert,
        args.tls_key,
        parse_keys(args.keys),
        args.prompt,
        args.max_batch,
        args.max_handles,
    )
    logging.getLogger("dsrl_vla.serving").setLevel(logging.INFO)
    at_least(0, args, "serve", "threads")
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    base, head = load(args)
    server = PolicyServer(Service(base, head, deterministic=not args.stochastic), config)
    if config.api_key and not args.tls_cert and args.host not in ("127.0.0.1", "localhost", "::1"):
        print("dsrl-vla: warning: without --tls-cert the API key travels in the clear", file=sys.stderr)

    def end(*_: object) -> None:
        if not server.listening:
            raise KeyboardInterrupt
        server.stop()

    signal.signal(signal.SIGTERM, end)
    steered = f"steered by {args.head or args.target}" if head else "unsteered"
    server.serve_forever(lambda: print(f"serving {base.spec.uri}, {steered}, on {server.uri}", flush=True))
    return 0


def _options(args: ServeArgs) -> dict[str, str]:
    """What was said of the base."""
    return {name: value for name, value in (("dtype", args.dtype), ("device", args.device)) if value}


def load_bare(args: ServeArgs) -> tuple[Any, Any]:
    """The base at a URI, and the head that was named with it."""
    from ..bases import load_base
    from ..head import SteeringHead

    return load_base(args.target, **_options(args)), SteeringHead.from_pretrained(args.head) if args.head else None


def load(args: ServeArgs) -> tuple[Any, Any]:
    """The base and the head, if there is one."""
    from ..bases import check_named, load_base
    from ..head import SteeringHead
    from ..head_config import CONFIG
    from ..hub import SHELF, fetch
    from ..recipe import base_beside

    folder = fetch(args.target) if args.target.startswith(SHELF) else Path(args.target)
    options = _options(args)
    if (folder / CONFIG).exists():
        head = SteeringHead.from_pretrained(args.head or folder)
        uri = head.config.base_uri
        check_named(uri, f"{folder / CONFIG}", f"dsrl-vla serve '{uri}' --head {folder}")
        beside = base_beside(folder)
        own = {"dtype": beside.dtype} if (folder / "recipe.yaml").is_file() else {}
        return load_base(uri, **beside.options, **(own | options)), head
    if not (folder / "recipe.yaml").exists():
        if ":" not in args.target:
            raise bad("base or run", "a base's URI such as 'nano:', or a run's directory", f"'{args.target}'")
        return load_bare(args)
    from ..training import load_run

    recipe, head = load_run(args.target)
    return recipe.base.load(**options), SteeringHead.from_pretrained(args.head) if args.head else head


def _api_key(file: Path | None) -> str:
    from ..serving.protocol import API_KEY_VARIABLE

    if file is None:
        return os.environ.get(API_KEY_VARIABLE, "")
    try:
        return file.read_text().strip()
    except OSError as error:
        raise bad("--api-key-file", "a file that can be read", f"{error}") from error
