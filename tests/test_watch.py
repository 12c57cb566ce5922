import math

import numpy as np
import pytest
import torch
from dsrl_vla.critic import CriticConfig, CriticEnsemble
from dsrl_vla.head import HeadConfig
from dsrl_vla.measures import YARDSTICKS
from dsrl_vla.n_step import Decision
from dsrl_vla.networks import NetworkConfig
from dsrl_vla.noise import NoiseLayout, NoiseSpace
from dsrl_vla.replay import Replay
from dsrl_vla.watch import Finished, Watch, value_gap


def watch():
    return Watch(target_entropy=-0.5, episodes=50, env_steps=7_500)


def rows(**columns):
    """Rows 1,000 steps apart; a column is a list."""
    count = len(next(iter(columns.values())))
    return [{"env_steps": 1000 * (i + 1)} | {k: v[i] for k, v in columns.items()} for i in range(count)]


def warnings(**columns):
    seen = watch()
    for row in rows(**columns):
        seen.see(row)
    return seen.warnings


def test_a_healthy_run_says_nothing():
    assert not warnings(
        validation_success=[0.4, 0.5, 0.8, 0.75, 0.9, 0.95],
        entropy=[0.6, 0.2, -0.4, -0.7, -0.5, -0.5],
        value_gap=[0.0, 0.1, 0.2, 0.1, 0.05, 0.0],
        **{"return": [0.2, 0.25, 0.4, 0.45, 0.5, 0.5]},
    )


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"value_gap": [0.4] * 3, "return": [0.2] * 3}, "at 3000 steps: the critic promises 0.40 more"),
        ({"entropy": [-0.4, -2.5]}, "at 2000 steps: the actor's entropy is -2.50 nats"),
        (
            {"validation_success": [0.2, 0.96, 0.55]},
            "at 3000 steps: validation success fell to 0.55 from",
        ),
        ({"validation_success": [0.3, 0.2, 0.3, 0.3, 0.25]}, "at 5000 steps: two thirds of the steps are used"),
    ],
)
def test_each_ailment_is_named_with_what_to_do(columns, words):
    found = warnings(**columns)
    assert len(found) == 1 and found[0].startswith(words)
    assert any(remedy in found[0] for remedy in ("Raise", "lower", "preflight"))


def test_what_has_not_risen_is_told_by_the_warm_up():
    learnt_early = {"updates": [0, 500, 900, 1300, 1700], "success": [0.4, 0.7, 0.8, 0.8, 0.8]}
    assert not warnings(validation_success=[None, 0.84, 0.86, 0.88, 0.86], **learnt_early)
    assert not warnings(validation_success=[None, 0.5, 0.7, 0.8, 0.78], **learnt_early | {"success": [0.75] * 5})
    no_better = learnt_early | {"success": [0.84] * 5}
    (said,) = warnings(validation_success=[None, 0.84, 0.86, 0.88, 0.86], **no_better)
    assert "has not risen (first 0.84, best 0.88)" in said


def test_a_promise_in_the_noise_is_no_news():
    assert not warnings(value_gap=[0.002] * 4, **{"return": [0.0] * 4})


def test_where_preflight_cannot_help_it_is_not_advised():
    seen = Watch(target_entropy=-0.5, episodes=10, env_steps=7_500, yardstick=YARDSTICKS["return"])
    for row in rows(validation_return=[900.0, 910.0, 905.0, 900.0, 890.0]):
        seen.see(row)
    assert len(seen.warnings) == 1 and seen.warnings[0].endswith(
        "Set noise.layout and noise.bound in the recipe, and compare their runs."
    )


def test_a_warning_is_repeated_only_after_its_cause_has_gone():
    success = [0.9, 0.5, 0.5, 0.9, 0.5]
    assert [w.split(" steps")[0] for w in warnings(validation_success=success)] == ["at 2000", "at 5000"]
    seen = watch()
    for row in rows(validation_success=[0.9, 0.5]):
        seen.see(row)
    seen.see({"env_steps": 2500})  # no validation: the drop is neither news nor over
    assert len(seen.warnings) == 1 and "drop" in seen.active


def test_the_return_that_followed_each_decision():
    decision = lambda number, reward, discount: Decision(number, torch.zeros(1, 2), reward, discount)
    won = Finished.of([decision(3, 0.0, 0.9), decision(7, 0.0, 0.9), decision(9, 0.5, 0.0)])
    assert won.numbers.tolist() == [3, 7, 9] and won.returns == pytest.approx([0.405, 0.45, 0.5])
    assert Finished.of([decision(0, 0.0, 0.9)]).returns.tolist() == [0.0]
    ran = Finished.of([decision(0, 1.0, 0.9), decision(1, 3.0, 0.9)])  # cut off: 2 a decision, for good, is worth 20
    assert ran.returns == pytest.approx([1.0 + 0.9 * 21.0, 3.0 + 0.9 * 20.0])
    short = Finished.of([decision(0, 2.0, 0.9), decision(1, 1.0, 0.9**0.5)])  # half a chunk, and half its reward
    assert short.returns[0] == pytest.approx(2.0 + 0.9 * (1.0 + 0.9**0.5 * 3.0 / (0.1 + 1 - 0.9**0.5)))
    stuck = Finished.of([decision(0, -1.0, 0.9), decision(1, -1.0, 0.9)])
    assert stuck.returns == pytest.approx([-1.9, -1.0])


def test_the_gap_is_promise_less_return_and_forgets_with_the_replay():
    torch.manual_seed(0)
    network = NetworkConfig(width=16, layers=1)
    head = HeadConfig(NoiseLayout(NoiseSpace(4, 2), "repeat"), 3, 0, 4, "test", "test:", network=network)
    critic, replay = CriticEnsemble(CriticConfig(network), head), Replay(100, (1, 2))
    numbers = replay.observe({"state": torch.randn(4, 3)})
    latents = torch.rand(4, 1, 2)
    episode = Finished(numbers, latents, np.array([0.1, 0.2, 0.3, 0.4]))
    free = -math.inf, math.inf
    found = value_gap(critic, replay, [episode], free)
    promised = critic.value({"state": replay.inputs["state"][:4]}, latents).mean().item()
    assert found["return"] == 0.25 and found["value_gap"] == pytest.approx(promised - 0.25, abs=1e-4)
    given_up = Finished(numbers, latents, np.array([0.1, 0.2, 0.3, -70.0]))  # which no target is as low as
    assert value_gap(critic, replay, [given_up], (0.0, 100.0))["return"] == pytest.approx(0.15)
    for _ in range(60):
        replay.observe({"state": torch.randn(4, 3)})
    assert value_gap(critic, replay, [episode], free) == {} and value_gap(critic, replay, [], free) == {}
