import json
from dataclasses import replace

import numpy as np
import pytest
from dsrl_vla import SteeringHead, evaluate, preflight
from dsrl_vla.adapters.flow_mlp import FlowMLP
from dsrl_vla.episodes import Episode
from dsrl_vla.errors import DsrlError
from dsrl_vla.evaluation import Measure, measure_base, paired_difference
from dsrl_vla.head import HeadConfig
from dsrl_vla.measures import bootstrap, newcombe, wilson
from dsrl_vla.networks import NetworkConfig
from dsrl_vla.noise import NoiseLayout, NoiseSpace
from dsrl_vla.rollout import TaskConfig, VectorTask
from dsrl_vla.steerability import PreflightConfig, conditions, recommend, typical_bound

FORK = TaskConfig("point:fork", 40, 4)


@pytest.mark.parametrize(
    ("wins", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (95, 100, 0.8882, 0.9785), (100, 100, 0.9630, 1.0)],
)
def test_wilson_intervals_match_published_values(wins, n, low, high):
    assert wilson(wins, n) == pytest.approx((low, high), abs=1e-4)


def measure_of(wins):
    return Measure(tuple(Episode(i, bool(w), 10, 0.0) for i, w in enumerate(wins)))


def test_a_paired_difference_is_over_the_same_episodes():
    gain = paired_difference(measure_of([0, 0, 1, 1] * 10), measure_of([1, 0, 1, 1] * 10))
    assert gain["mean"] == 0.25 and 0 < gain["ci95"][0] < 0.25 < gain["ci95"][1] < 0.5


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [((1, 1, 7, 12), 0.0256, 0.5069), ((20, 2, 12, 16), 0.0562, 0.3290), ((0, 0, 20, 0), 0.7721, 1.0)],
)
def test_an_interval_of_paired_rates_is_newcombes(counts, low, high):
    """Of both, before alone, after alone, neither; worked out by hand. All alike is no certainty."""
    before = np.repeat([1.0, 1.0, 0.0, 0.0], counts)
    after = np.repeat([1.0, 0.0, 1.0, 0.0], counts)
    assert newcombe(before, after) == pytest.approx((low, high), abs=5e-4)
    assert newcombe(after, before) == pytest.approx((-high, -low), abs=5e-4)


def test_a_bootstrap_in_portions_is_the_one_at_once():
    scores = np.random.default_rng(3).random(37)
    rng = np.random.default_rng(0)
    wanted = np.quantile(scores[rng.integers(0, 37, (10_000, 37))].mean(1), (0.025, 0.975))
    assert bootstrap(scores) == tuple(wanted)


@pytest.fixture
def head(fork_base):
    layout = NoiseLayout(fork_base.spec.noise, "repeat", 1.5)
    return SteeringHead(HeadConfig.for_base(fork_base.spec, layout, NetworkConfig(width=16)))


def test_evaluation_is_paired_seeded_and_repeatable(fork_base, head):
    with VectorTask(FORK, 4) as task:
        one = evaluate(fork_base, head, task, episodes=12)
        known = measure_base(fork_base, task, head.layout, list(range(300_000, 300_012)), controls=True)
        two = evaluate(fork_base, head, task, episodes=12, known=known)
        with pytest.raises(DsrlError, match="known, 'base': expected episodes of the seeds 300000 to 300003"):
            evaluate(fork_base, head, task, episodes=4, known=known)
    assert one == two
    assert one["seeds"] == [300_000, 300_011]
    assert set(one["controls"]) == {"zero", "clipped", "layout"}
    assert json.loads(json.dumps(one)) == one


def test_a_head_for_another_base_is_refused(fork_base, nano, head):
    with VectorTask(FORK, 4) as task, pytest.raises(DsrlError, match="noise shape"):
        evaluate(nano, head, task, episodes=1)


