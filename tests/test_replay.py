import errno
import os

import numpy as np
import pytest
import torch
from dsrl_vla.errors import DsrlError
from dsrl_vla.replay import Replay


def observe(replay, values):
    values = torch.as_tensor(values, dtype=torch.float32)
    return replay.observe({"state": values[:, None], "image.front": values[:, None, None, None].to(torch.uint8)})


def add(replay, now, then, value=0.0):
    n = len(now)
    replay.add(np.asarray(now), torch.full((n, 1, 2), value), np.full(n, value), np.full(n, 0.9), np.asarray(then))


def test_against_a_plain_list_through_many_wraps():
    """Every sampled transition is one that was added, whole, and is among the newest `capacity`."""
    replay, rng, log = Replay(20, (1, 2)), np.random.default_rng(0), []
    previous, clock = None, 0
    for step in range(200):
        n = int(rng.integers(1, 4))
        numbers = observe(replay, np.arange(clock, clock + n) % 250)
        values = np.arange(clock, clock + n)
        clock += n
        if previous is not None:
            k = min(n, len(previous[0]))
            add(replay, previous[0][:k], numbers[:k], value=float(step))
            log += list(zip(previous[1][:k], values[:k], [step] * k, strict=True))
        previous = (numbers, values)
        if log:
            batch = replay.sample(16, rng)
            recent = {(a % 250, b % 250, float(c)) for a, b, c in log[-20:]}
            rows = zip(batch.inputs["state"][:, 0], batch.next_inputs["state"][:, 0], batch.reward, strict=True)
            for now, then, reward in rows:
                assert (int(now), int(then), float(reward)) in recent
            assert torch.equal(batch.inputs["image.front"][:, 0, 0, 0].float(), batch.inputs["state"][:, 0])
            assert torch.equal(batch.latent[:, 0, 0], batch.reward)
    assert len(replay) == 20


def test_transitions_whose_observations_were_overwritten_are_dropped():
    replay = Replay(8, (1, 2))
    first = observe(replay, [1.0])
    add(replay, first, observe(replay, [2.0]), value=1.0)
    for value in range(replay.rows):
        last = observe(replay, [float(value)])
    assert len(replay) == 0
    with pytest.raises(DsrlError, match="replay: expected at least one transition"):
        replay.sample(1, np.random.default_rng(0))
    add(replay, last, last, value=5.0)
    assert len(replay) == 1 and replay.sample(3, np.random.default_rng(0)).reward.unique() == 5


def test_returns_that_are_added_late_are_dropped_with_their_observation():
    """What an n-step window of another environment adds may be from before what was added last."""
    replay, rng = Replay(60, (1, 2)), np.random.default_rng(0)
    late = []
    for value in range(400):
        number = observe(replay, [float(value % 250)])
        if value % 4 == 0:
            add(replay, number, number, value=float(value % 250))
        elif value % 4 == 1:
            late.append((value % 250, number))
        if len(late) == 12:
            for seen, then in late:
                add(replay, then, then, value=float(seen))
            late.clear()
        if len(replay):
            batch = replay.sample(64, rng)
            assert torch.equal(batch.inputs["state"][:, 0], batch.reward)
    assert len(replay) > 30


def test_a_store_on_a_disk_that_has_no_room_is_refused_in_words(tmp_path, monkeypatch):
    def full(descriptor, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DsrlError, match="expected room on the disk"):
        observe(Replay(30, (1, 2), tmp_path / "replay"), [1.0])


def test_an_observation_is_stored_once():
    replay = Replay(1000, (1, 2))
    observe(replay, np.zeros(4))
    stored = sum(v.numel() * v.element_size() for v in replay.inputs.values())
    assert stored <= 1.4 * 1000 * (4 + 1)


def test_what_is_saved_comes_back():
    replay = Replay(10, (1, 2))
    numbers = [observe(replay, [float(i)]) for i in range(30)]
    for i in range(29):
        add(replay, numbers[i], numbers[i + 1], value=float(i))
    copy = Replay(10, (1, 2))
    copy.load_tensors(replay.tensors(), replay.observed, replay.added)
    assert len(copy) == len(replay)
    one, two = (r.sample(50, np.random.default_rng(3)) for r in (replay, copy))
    assert torch.equal(one.reward, two.reward)
    assert torch.equal(one.next_inputs["state"], two.next_inputs["state"])


def test_a_reward_that_is_not_finite_is_refused():
    replay = Replay(10, (1, 2))
    numbers = observe(replay, [0.0])
    with pytest.raises(DsrlError, match="reward: expected a finite number, got nan"):
        add(replay, numbers, numbers, value=float("nan"))
    with pytest.raises(DsrlError, match="replay.capacity"):
        Replay(0, (1, 2))


def test_batches_drawn_at_once_are_those_drawn_one_by_one():
    replay = Replay(100, (1, 2))
    numbers = observe(replay, np.arange(50))
    replay.attach(numbers, {"action": torch.arange(50.0)})
    add(replay, numbers[:-1], numbers[1:])
    one, other = np.random.default_rng(0), np.random.default_rng(0)
    for batch in replay.batches(5, 7, one):
        alone = replay.sample(7, other)
        for field in ("latent", "reward", "discount"):
            assert torch.equal(getattr(batch, field), getattr(alone, field))
        for field in ("inputs", "next_inputs", "extras", "next_extras"):
            mine, its = getattr(batch, field), getattr(alone, field)
            assert mine.keys() == its.keys() and all(torch.equal(mine[k], its[k]) for k in mine)
    assert one.bit_generator.state == other.bit_generator.state


def test_a_store_on_disk_is_the_same_store(tmp_path):
    rng = np.random.default_rng(0)
    stores = Replay(30, (1, 2)), Replay(30, (1, 2), tmp_path / "replay")
    (tmp_path / "replay").mkdir()
    (tmp_path / "replay" / "state").write_bytes(b"left by another run")
    for step in range(20):
        values = rng.integers(0, 200, 4)
        for replay in stores:
            numbers = observe(replay, values)
            replay.attach(numbers, {"action": torch.as_tensor(values, dtype=torch.float32)[:, None]})
            add(replay, numbers[:-1], numbers[1:], value=float(step))
    size = (tmp_path / "replay" / "image.front").stat().st_size
    assert size == stores[1].rows  # one byte each
    one, two = (replay.sample(50, np.random.default_rng(1)) for replay in stores)
    assert torch.equal(one.inputs["state"], two.inputs["state"])
    assert torch.equal(one.next_inputs["image.front"], two.next_inputs["image.front"])
    assert torch.equal(one.extras["action"], two.extras["action"])
    again = Replay(30, (1, 2), tmp_path / "again")
    again.load_tensors({k: v.clone() for k, v in stores[1].tensors().items()}, stores[1].observed, stores[1].added)
    assert torch.equal(again.sample(50, np.random.default_rng(1)).reward, two.reward)
