"""What a LeRobot checkpoint may bring along: data. Its loader would run code out of it, in two ways.

It imports and calls whatever a processor file names, its own or not. And some of its steps and policies load
tokenizers and models from wherever a file says, with ``trust_remote_code=True``: transformers runs the Python files it
finds there.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from dsrl_vla.errors import DsrlError, bad

_source: ContextVar[str] = ContextVar("source", default="")


def own_steps(tree: Mapping[str, Any], named: str) -> list[tuple[str, dict[str, Any]]]:
    """The steps of a processor file: the key that overrides go by, and the configuration.

    Raises:
        DsrlError: one that is no processor step of LeRobot's own; says so of `named`.
    """
    found = []
    for step in tree["steps"]:
        key = step.get("registry_name") or step.get("class", "")
        if not step.get("registry_name") and not _is_own(key):
            raise bad(named, "processor steps that are LeRobot's own", f"'{key}'", "It is not loaded.")
        found.append((key.rpartition(".")[2], step.get("config", {})))
    return found


def _is_own(key: str) -> bool:
    """Whether LeRobot, which would call anything of this name, finds a step of its own there."""
    module, _, name = key.rpartition(".")
    if not module.startswith("lerobot."):
        return False
    from lerobot.processor import ProcessorStep

    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return False
    return isinstance(found, type) and issubclass(found, ProcessorStep) and found.__module__.startswith("lerobot.")


@contextlib.contextmanager
def no_code_of(source: str) -> Iterator[None]:
    """Within it, and in this thread, transformers runs no Python file that comes with what it loads.

    Raises:
        DsrlError: there was one to run; nothing of it was.
    """
    try:
        from transformers import dynamic_module_utils
    except ImportError:  # nobody there who would
        yield
        return
    original = dynamic_module_utils.get_cached_module_file
    if not hasattr(original, "dsrl_vla"):  # put there once: loads in several threads may overlap

        def guarded(repository: Any, module_file: str, *args: Any, **kwargs: Any) -> Any:
            if named := _source.get():
                raise DsrlError(
                    f"{named}: expected data alone, got code to run: {module_file} of '{repository}'. It was not run."
                )
            return original(repository, module_file, *args, **kwargs)

        guarded.dsrl_vla = True  # type: ignore[attr-defined]
        dynamic_module_utils.get_cached_module_file = guarded
    token = _source.set(source)
    try:
        yield
    finally:
        _source.reset(token)
