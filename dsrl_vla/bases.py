"""Bases by URI: ``nano:``, ``transformers:owner/name@revision``, ``remote:ws://host:port``, ``flow-mlp:<folder>``.

An adapter registers under the entry-point group ``dsrl_vla.adapters``; its target is a callable
``load(source, *, dtype=…, device=…, uri=…) -> FrozenPolicy``. Another distribution can add one.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from .entry_points import load, names
from .errors import bad, unknown
from .policy import FrozenPolicy

GROUP = "dsrl_vla.adapters"


def adapters() -> dict[str, str]:
    """Registered adapters: name -> where the loader lives."""
    return names(GROUP)


def load_base(uri: str, **options: Any) -> FrozenPolicy:
    """Load a frozen base from its URI, ``<adapter>:<source>``.

    Args:
        options: passed to the adapter: ``dtype``, ``device``, and its own.

    Raises:
        UnknownNameError: no such adapter, or no such option of it; names the nearest. NotSteerableError: the policy
            takes no initial noise. MissingExtraError: the adapter's package is not installed.
    """
    name, colon, source = uri.partition(":")
    if not colon:
        raise bad("base", "'<adapter>:<source>' such as 'nano:' or 'transformers:owner/name@revision'", f"'{uri}'")
    loader = load(GROUP, "adapter", name)
    _check_options(name, loader, options)
    try:
        return loader(source, uri=uri, **options)
    except json.JSONDecodeError as error:
        raise bad(f"base '{uri}'", "JSON files that are whole", f"{error}") from error
    except (RuntimeError, AssertionError):
        check_device("base.device", str(options.get("device", "cpu")))
        raise


def check_named(uri: str, by: str, fix: str) -> None:
    """Refuse a base at a network address that was not typed but named `by` a file from who knows where: this machine's
    API key, and what its robot sees, would go there.

    Raises:
        DsrlError: it is at one.
    """
    if "://" in uri:
        raise bad(by, "to name a base that is no address on the network", f"'{uri}'", f"If you trust it: {fix}.")


def _check_options(adapter: str, loader: Callable[..., FrozenPolicy], options: Mapping[str, Any]) -> None:
    signature = inspect.signature(loader)
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
        known = set(signature.parameters) - {"source", "uri"}
        for option in options:
            if option not in known:
                raise unknown(f"option of the adapter '{adapter}:'", option, known)
    try:
        signature.bind("", uri="", **options)
    except TypeError as error:
        wanted = "load(source, *, dtype='float32', device='cpu', uri='')"
        raise bad(f"the loader of '{adapter}:'", wanted, f"{error}") from error


def check_device(name: str, device: str) -> None:
    """Refuse a device that is not there, in the words of the setting `name`.

    Raises:
        DsrlError: this build of torch cannot use it.
    """
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        words = f"'{device}' ({' '.join(str(error).split())[:200]})"
        raise bad(name, "a device that this build of torch can use", words) from error