def test_preflight_measures_every_condition_and_recommends(fork_base):
    config = PreflightConfig(episodes=24, best_of=4, layouts=("repeat", "chunk"), bounds=(1.0, 2.0))
    seen = []
    with VectorTask(FORK, 4) as task:
        found = preflight(fork_base, task, config, lambda name, _: seen.append(name))
    names = {"base", "zero", "clipped 1", "clipped 2", "layout repeat", "layout chunk"}
    assert set(found["conditions"]) == names
    assert len(seen) == config.total_episodes(fork_base) == 24 * (len(names) + 3 * 3)
    assert found["recommendation"]["layout"] in config.layouts and found["recommendation"]["bound"] in config.bounds
    best = found["best_of"]
    assert best["k"] == 4 and set(best) == {"k", "base", "layout repeat", "layout chunk"}
    assert all(best[name]["success"] >= found["conditions"][name]["success"] for name in set(best) - {"k"})
    assert found["recommendation"]["worth_steering"] and "Choosing among 4 draws" in found["recommendation"]["words"]
    assert found["noise_sensitivity"] > 0
    assert json.loads(json.dumps(found)) == found


class Straight(FlowMLP):
    """Walks into the pillar whatever the noise, but for a tremor."""

    def _denoise(self, encoding, noise):
        return super()._denoise(encoding, noise) * 1e-3


def test_preflight_says_when_there_is_nothing_to_gain(fork_base):
    config = PreflightConfig(episodes=8, best_of=2, layouts=("repeat",), bounds=(1.5,))
    with VectorTask(FORK, 4) as task:
        found = preflight(Straight(fork_base.model), task, config)
    assert not found["recommendation"]["worth_steering"]
    assert "nothing to gain" in found["recommendation"]["words"]


def test_preflight_leaves_out_what_a_noise_space_has_no_room_for(fork_base):
    config = PreflightConfig()
    space = NoiseSpace(3, 2, "uniform")
    assert config.within(space).bounds == (1.0,) and "knots:4" not in config.within(space).layouts
    assert PreflightConfig(bounds=(1.5, 2.0)).within(space).bounds == (1.0,)
    assert config.within(fork_base.spec.noise) == config
    with pytest.raises(DsrlError, match="knots:<n>"):
        conditions(fork_base, PreflightConfig(layouts=("knots:x",)).within(fork_base.spec.noise))


def test_preflight_says_what_was_asked_for_and_is_not_measured(fork_base, caplog):
    config = PreflightConfig(episodes=1, best_of=2, layouts=("repeat", "knots:99"), bounds=(1.5, 99))
    with VectorTask(FORK, 4) as task:
        found = preflight(fork_base, task, config)
        assert "clipped 1.5" in found["conditions"]
        assert "takes noise up to 10: bounds 99 left out; measured: 1.5" in caplog.text
        assert "has 4 steps: layouts knots:99 left out; measured: repeat" in caplog.text


def test_preflight_measures_the_columns_that_will_be_steered(fork_base):
    space = NoiseSpace(8, 4, live=(True, True, False, False))
    for columns, width in (("live", 2), ("all", 4)):
        assert PreflightConfig(columns=columns).layout(space, "repeat").latent_shape == (1, width)


def test_what_a_layout_alone_solves_is_worth_steering(fork_base):
    config = PreflightConfig(episodes=30, layouts=("repeat",), bounds=(1.0,))
    never = dict.fromkeys(("base", "zero", "clipped 1"), measure_of([0] * 30))
    found = recommend(fork_base, never, {"base": {"success": 0.0}, "layout repeat": {"success": 0.6}}, config)
    assert found["worth_steering"] and "in a layout would give 60%" in found["words"]
    found = recommend(fork_base, never, {"base": {"success": 0.0}, "layout repeat": {"success": 0.0}}, config)
    assert not found["worth_steering"] and "in any layout" in found["words"]


def test_preflight_says_when_episodes_may_have_been_too_short(fork_base):
    config = PreflightConfig(episodes=4, best_of=2, layouts=("repeat",), bounds=(1.5,))
    with VectorTask(TaskConfig("point:fork", 4, 4), 4) as task:
        advice = preflight(fork_base, task, config)["recommendation"]
    assert advice["words"].startswith("No episode ended before task.max_episode_steps 4: does the task need more?")


