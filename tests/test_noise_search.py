import json

import pytest
import torch
from dsrl_vla.cli import main
from dsrl_vla.errors import DsrlError
from dsrl_vla.head import HeadConfig, SteeringHead
from dsrl_vla.networks import NetworkConfig
from dsrl_vla.noise import NoiseLayout
from dsrl_vla.noise_search import BestOfK, SearchConfig, Ticket, evaluate_ticket, search_ticket
from dsrl_vla.observation import batch
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
    assert result["steered"]["success"] >= 0.9 > result["base"]["success"] + 0.2
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


class Likes(torch.nn.Module):
    """A critic that likes chunks that go left."""

    def value(self, inputs, action):
        assert len(inputs["state"]) == len(action)
        return -action[:, :, 0].sum(1)


def test_best_of_k_takes_the_draw_whose_action_the_critic_likes_most(fork_base, layout, observation):
    head = SteeringHead(HeadConfig.for_base(fork_base.spec, layout, NetworkConfig(width=16, layers=1)))
    observations = batch([observation(fork_base, i) for i in range(3)])
    encoding = fork_base.encode(observations)
    streams = lambda: [torch.Generator().manual_seed(i) for i in range(3)]
    chosen = BestOfK(fork_base, head, Likes(), 16)(observations, encoding, streams())
    drawn = layout.expand(layout.sample(streams(), 16))
    left = fork_base.denoise(encoding, drawn)[:, :, : fork_base.spec.executed_steps, 0].sum(2)
    assert chosen.shape == (3, 1, *fork_base.spec.noise.shape)
    for row in range(3):
        assert torch.equal(chosen[row, 0], drawn[row, left[row].argmin()])


def test_a_run_reports_the_baselines_it_is_asked_for(fork_recipe, tmp_path, capsys):
    out, options = (
        tmp_path / "run",
        ["--train.env_steps", "600", "--eval.episodes", "5", "--train.validate_every", "300"],
    )
    both = ["--eval.baselines", "[ticket, best-of-k]"]
    assert main(["train", str(fork_recipe), "--algorithm", "na", "--out", str(out), *options, *both]) == 0
    found = json.loads((out / "eval.json").read_text())["baselines"]
    assert found["ticket"]["search_env_steps"] > 0 and found["best-of-k"]["k"] == 8
    assert (out / "ticket.json").exists() and (out / "best" / "action_critic.safetensors").exists()
    assert main(["train", str(fork_recipe), "--out", str(tmp_path / "no"), *both]) == 2
    assert "eval.baselines best-of-k: expected algorithm na or na-exact" in capsys.readouterr().err


def test_bad_settings_are_named():
    with pytest.raises(DsrlError, match=r"search\.candidates: expected 1 or more, got 0"):
        SearchConfig(candidates=0)


def test_the_command_leaves_ticket_and_evaluation(fork_recipe, tmp_path, capsys):
    out = tmp_path / "ticket"
    options = ["--candidates", "4", "--episodes", "2", "--eval-episodes", "5", "--out", str(out)]
    assert main(["search", str(fork_recipe), *options, "--noise.bound", "1.0"]) == 0
    assert "best constant noise" in capsys.readouterr().out
    assert json.loads((out / "eval.json").read_text())["episodes"] == 5
    ticket = Ticket.load(out / "ticket.json")
    assert ticket.episodes == 4
    head = SteeringHead.from_pretrained(out / "best")
    chosen = head.latent({"state": torch.randn(3, 4), "feature": torch.randn(3, head.config.feature_dim)}, None)
    assert torch.allclose(chosen, torch.tensor(ticket.latent).expand_as(chosen), atol=1e-5)
    for more in ([], ["--resume"]):
        assert main(["train", str(fork_recipe), "--out", str(out), "--noise.bound", "1.0", *more]) == 2
        assert "one that a search left its ticket in" in capsys.readouterr().err
    before = json.loads((out / "eval.json").read_text())
    assert main(["eval", str(out), "--episodes", "5"]) == 0
    after = json.loads((out / "eval.json").read_text())
    assert after["steered"]["success"] == after["steered_stochastic"]["success"] == before["steered"]["success"]
    assert after["env_steps"] == ticket.env_steps and (out / "curves.png").exists()
    assert main(["push", str(out), "--folder", str(tmp_path / "card")]) == 0
    assert f"{ticket.env_steps:,} environment steps" in (tmp_path / "card" / "README.md").read_text()


def test_a_base_that_does_not_fit_the_task_is_not_searched(fork_recipe, tmp_path, capsys):
    options = ["--task.uri", "metaworld:drawer-open-v3", "--out", str(tmp_path / "ticket")]
    assert main(["search", str(fork_recipe), *options]) == 2
    assert "task metaworld:drawer-open-v3: expected actions of width 2, got 4" in capsys.readouterr().err


def test_a_run_can_start_from_the_ticket_and_counts_its_steps(fork_recipe, tmp_path):
    out = tmp_path / "run"
    options = ["--train.warm_start", "ticket", "--train.env_steps", "9000", "--eval.episodes", "5"]
    options += ["--train.validate_every", "4000"]
    assert main(["train", str(fork_recipe), "--out", str(out), *options]) == 0
    ticket = Ticket.load(out / "ticket.json")
    head = SteeringHead.from_pretrained(out / "best")
    assert torch.allclose(head.start.tanh(), torch.tensor(ticket.latent).clamp(-0.9, 0.9), atol=1e-5)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["env_steps"] > ticket.env_steps > 500
    assert rows[-1]["env_steps"] >= 9000
    learnt = [row for row in rows if row["updates"]]
    assert "validation_success" in learnt[0] and learnt[0]["updates"] < 5  # what it starts from is a candidate


def test_a_search_that_took_all_the_steps_there_are_is_said(fork_recipe, tmp_path, capsys):
    options = ["--train.warm_start", "ticket", "--train.env_steps", "500"]
    assert main(["train", str(fork_recipe), "--out", str(tmp_path / "run"), *options]) == 2
    assert "that train.warm_start's search took, got 500" in capsys.readouterr().err


def test_a_head_that_starts_somewhere_chooses_about_that(fork_base, layout):
    torch.manual_seed(0)
    head = SteeringHead(HeadConfig.for_base(fork_base.spec, layout, NetworkConfig(width=16, layers=1)))
    head.start_at(torch.tensor([[0.6, -0.8]]))
    inputs = {"state": torch.randn(64, 4), "feature": torch.randn(64, fork_base.spec.feature_dim)}
    assert (head.latent(inputs, None) - torch.tensor([[0.6, -0.8]])).abs().mean() < 0.15
