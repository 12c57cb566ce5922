"""Cutting a policy where seeing ends and sampling begins, by running the policy's own code up to there.

A LeRobot policy turns a batch into a chunk in one call. Somewhere inside, one method is handed everything the
images and the prompt have to say (a KV cache, a conditioning vector) and only samples from then on: the *seam*.
`arguments_at` runs the policy until it calls that method and returns what it was handed. `Prefix` keeps it as
named tensors, so that every row can be repeated for K noises. `injected` answers the sampler's own draw with the
noise that was asked for, for policies that take none.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from dsrl_vla.errors import DsrlError, NotSteerableError
from torch.overrides import TorchFunctionMode


class _Reached(Exception):
    """Not an error: carries the arguments out of the call that was cut short."""

    def __init__(self, arguments: dict[str, Any]):
        super().__init__("the seam was reached")
        self.arguments = arguments


@contextlib.contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Within this context draws leave the process's random state as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextlib.contextmanager
def replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Within this context ``owner.name`` is `function`; the class is left alone."""
    assert name not in vars(owner), name
    object.__setattr__(owner, name, function)
    try:
        yield
    finally:
        object.__delattr__(owner, name)


@contextlib.contextmanager
def watched(owner: Any, name: str) -> Iterator[list[Any]]:
    """Within this context, what every call of ``owner.name`` returns is also put into the list."""
    function, seen = getattr(owner, name), []

    def watching(*args: Any, **kwargs: Any) -> Any:
        seen.append(function(*args, **kwargs))
        return seen[-1]

    with replaced(owner, name, watching):
        yield seen


def arguments_at(owner: Any, name: str, run: Callable[[], Any]) -> dict[str, Any]:
    """Run `run` until it calls ``owner.name``; return that call's arguments by name. The call is not made.

    Raises:
        DsrlError: `run` came to its end without the call.
    """
    signature = inspect.signature(getattr(owner, name))

    def stop(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs).arguments
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                bound |= bound.pop(parameter.name, {})
        raise _Reached(dict(bound))

    with replaced(owner, name, stop):
        try:
            run()
        except _Reached as reached:
            return reached.arguments
    raise DsrlError(f"{type(owner).__name__}.{name}: expected the policy to call it, got a chunk without that call.")


class _Draw(TorchFunctionMode):
    """Answers the first draw of `noise`'s shape with `noise`."""

    _DRAWS = {torch.randn: False, torch.normal: False, torch.rand: True}

    def __init__(self, noise: torch.Tensor):
        super().__init__()
        self.noise, self.given = noise, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.given or func not in self._DRAWS:
            return func(*args, **kwargs)
        drawn = func(*args, **kwargs)
        if drawn.numel() != self.noise.numel() or drawn.shape[0] != self.noise.shape[0]:
            return drawn
        self.given = True
        noise = self.noise.reshape(drawn.shape).to(drawn)
        # a uniform prior is drawn from [0, 1) and stretched to [-1, 1) by the policy itself
        return (noise + 1) / 2 if self._DRAWS[func] else noise


@contextlib.contextmanager
def injected(noise: torch.Tensor, what: str) -> Iterator[None]:
    """Within this context the sampler's first draw of that size, first dimension included, is `noise`.

    Raises:
        NotSteerableError: on leaving, when nothing was drawn: this sampler never asks for noise.
    """
    mode = _Draw(noise)
    with mode:
        yield
    if not mode.given:
        raise NotSteerableError(
            f"{what}: expected its sampler to draw noise of shape {tuple(noise.shape)}, got no such draw. "
            "This version of the policy samples in another way; it cannot be steered through this adapter."
        )


@dataclass(frozen=True)
class _Slot:
    """Stands for the tensor of this name."""

    name: str


@dataclass(frozen=True)
class _Cache:
    """Stands for a transformers cache with these many layers."""

    name: str
    layers: int


@dataclass(frozen=True)
class _Mapping:
    """Stands for a mapping that is no dict, such as a BatchFeature."""

    kind: type
    fields: dict[str, Any]


@dataclass(frozen=True)
class Prefix:
    """What a seam was handed: named tensors, rows first, and the shape of the arguments they came in."""

    tensors: dict[str, torch.Tensor]
    template: Any

    @classmethod
    def of(cls, arguments: Mapping[str, Any], rows: int) -> Prefix:
        """Take the tensors with `rows` rows out of (nested) arguments; the others are everybody's, and stay."""
        tensors: dict[str, torch.Tensor] = {}
        return cls(tensors, _take(arguments, "", tensors, rows))

    def repeated(self, count: int) -> Prefix:
        """Every row `count` times."""
        if count == 1:
            return self
        return Prefix({k: v.repeat_interleave(count, 0) for k, v in self.tensors.items()}, self.template)

    def arguments(self) -> Any:
        """The arguments again, caches rebuilt: a sampler may write into them."""
        return _put(self.template, self.tensors)


def _take(value: Any, name: str, tensors: dict[str, torch.Tensor], rows: int) -> Any:
    if isinstance(value, torch.Tensor):
        if value.ndim == 0 or value.shape[0] != rows:
            return value
        tensors[name] = value
        return _Slot(name)
    if hasattr(value, "layers") and hasattr(value, "get_seq_length"):
        for index, layer in enumerate(value.layers):
            tensors |= {f"{name}.keys.{index}": layer.keys, f"{name}.values.{index}": layer.values}
        return _Cache(name, len(value.layers))
    if isinstance(value, Mapping):
        fields = {k: _take(v, f"{name}.{k}" if name else str(k), tensors, rows) for k, v in value.items()}
        return fields if isinstance(value, dict) else _Mapping(type(value), fields)
    if isinstance(value, list | tuple):
        return type(value)([_take(v, f"{name}.{i}", tensors, rows) for i, v in enumerate(value)])
    return value


def _put(template: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(template, _Slot):
        return tensors[template.name]
    if isinstance(template, _Cache):
        from transformers import DynamicCache

        cache = DynamicCache()
        for index in range(template.layers):
            layer = (tensors[f"{template.name}.{part}.{index}"] for part in ("keys", "values"))
            cache.update(*layer, index)
        return cache
    if isinstance(template, dict):
        return {k: _put(v, tensors) for k, v in template.items()}
    if isinstance(template, list | tuple):
        return type(template)([_put(v, tensors) for v in template])
    if isinstance(template, _Mapping):
        return template.kind(_put(template.fields, tensors))
    return template
