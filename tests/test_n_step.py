import numpy as np
import pytest
import torch
from dsrl_vla.errors import DsrlError
from dsrl_vla.latent_sac import SACConfig
from dsrl_vla.n_step import Decision, NStepWindows, total

GAMMA = 0.9


class Log:
    """Takes transitions in place of a replay."""

    def __init__(self):
        self.rows = []

    def __call__(self, now, latent, reward, discount, then):
        assert len(now) == len(latent) == len(reward) == len(discount) == len(then)
        self.rows += list(
            zip(now.tolist(), latent[:, 0, 0].tolist(), reward.tolist(), discount.tolist(), then.tolist(), strict=True)
        )


def run(n, rewards, end):
    """One environment, one episode: observation i has number i, decision i latent i and the reward given."""
    log = Log()
    windows = NStepWindows(n, 1, log)
    row = np.array([0])
    for i, reward in enumerate(rewards):
        windows.observed(row, np.array([i]))
        last = i == len(rewards) - 1
        discount = 0.0 if last and end == "terminated" else GAMMA
        windows.push(0, Decision(i, torch.full((1, 1), float(i)), reward, discount))
    if end == "truncated":
        windows.truncated(0, len(rewards))
    else:
        windows.terminated(0)
    return log.rows


def test_one_step_is_the_plain_transition():
    assert run(1, [1.0, 2.0, 3.0], "terminated") == [
        (0, 0.0, 1.0, GAMMA, 1),
        (1, 1.0, 2.0, GAMMA, 2),
        (2, 2.0, 3.0, 0.0, 2),
    ]
    assert run(1, [1.0, 2.0], "truncated") == [(0, 0.0, 1.0, GAMMA, 1), (1, 1.0, 2.0, GAMMA, 2)]


def test_returns_over_three_decisions_are_what_the_formula_says():
    rows = run(3, [1.0, 2.0, 4.0, 8.0], "terminated")
    assert [r[0] for r in rows] == [0, 1, 2, 3]
    rewards = [1 + 0.9 * 2 + 0.81 * 4, 2 + 0.9 * 4 + 0.81 * 8, 4 + 0.9 * 8, 8]
    assert [r[2] for r in rows] == pytest.approx(rewards)
    assert rows[0][3:] == (pytest.approx(GAMMA**3), 3)
    assert [r[3] for r in rows[1:]] == [0.0] * 3


def test_a_cut_episode_bootstraps_every_start_from_its_last_observation():
    rows = run(3, [1.0] * 5, "truncated")
    assert [(r[0], r[4]) for r in rows] == [(0, 3), (1, 4), (2, 5), (3, 5), (4, 5)]
    assert [r[3] for r in rows] == pytest.approx([GAMMA**3] * 3 + [GAMMA**2, GAMMA])
    assert [r[2] for r in rows] == pytest.approx([2.71] * 3 + [1.9, 1.0])


def test_windows_of_environments_do_not_mix():
    log = Log()
    windows = NStepWindows(2, 2, log)
    both = np.array([0, 1])
    for step in range(3):
        windows.observed(both, np.array([10 * step, 10 * step + 1]))
        for row in both:
            windows.push(int(row), Decision(10 * step + int(row), torch.zeros(1, 1), float(row), 1.0))
        if step == 0:
            windows.truncated(1, 99)
    assert [(r[0], r[4], r[2]) for r in log.rows] == [(1, 99, 1.0), (0, 20, 0.0)]


def test_the_total_of_a_window():
    decisions = [Decision(0, torch.zeros(1, 1), 1.0, 0.5), Decision(1, torch.zeros(1, 1), 1.0, 0.25)]
    assert total(decisions) == (1.5, 0.125)


def test_a_return_over_no_decision_is_refused():
    with pytest.raises(DsrlError, match=r"sac\.n_step: expected 1 or more, got 0"):
        SACConfig(n_step=0)