def test_preflight_asks_for_something_to_measure():
    with pytest.raises(DsrlError, match="preflight"):
        PreflightConfig(episodes=0)
    with pytest.raises(DsrlError, match="at least one of each"):
        PreflightConfig(layouts=())
    with pytest.raises(DsrlError, match="2 draws or more to choose from"):
        PreflightConfig(best_of=1)
    with pytest.raises(DsrlError, match="bounds: expected above 0, got -1"):
        PreflightConfig(bounds=(1.0, -1.0))


def test_a_task_with_few_initial_states_is_not_evaluated_on_more_episodes(fork_base, head):
    with VectorTask(FORK, 4) as task:
        task.infos = [replace(info, scenes=6) for info in task.infos]
        with pytest.raises(DsrlError, match="at most 6, for 'point:fork' has no more initial states .* got 7"):
            evaluate(fork_base, head, task, 7)
        assert evaluate(fork_base, head, task, 6, controls=False)["scenes"] == 6


def test_success_is_a_share():
    assert measure_of([1, 0, 0, 1]).success == 0.5
    assert np.isclose(measure_of([1, 0, 0, 1]).to_json()["mean_steps"], 10)


def test_the_smallest_layout_that_reaches_as_far_as_any_is_recommended(fork_base):
    config = PreflightConfig(episodes=100, best_of=4, layouts=("repeat", "knots:2", "chunk"), bounds=(1.0, 1.5, 2.0))
    even = measure_of([1, 0] * 50)
    found = dict.fromkeys(("base", "zero", "clipped 1", "clipped 1.5", "clipped 2"), even)
    reach = lambda **values: (
        {"base": {"success": 0.9}}
        | {f"layout {name.replace('_', ':')}": {"success": value} for name, value in values.items()}
    )
    layout = lambda **values: recommend(fork_base, found, reach(**values), config)["layout"]
    assert layout(repeat=0.9, knots_2=0.92, chunk=0.93) == "repeat"
    assert layout(repeat=0.5, knots_2=0.9, chunk=0.93) == "knots:2"
    assert layout(repeat=0.5, knots_2=0.7, chunk=0.93) == "chunk"
    words = recommend(fork_base, found, reach(repeat=0.2, knots_2=0.3, chunk=0.4), config)["words"]
    assert "In every layout, 4 draws solve less" in words


def test_the_bound_keeps_a_layouts_corners_where_the_bases_noise_lies(fork_base):
    # sqrt of the chi-square quantile over its dimensions, from published tables
    assert [typical_bound(d) for d in (1, 4, 8, 32)] == pytest.approx([1.96, 1.540, 1.392, 1.201], abs=0.03)
    config = PreflightConfig(episodes=100, layouts=("repeat", "chunk"), bounds=(1.0, 1.5, 2.0))
    even = measure_of([1, 0] * 50)
    found = dict.fromkeys(("base", "zero", "clipped 1", "clipped 1.5", "clipped 2"), even)
    reach = lambda repeat: {
        "base": {"success": 0.9},
        "layout repeat": {"success": repeat},
        "layout chunk": {"success": 0.9},
    }
    dims = fork_base.spec.noise.dim
    assert recommend(fork_base, found, reach(0.9), config)["bound"] == min(
        config.bounds, key=lambda b: abs(b - typical_bound(dims))
    )
    harmful = found | {"clipped 1": measure_of([1] * 10 + [0] * 90)}
    assert recommend(fork_base, harmful, reach(0.1), config)["bound"] == 1.5
    unclipped = {name: measured for name, measured in found.items() if "clipped" not in name}  # of a uniform prior
    config = replace(config, bounds=(0.3, 0.5, 0.7))
    assert recommend(fork_base, unclipped, reach(0.9), config)["bound"] == 0.5  # which the layouts were measured at
