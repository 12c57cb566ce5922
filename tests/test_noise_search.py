import json

import pytest
import torch
from dsrl_vla.cli import main
from dsrl_vla.errors import DsrlError
from dsrl_vla.noise import NoiseLayout
from dsrl_vla.noise_search import SearchConfig, Ticket, evaluate_ticket, search_ticket
from dsrl_vla.rollout import TaskConfig, VectorTask


@pytest.fixture
def layout(fork_base):
    return NoiseLayout(fork_base.spec.noise, "repeat", 1.5)


def test_halving_plays_what_it_says():
    config = SearchConfig(candidates=12, episodes=2)
    assert config.rounds == [12, 6, 3] and config.total_episodes == 42
    assert SearchConfig(candidates=1, episodes=5).rounds == [1]


def test_a_ticket_beats_the_base_where_one_side_is_right(fork_base, layout):
    """One side of the pillar is walled off: a constant noise that goes the other way wins nearly always."""
    ticks = []
    config = SearchConfig(candidates=12, episodes=4)
    with VectorTask(TaskConfig("point:fork", 40, 4), fork_base.spec.executed_steps) as task:
        ticket = search_ticket(fork_base, task, layout, config, ticks.append)
        again = search_ticket(fork_base, task, layout, config)
        result = evaluate_ticket(fork_base, task, layout, ticket, 40)
    assert ticket == again and len(ticks) == config.total_episodes
    assert ticket.env_steps == sum(e.steps for e in ticks) == ticket.rounds[-1]["env_steps"]
    assert [r["candidates"] for r in ticket.rounds] == config.rounds
    assert result["ticket"]["success"] >= 0.9 > result["base"]["success"] + 0.2
    assert torch.tensor(ticket.latent).abs().max() <= 1


def test_a_ticket_is_saved_whole_and_refused_by_another_layout(tmp_path, fork_base, layout):
    ticket = Ticket(((0.5, -0.25),), 1.0, 4, 100, ({"candidates": 1, "mean": 1.0, "best": 1.0, "env_steps": 100},))
    ticket.save(tmp_path / "ticket.json")
    assert Ticket.load(tmp_path / "ticket.json") == ticket
    noise = ticket.source(layout)({}, None, [torch.Generator()] * 3)
    assert noise.shape == (3, 1, *fork_base.spec.noise.shape)
    assert torch.equal(noise[2, 0, 0], torch.tensor([0.75, -0.375]))
    with pytest.raises(DsrlError, match="ticket: expected a latent of shape"):
        ticket.source(NoiseLayout(fork_base.spec.noise, "chunk"))


def test_bad_settings_are_named():
    with pytest.raises(DsrlError, match=r"search\.candidates: expected 1 or more, got 0"):
        SearchConfig(candidates=0)


def test_the_command_leaves_ticket_and_evaluation(fork_recipe, tmp_path, capsys):
    out = tmp_path / "ticket"
    options = ["--candidates", "4", "--episodes", "2", "--eval-episodes", "5", "--out", str(out)]
    assert main(["search", str(fork_recipe), *options, "--noise.bound", "1.0"]) == 0
    assert "best constant noise" in capsys.readouterr().out
    assert json.loads((out / "eval.json").read_text())["episodes"] == 5
    assert Ticket.load(out / "ticket.json").episodes == 4
