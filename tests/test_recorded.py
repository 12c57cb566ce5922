"""When a function is recorded, and what follows where that fails. Recording itself is stubbed; see `test_gpu.py`."""

import contextlib
import copy
import gc
import logging
import weakref

import pytest
import torch
from dsrl_vla import recorded
from dsrl_vla.recorded import Recorded


class Weight:
    """A weight that says it is on a GPU."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, place=1):
        self.place = place

    def data_ptr(self):
        return self.place

    def detach(self):
        return Weight(self.place)


class Graph:
    pass


class Stub(Recorded):
    """Books what it does; `fault` is raised in place of recording."""

    fault = None

    def _aside(self, tensors):
        self.booked.append("run")
        return self.function(tensors)

    def _clean_up(self):
        self.booked.append("clean up")
        self.forget()

    def _record(self, take, tensors):
        if self.fault:
            raise self.fault
        self.booked.append("record")
        take.graph = Graph()
        take.replay = lambda given: self.booked.append("replay") or self.function(given)


@pytest.fixture
def make(monkeypatch):
    nothing = lambda *_: contextlib.nullcontext()
    for name in ("device", "stream", "current_stream", "Stream"):
        monkeypatch.setattr(recorded.torch.cuda, name, nothing)
    monkeypatch.setattr(recorded.torch.cuda, "is_current_stream_capturing", lambda: False)

    def build(**options):
        weight = Weight()
        made = Stub(lambda tensors: {"y": 2 * tensors["x"]}, "the doubling", lambda: weight, **options)
        made.booked, made.place = [], weight
        return made

    return build


def test_what_changes_nothing_is_recorded_at_once(make):
    made = make()
    for _ in range(2):
        assert torch.equal(made({"x": torch.ones(3)})["y"], torch.full((3,), 2.0))
    assert made.booked == ["run", "run", "record", "replay", "replay"]


def test_what_changes_something_does_so_once_per_call(make):
    made = make(repeatable=False)
    for _ in range(4):
        made({"x": torch.ones(3)})
    assert made.booked == ["run", "run", "record", "replay", "replay"]


def test_shapes_are_recorded_one_by_one_and_not_without_end(make):
    made = make()
    for rows in range(1, 21):
        assert len(made({"x": torch.ones(rows)})["y"]) == rows
    assert made.booked.count("record") == 16
    made.booked.clear()
    made({"x": torch.ones(1)}), made({"x": torch.ones(20)})
    assert made.booked == ["replay"]


def test_weights_that_were_moved_are_noticed(make):
    made = make()
    made({"x": torch.ones(1)})
    made.place.place = 2
    made({"x": torch.ones(1)})
    assert made.booked.count("record") == 2 and len(made.takes) == 1


def test_what_was_replaced_is_forgotten(make):
    made = make()
    made({"x": torch.ones(1)})
    made._pool = "of graphs"
    made.forget()
    assert made._pool is None
    made({"x": torch.ones(1)})
    assert made.booked.count("record") == 2


def test_where_recording_fails_it_is_said_once_and_done_without(make, caplog):
    made = make()
    made.fault = RuntimeError("operation failed due to a previous error during capture")
    made.fault.__context__ = RuntimeError("operation not permitted when stream is capturing\nCompile with …")
    with caplog.at_level(logging.WARNING):
        for rows in (1, 1, 2):
            assert torch.equal(made({"x": torch.ones(rows)})["y"], torch.full((rows,), 2.0))
    assert [r.getMessage() for r in caplog.records] == [
        "the doubling is not recorded as a CUDA graph, and slower for it: "
        "operation not permitted when stream is capturing"
    ]
    assert made.fails and not made.takes


def test_where_memory_is_short_for_one_shape_others_are_recorded(make):
    made = make()
    made.fault = torch.OutOfMemoryError("CUDA out of memory")
    assert len(made({"x": torch.ones(9)})["y"]) == 9
    made.fault = None
    for rows in (9, 1, 1):
        made({"x": torch.ones(rows)})
    assert not made.fails and made.booked == ["run", "run", "clean up", "run", "run", "record", "replay", "replay"]


def test_an_error_that_was_there_before_is_not_taken_for_the_reason(make, caplog):
    made = make()
    made.fault = ValueError("a mask of another shape")
    try:
        raise torch.OutOfMemoryError("somebody else's")
    except torch.OutOfMemoryError:
        made({"x": torch.ones(1)})
    assert made.fails and "a mask of another shape" in caplog.text and "somebody" not in caplog.text


def test_who_wants_to_stop_is_not_held_up_by_a_recording(make):
    made = make()
    made.fault = RuntimeError("operation failed due to a previous error during capture")
    made.fault.__context__ = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        made({"x": torch.ones(1)})


def test_a_failure_holds_on_to_nothing(make):
    made, given = make(), torch.ones(4)
    seen = weakref.ref(given)

    def fail(take, tensors):
        kept = dict(tensors)  # as a recording's inputs are
        raise torch.OutOfMemoryError(f"for {len(kept)}")

    made._record = fail
    gc.collect()
    gc.disable()
    try:
        made({"x": given})
        del given
        assert seen() is None
    finally:
        gc.enable()


class Owner:
    def __init__(self):
        self.weight = torch.ones(2)
        self.recorded = Recorded(self.work, "the work", self.where)

    def work(self, tensors):
        return {"y": tensors["x"] * self.weight}

    def where(self):
        return self.weight


def test_on_a_cpu_it_is_the_function_and_a_copy_has_its_own():
    owner = Owner()
    other = copy.deepcopy(owner)
    other.weight += 1
    given = {"x": torch.full((2,), 3.0)}
    assert owner.recorded(given)["y"].tolist() == [3, 3] and other.recorded(given)["y"].tolist() == [6, 6]
    assert not owner.recorded.takes
