"""The wire codec: msgpack with numpy arrays as maps, as openpi-client and openpi's server write and read it.

An array is ``{b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [...]}``, a numpy scalar
``{b"__npgeneric__": True, b"data": value, b"dtype": "<f4"}``. A peer is a stranger: everything it says about an
array is checked before one is built, and how much it may make us allocate is bounded. Nothing here is a pickle.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from ..errors import DsrlError, bad

MAX_BYTES = 64 * 1024**2
"""Greatest message, either way."""
_MAX_TEXT, _MAX_DEPTH, _MAX_DIMENSIONS = 65_536, 16, 8
_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
_ARRAY, _SCALAR = b"__ndarray__", b"__npgeneric__"


class WireError(DsrlError):
    """A message that is not what the protocol allows."""


def pack(message: Any) -> bytes:
    """Encode plain data and numpy arrays.

    Raises:
        WireError: an array of another kind than bool, int, unsigned and float; or an object.
    """
    try:
        return msgpack.packb(message, default=_pack_array)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, WireError):
            raise
        raise WireError(f"message: expected plain data and arrays, got {error}.") from error


@dataclass(frozen=True)
class Limits:
    """What a message may hold."""

    bytes: int = MAX_BYTES
    items: int = 65_536
    container: int = 16_384
    map: int = 1024


STRANGERS = Limits()
OUR_OWN = Limits(bytes=2**32, items=2**26, container=2**24, map=2**22)
"""For what this program has written itself."""


def unpack(data: bytes, limits: Limits = STRANGERS) -> Any:
    """Decode a message; arrays come as read-only views of it.

    Raises:
        WireError: too large, malformed, too deep, too many items, an array that is not as it says.
    """
    if len(data) > limits.bytes:
        raise _refuse("message", f"at most {limits.bytes} bytes", len(data))
    reader = _Reader(limits)
    try:
        message = msgpack.unpackb(
            data,
            object_hook=reader.map,
            list_hook=reader.list,
            ext_hook=_no_extension,
            max_array_len=limits.container,
            max_map_len=limits.map,
            max_str_len=_MAX_TEXT,
            max_ext_len=0,
        )
    except WireError:
        raise
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        words = str(error)[:120] or type(error).__name__
        raise WireError(f"message: expected msgpack within the protocol's limits, got {words}.") from error
    _check_depth(message)
    return message


class _Reader:
    """Counts what a message holds while it is decoded, innermost first, and builds its arrays."""

    def __init__(self, limits: Limits) -> None:
        self.items, self.most = 0, limits.items

    def list(self, items: list[Any]) -> list[Any]:
        self._count(len(items))
        return items

    def map(self, found: dict[Any, Any]) -> Any:
        self._count(len(found))
        if _ARRAY in found:
            return _build_array(found)
        if _SCALAR in found:
            return _build_scalar(found)
        return found

    def _count(self, more: int) -> None:
        self.items += 1 + more
        if self.items > self.most:
            raise _refuse("message", f"at most {self.most} items", "more")


def _pack_array(value: Any) -> dict[bytes, Any]:
    if isinstance(value, (np.ndarray, np.generic)):
        if value.dtype.kind not in "biuf" or value.dtype.itemsize > 8:
            raise _refuse("array", "bool, int, unsigned or float of at most 64 bits", f"dtype {value.dtype}")
        if isinstance(value, np.ndarray):
            return {_ARRAY: True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
        return {_SCALAR: True, b"data": value.item(), b"dtype": value.dtype.str}
    raise _refuse("message", "plain data and numpy arrays", f"a {type(value).__name__}")


def _build_array(found: dict[Any, Any]) -> np.ndarray:
    dtype, data, shape = _dtype(found), found.get(b"data"), found.get(b"shape")
    if not isinstance(data, bytes):
        raise _refuse("array", "its data as bytes", type(data).__name__)
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
        raise _refuse("array", f"a shape of at most {_MAX_DIMENSIONS} dimensions", f"{shape!r}"[:80])
    if any(type(n) is not int or not 0 <= n <= MAX_BYTES for n in shape):
        raise _refuse("array", "a shape of lengths, 0 or more", f"{shape}"[:80])
    if math.prod(shape) * dtype.itemsize != len(data):
        raise _refuse("array", f"{math.prod(shape) * dtype.itemsize} bytes for {dtype.str} {shape}", len(data))
    if dtype.kind == "b":  # any byte may come; only 0 and 1 are bools
        return (np.frombuffer(data, np.uint8) != 0).reshape(shape)
    array = np.frombuffer(data, dtype).reshape(shape)
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))


def _build_scalar(found: dict[Any, Any]) -> np.generic:
    dtype, data = _dtype(found), found.get(b"data")
    fits = (
        isinstance(data, bool) if dtype.kind == "b" else type(data) in ((int, float) if dtype.kind == "f" else (int,))
    )
    if fits and dtype.kind in "iu":
        fits = np.iinfo(dtype).min <= data <= np.iinfo(dtype).max  # type: ignore[operator]
    if not fits:
        raise _refuse("scalar", f"a value of dtype {dtype.str}", f"{data!r}"[:80])
    with np.errstate(over="ignore"):
        return dtype.newbyteorder("=").type(data)


def _dtype(found: dict[Any, Any]) -> np.dtype:
    name = found.get(b"dtype")
    if not isinstance(name, str) or not _DTYPE.fullmatch(name):
        raise _refuse("array", "a dtype of kind b, i, u or f such as '<f4'", f"{name!r}"[:80])
    return np.dtype(name)


def _check_depth(message: Any) -> None:
    layer, depth = [message], 0
    while layer:
        if depth > _MAX_DEPTH:
            raise _refuse("message", f"at most {_MAX_DEPTH} levels", "more")
        inner: list[Any] = []
        for value in layer:
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, msgpack.Timestamp):
                raise _refuse("message", "no extension types", "a timestamp")
        layer, depth = inner, depth + 1


def _no_extension(code: int, data: bytes) -> Any:
    raise _refuse("message", "no extension types", f"type {code}")


def _refuse(field: str, expected: str, got: object) -> WireError:
    return WireError(str(bad(field, expected, got)))
