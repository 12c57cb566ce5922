"""The codec: what openpi writes is read, what we write openpi reads, and nothing a stranger writes does harm."""

import datetime
import random
import time

import msgpack
import numpy as np
import pytest
from dsrl_vla.errors import DsrlError
from dsrl_vla.serving.wire import MAX_BYTES, WireError, pack, unpack
from serving_parts import corrupt

MESSAGE = {
    "observation/image": np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
    "observation/state": np.linspace(-1, 1, 8, dtype=np.float32),
    "flags": np.array([True, False]),
    "half": np.float16(1.5),
    "count": np.int64(-7),
    "yes": np.bool_(True),
    "empty": np.zeros((0, 3), np.float64),
    "point": np.array(2.5),
    "prompt": "open the drawer",
    "nested": {"list": [1, 2.5, None, b"\x00", {"deep": np.ones(2, np.int16)}]},
}


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (np.ndarray, np.generic)):
        return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b) and type(a) is type(b)
    return type(a) is type(b) and a == b


def array(data=b"\0" * 12, dtype="<f4", shape=(3,), **more):
    return msgpack.packb({b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape, **more})


def scalar(data, dtype):
    return msgpack.packb({b"__npgeneric__": True, b"data": data, b"dtype": dtype})


def test_round_trip():
    assert same(MESSAGE, unpack(pack(MESSAGE)))


def test_the_bytes_are_openpis():
    expected = {b"__ndarray__": True, b"data": b"\x01\x00\x02\x00", b"dtype": "<u2", b"shape": [2]}
    assert msgpack.unpackb(pack(np.array([1, 2], np.uint16))) == expected
    assert msgpack.unpackb(pack(np.float32(0.5))) == {b"__npgeneric__": True, b"data": 0.5, b"dtype": "<f4"}


def test_openpi_client_reads_what_we_write_and_we_read_what_it_writes():
    theirs = pytest.importorskip("openpi_client.msgpack_numpy")
    assert same(MESSAGE, theirs.unpackb(pack(MESSAGE)))
    assert same(MESSAGE, unpack(theirs.packb(MESSAGE)))
    assert pack(MESSAGE) == theirs.packb(MESSAGE)


def test_foreign_byte_order_and_odd_bools_come_out_native():
    found = unpack(array(np.array([1, 2, 3], ">i4").tobytes(), ">i4"))
    assert found.dtype.isnative and found.tolist() == [1, 2, 3]
    assert unpack(array(b"\x00\x01\x02", "|b1")).tolist() == [False, True, True]
    assert unpack(array(b"\x00\x01\x02", "|b1")).view(np.uint8).max() == 1


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (array(dtype="|O", data=b"\0" * 24), "a dtype of kind b, i, u or f"),
        (array(dtype="<c8", data=b"\0" * 24), "a dtype of kind b, i, u or f"),
        (array(dtype="|V4"), "a dtype of kind b, i, u or f"),
        (array(dtype="<U1"), "a dtype of kind b, i, u or f"),
        (array(dtype="<M8[s]", data=b"\0" * 24), "a dtype of kind b, i, u or f"),
        (array(dtype="f4,f4", data=b"\0" * 24), "a dtype of kind b, i, u or f"),
        (array(dtype="(9999999,)f4"), "a dtype of kind b, i, u or f"),
        (array(dtype="<f16", data=b"\0" * 48), "a dtype of kind b, i, u or f"),
        (array(dtype=["<f4"]), "a dtype of kind b, i, u or f"),
        (array(shape=(4,)), "expected 16 bytes"),
        (array(shape=(2**31, 2**31)), "a shape of lengths"),
        (array(shape=(2**20, 2**20, 2**20)), "bytes for <f4"),
        (array(shape=(0, 2**26), data=b""), None),
        (array(shape=(-3,)), "a shape of lengths"),
        (array(shape=(3.0,)), "a shape of lengths"),
        (array(shape=(True, 3)), "a shape of lengths"),
        (array(shape=3), "a shape of at most 8 dimensions"),
        (array(shape=(1,) * 8 + (3,)), "a shape of at most 8 dimensions"),
        (array(data=[0] * 12), "its data as bytes"),
        (array(data="0" * 12), "its data as bytes"),
        (msgpack.packb({b"__ndarray__": True}), "a dtype of kind b, i, u or f"),
        (scalar(300, "|u1"), "a value of dtype |u1"),
        (scalar(-1, "<u8"), "a value of dtype <u8"),
        (scalar(True, "<f4"), "a value of dtype <f4"),
        (scalar("1", "<f4"), "a value of dtype <f4"),
        (scalar([1], "<i8"), "a value of dtype <i8"),
        (scalar(1, "|b1"), "a value of dtype |b1"),
        (msgpack.packb(msgpack.ExtType(5, b"")), "no extension types"),
        (msgpack.packb(msgpack.ExtType(5, b"abc")), "exceeds max_ext_len"),
        (msgpack.packb(datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC), datetime=True), "exceeds max_ext_len"),
        (b"\x91" * 20 + b"\xc0", "at most 16 levels"),
        (b"\x91" * 5000 + b"\xc0", "within the protocol's limits"),
        (b"\xdd\x7f\xff\xff\xff", "exceeds max_array_len"),
        (b"\xdf\x7f\xff\xff\xff", "exceeds max_map_len"),
        (b"\xdc\x40\x00" + (b"\x94" + b"\x90" * 4) * 16384, "at most 65536 items"),
        (b"\xdb\x00\x01\x00\x01" + b"a" * 65537, "exceeds max_str_len"),
        (b"\xa1\xff", "within the protocol's limits"),
        (b"\x81\xc0\xc0", "within the protocol's limits"),
        (b"\x81\x91\x01\xc0", "within the protocol's limits"),
        (b"\xc0\xc0", "extra data"),
        (b"\xc1", "within the protocol's limits"),
        (b"", "within the protocol's limits"),
    ],
)
def test_hostile_messages_are_refused(data, words):
    if words is None:
        unpack(data)
        return
    with pytest.raises(WireError) as error:
        unpack(data)
    assert words in str(error.value)


def test_a_small_message_cannot_claim_much_memory():
    """Ten million empty lists are ten megabytes on the wire and half a gigabyte of Python."""
    import tracemalloc

    bomb = b"\xdc\x40\x00" * 600 + b"\x90" * 10_000_000
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(WireError):
        unpack(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6 and time.perf_counter() - start < 2


def test_too_large_a_message_is_refused_before_it_is_read():
    with pytest.raises(WireError, match=f"at most {MAX_BYTES} bytes"):
        unpack(bytes(MAX_BYTES + 1))


@pytest.mark.parametrize(
    "thing", [object(), {"x": object()}, np.array([object()]), np.array(["a"]), np.zeros(2, complex), 2**70]
)
def test_only_plain_data_and_numbers_are_written(thing):
    with pytest.raises(WireError):
        pack(thing)


def test_ten_thousand_corrupted_messages_raise_nothing_else():
    rng, good = random.Random(0), pack(MESSAGE)
    refused = 0
    for _ in range(10_000):
        try:
            unpack(corrupt(good, rng))
        except WireError:
            refused += 1
    assert refused > 5_000
    assert issubclass(WireError, DsrlError)
    assert same(MESSAGE, unpack(good))
