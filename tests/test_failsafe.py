"""Whatever a head does, the caller gets the unsteered base's action at that seed, bit for bit, and no exception."""

import gc
import logging
import threading
import time
import weakref
from dataclasses import replace

import pytest
import torch
from dsrl_vla import SteeredPolicy, SteeringHead
from dsrl_vla.errors import BaseFailedError, DsrlError
from dsrl_vla.failsafe import FailSafe
from dsrl_vla.head import HeadConfig
from dsrl_vla.networks import NetworkConfig
from dsrl_vla.noise import NoiseLayout, generators
from dsrl_vla.observation import batch

NAN = float("nan")


@pytest.fixture(params=["fork_base", "tiny_pi0"])
def base(request):
    return request.getfixturevalue(request.param)


def make_head(base, bound=1.0, seed=0):
    torch.manual_seed(seed)
    layout = NoiseLayout(base.spec.noise, "chunk", bound)
    head = SteeringHead(HeadConfig.for_base(base.spec, layout, NetworkConfig(width=16, layers=1)))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return head


def poison(head, value):
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(value)


def raising(*_):
    raise RuntimeError("the head is broken")


def slow(head):
    real = head.latent

    def latent(*arguments):
        time.sleep(0.3)
        return real(*arguments)

    return latent


FAULTS = {
    "raises": (lambda head: setattr(head, "latent", raising), {}, "exception: RuntimeError: the head is broken"),
    "raises while reading": (lambda head: setattr(head, "read", raising), {}, "exception"),
    "nan": (lambda head: poison(head, NAN), {}, "non-finite"),
    "infinity": (lambda head: poison(head, float("inf")), {}, "non-finite"),
    "late": (lambda head: setattr(head, "latent", slow(head)), {"deadline_s": 0.05}, "deadline: no answer"),
    "wrong shape": (lambda head: setattr(head, "latent", lambda *_: torch.zeros(1, 1, 1)), {}, "exception"),
    "not a tensor": (lambda head: setattr(head, "latent", lambda *_: "noise"), {}, "exception"),
    "foreign": (lambda head: None, {"max_z": 1e-6}, "foreign: "),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("deterministic", [True, False])
def test_each_fault_gives_the_bases_own_action_bit_for_bit(base, observation, fault, deterministic, caplog):
    head = make_head(base)
    inject, options, reason = FAULTS[fault]
    policy = SteeredPolicy(base, head, failsafe=FailSafe(latch_after=100, **options))
    inject(head)
    for seed in range(3):
        seen = observation(base, seed)
        action = policy.act(seen, seed=seed, deterministic=deterministic)
        assert torch.equal(action, base.act(seen, seed=seed))
        assert policy.last_fallback.startswith(reason) or "still busy" in policy.last_fallback
    assert sum(policy.fallbacks.values()) == 3 and list(policy.fallbacks) == [reason.partition(":")[0]]
    assert "decision 3 is the base's own" in caplog.text


def test_a_sound_head_steers_and_nothing_is_counted(base, observation, tmp_path):
    head = make_head(base)
    policy = SteeredPolicy(base, head, failsafe=FailSafe(deadline_s=30.0))
    seen = observation(base)
    steered = policy.act(seen, seed=3)
    assert not torch.equal(steered, base.act(seen, seed=3))
    assert torch.equal(steered, SteeredPolicy(base, head).act(seen, seed=3))  # in the worker's thread or not
    head.save_pretrained(tmp_path)
    assert torch.equal(steered, SteeredPolicy(base, tmp_path).act(seen, seed=3))  # or from its folder
    assert policy.fallbacks == {} and policy.last_fallback == "" and policy.steering


def test_a_late_head_does_not_hold_the_robot_up_and_is_asked_again_when_it_is_back(fork_base, observation):
    head, seen = make_head(fork_base), observation(fork_base)
    steered, real = SteeredPolicy(fork_base, head).act(seen), head.latent
    policy = SteeredPolicy(fork_base, head, failsafe=FailSafe(deadline_s=1.0))
    let_go = threading.Event()
    head.latent = lambda *arguments: let_go.wait(60) and real(*arguments)
    start = time.monotonic()
    policy.act(seen)
    assert "no answer within 1 s" in policy.last_fallback and time.monotonic() - start < 30
    policy.act(seen)
    assert "still busy" in policy.last_fallback
    head.latent = real
    let_go.set()
    for _ in range(6000):
        if not policy.guard._worker._answers.empty():
            break
        time.sleep(0.01)
    assert torch.equal(policy.act(seen), steered) and policy.last_fallback == ""
    assert policy.fallbacks == {"deadline": 2}


def test_it_latches_off_and_enable_trusts_the_head_again(fork_base, observation, caplog):
    head, seen = make_head(fork_base), observation(fork_base)
    policy = SteeredPolicy(fork_base, head, failsafe=FailSafe(latch_after=3, window=10))
    steered, real = policy.act(seen, seed=5), head.latent
    head.latent = raising
    for _ in range(3):
        policy.act(seen, seed=5)
    head.latent = real
    assert not policy.steering and "switched off: 3 of the last 4 decisions" in caplog.text
    assert torch.equal(policy.act(seen, seed=5), fork_base.act(seen, seed=5))
    assert policy.fallbacks == {"exception": 3, "latched": 1} and policy.last_fallback == "latched"
    policy.enable()
    assert torch.equal(policy.act(seen, seed=5), steered) and policy.steering


def test_now_and_then_is_not_too_often(fork_base, observation):
    head, seen = make_head(fork_base), observation(fork_base)
    policy = SteeredPolicy(fork_base, head, failsafe=FailSafe(latch_after=2, window=3))
    real = head.latent
    for i in range(30):
        head.latent = raising if i % 3 == 0 else real
        policy.act(seen)
    assert policy.steering and policy.fallbacks == {"exception": 10}


def test_disabling_gives_the_base_back_bit_for_bit(base, observation):
    policy, seen = SteeredPolicy(base, make_head(base)), observation(base)
    steered = policy.act(seen, seed=1)
    policy.disable()
    assert torch.equal(policy.act(seen, seed=1), base.act(seen, seed=1))
    with policy.disabled():
        pass
    assert not policy.enabled
    policy.enable()
    with policy.disabled():
        assert torch.equal(policy.act(seen, seed=1), base.act(seen, seed=1))
    assert torch.equal(policy.act(seen, seed=1), steered)


def test_in_a_batch_only_the_foreign_row_falls_back(fork_base, observation):
    head = make_head(fork_base)
    seen = [observation(fork_base, i) for i in range(4)]
    seen[2]["observation.state"] = seen[2]["observation.state"] + 1000
    policy = SteeredPolicy(fork_base, head, failsafe=FailSafe(max_z=100.0))
    observations, seeds = batch(seen), [7, 8, 9, 10]
    noise, reasons = policy.noise(observations, fork_base.encode(observations), seeds)
    assert [bool(r) for r in reasons] == [False, False, True, False] and reasons[2].startswith("foreign: state[")
    assert torch.equal(noise[2:3], fork_base.spec.noise.sample(generators([9])))
    assert (noise[[0, 1, 3]].abs() <= head.layout.bound).all()
    assert policy.act_batch(observations, seeds).shape == (4, 4, 2) and policy.fallbacks == {"foreign": 2}


def test_a_head_knows_how_far_training_went(fork_base, observation):
    head = make_head(fork_base)
    observations = batch([observation(fork_base, i) for i in range(200)])
    inputs = head.read(observations, fork_base.encode(observations))
    head.eyes.normalise.fit(inputs)
    head.calibrate(inputs)
    assert set(head.config.furthest) == {"state", "feature"}
    assert len(head.config.furthest["state"]) == 4 and all(1.5 < z < 6 for z in head.config.furthest["state"])
    policy = SteeredPolicy(fork_base, head)
    for i in range(200):
        policy.act(observation(fork_base, i))
    assert policy.fallbacks == {}
    far = observation(fork_base)
    far["observation.state"] = far["observation.state"] + 50
    assert torch.equal(policy.act(far, seed=2), fork_base.act(far, seed=2))
    assert policy.last_fallback.startswith("foreign: state[")
    never = SteeredPolicy(fork_base, head, failsafe=FailSafe(max_z=float("inf")))
    never.act(far)
    assert never.fallbacks == {}


def test_bad_observations_are_refused_by_name_and_not_blamed_on_the_head(fork_base, observation):
    policy, seen = SteeredPolicy(fork_base, make_head(fork_base)), observation(fork_base)
    seen["observation.state"][0] = NAN
    with pytest.raises(DsrlError, match=r"observation.state\[0, 0\]: expected a finite number"):
        policy.act(seen)
    with pytest.raises(DsrlError, match="observation.state: expected to be in the observation"):
        policy.act({"task": "x"})
    assert policy.fallbacks == {}


class Moody(torch.nn.Module):
    """A base's velocity that fails, in all rows or in some, on noise it does not like."""

    def __init__(self, real, likes, how, rows=slice(None)):
        super().__init__()
        self.real, self.likes, self.how, self.rows = real, likes, how, rows

    def forward(self, embedded, x, t):
        found = self.real(embedded, x, t)
        if float(t[0]) == 1.0 and not self.likes(x):
            if self.how == "raises":
                raise RuntimeError("CUDA error: device-side assert")
            found[self.rows] = NAN
        return found


@pytest.mark.parametrize("how", ["raises", "nan"])
def test_a_base_that_fails_is_an_error_by_name(fork_base, observation, monkeypatch, how):
    policy, seen = SteeredPolicy(fork_base, make_head(fork_base)), observation(fork_base)
    moody = Moody(fork_base.model.velocity, lambda x: False, how)
    monkeypatch.setattr(fork_base.model, "velocity", moody.forward, raising=False)
    words = "CUDA error" if how == "raises" else "its actions hold NaN"
    for enabled in (True, False):
        policy.enabled = enabled
        with pytest.raises(BaseFailedError, match=f"flow-mlp:: expected actions, got a failure of the base.*{words}"):
            policy.act(seen)


def test_actions_that_only_the_heads_noise_spoils_are_replaced(fork_base, observation, monkeypatch):
    policy, seen = SteeredPolicy(fork_base, make_head(fork_base)), observation(fork_base)
    wanted = fork_base.act(seen, seed=4)
    own = fork_base.spec.noise.sample(generators([4]))[0]
    moody = Moody(fork_base.model.velocity, lambda x: torch.equal(x, own), "nan")
    monkeypatch.setattr(fork_base.model, "velocity", moody.forward, raising=False)
    assert torch.equal(policy.act(seen, seed=4), wanted)
    assert policy.fallbacks == {"base": 1} and "under the head's noise" in policy.last_fallback


def test_of_a_batch_only_the_rows_that_the_head_spoilt_are_the_bases_own(fork_base, observation, monkeypatch):
    policy, seeds = SteeredPolicy(fork_base, make_head(fork_base)), [0, 1, 2, 3]
    observations = batch([observation(fork_base, i) for i in range(4)])
    steered = policy.act_batch(observations, seeds)
    with policy.disabled():
        plain = policy.act_batch(observations, seeds)
    own = fork_base.spec.noise.sample(generators(seeds))[:, 0]
    moody = Moody(fork_base.model.velocity, lambda x: torch.equal(x[2], own[2]), "nan", rows=2)
    monkeypatch.setattr(fork_base.model, "velocity", moody.forward, raising=False)
    found = policy.act_batch(observations, seeds)
    assert torch.equal(found[2], plain[2]) and not torch.equal(plain[2], steered[2])
    assert torch.equal(found[[0, 1, 3]], steered[[0, 1, 3]])
    assert policy.fallbacks == {"base": 1} and list(policy.guard._recent)[-4:] == [False, False, True, False]


def test_where_one_rows_noise_spoils_another_the_head_has_no_part_in_any(fork_base, observation, monkeypatch):
    policy, seeds = SteeredPolicy(fork_base, make_head(fork_base)), [0, 1, 2]
    observations = batch([observation(fork_base, i) for i in range(3)])
    own = fork_base.spec.noise.sample(generators(seeds))[:, 0]
    moody = Moody(fork_base.model.velocity, lambda x: torch.equal(x[0], own[0]), "nan", rows=2)
    monkeypatch.setattr(fork_base.model, "velocity", moody.forward, raising=False)
    found = policy.act_batch(observations, seeds)
    with policy.disabled():
        assert torch.equal(found, policy.act_batch(observations, seeds))
    assert policy.fallbacks == {"base": 3}


def test_decisions_are_counted_once_and_only_by_whoever_acts_on_them(fork_base, observation):
    policy = SteeredPolicy(fork_base, make_head(fork_base), failsafe=FailSafe(latch_after=3, window=8))
    guard, seen = policy.guard, batch([observation(fork_base)])
    encoding = fork_base.encode(seen)
    guard.noise(seen, encoding, [0], True)
    assert guard.decisions == 0
    guard.book(["", "foreign: x", "base: NaN", ""])
    assert list(guard._recent) == [False, True, True, False] and policy.steering
    assert policy.fallbacks == {"foreign": 1, "base": 1} and guard.decisions == 4
    guard.book(["foreign: x"])
    assert not policy.steering
    policy.act(observation(fork_base))
    assert policy.fallbacks == {"foreign": 2, "base": 1, "latched": 1} and guard.decisions == 6


def test_a_head_with_a_deadline_has_run_before_the_first_decision(fork_base, monkeypatch):
    head, runs = make_head(fork_base), []
    real = head.latent
    monkeypatch.setattr(head, "latent", lambda *arguments: runs.append(1) or real(*arguments))
    SteeredPolicy(fork_base, head)
    assert not runs
    policy = SteeredPolicy(fork_base, head, failsafe=FailSafe(deadline_s=5.0))
    assert len(runs) == 1 and policy.guard.decisions == 0
    monkeypatch.setattr(head, "latent", raising)
    SteeredPolicy(fork_base, head, failsafe=FailSafe(deadline_s=5.0))  # which will be said at the decision


def test_noise_is_bounded_whatever_the_weights(fork_base, observation):
    """1,000 corrupted heads: no noise beyond the bound that is not the base's own."""
    generator = torch.Generator().manual_seed(0)
    observations = batch([observation(fork_base, i) for i in range(16)])
    encoding, seeds = fork_base.encode(observations), list(range(16))
    own = fork_base.spec.noise.sample(generators(seeds))
    head = make_head(fork_base, bound=1.3)
    policy = SteeredPolicy(fork_base, head, failsafe=FailSafe(latch_after=2**31, window=2**31))
    logging.disable(logging.CRITICAL)
    steered = 0
    try:
        for trial in range(1000):
            scale = 10.0 ** float(torch.randint(-2, 30, (), generator=generator))
            with torch.no_grad():
                for parameter in head.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
                if trial % 5 == 0:
                    next(head.parameters()).view(-1)[0] = NAN
            noise, reasons = policy.noise(observations, encoding, seeds, deterministic=bool(trial % 2))
            mine = torch.tensor([not r for r in reasons])
            assert (noise[mine].abs() <= 1.3).all() and torch.equal(noise[~mine], own[~mine])
            steered += int(mine.sum())
    finally:
        logging.disable(logging.NOTSET)
    assert 1_600 < steered < 16_000


def test_a_million_inputs_stay_within_the_bound(fork_base):
    head = make_head(fork_base, bound=1.3)
    generator = torch.Generator().manual_seed(0)
    wide = lambda n: torch.randn(1_000_000, n, generator=generator) * 10 ** torch.randn(1_000_000, 1).mul(3)
    inputs = {"state": wide(4), "feature": wide(fork_base.spec.feature_dim)}
    with torch.no_grad():
        for rows in torch.arange(1_000_000).split(50_000):
            noise = head.layout.expand(head.latent({k: v[rows] for k, v in inputs.items()}, None))
            assert float(noise.abs().max()) <= 1.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deadline_s": 0.0}, "failsafe.deadline_s: expected above 0"),
        ({"max_z": NAN}, "failsafe.max_z: expected above 0"),
        ({"latch_after": 0}, "failsafe.latch_after: expected from 1 to failsafe.window = 100"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(DsrlError, match=message):
        replace(FailSafe(), **options)


def test_the_thread_behind_a_deadline_ends_with_its_policy(fork_base, observation):
    alive = lambda: {t for t in threading.enumerate() if t.name == "steering-head"}
    old = alive()
    policy = SteeredPolicy(fork_base, make_head(fork_base), failsafe=FailSafe(deadline_s=5.0))
    policy.act(observation(fork_base))
    head, mine = weakref.ref(policy.head), alive() - old
    assert len(mine) == 1
    del policy
    gc.collect()
    until = time.monotonic() + 10
    while (mine & alive() or head()) and time.monotonic() < until:
        time.sleep(0.01)
    assert not mine & alive() and head() is None
