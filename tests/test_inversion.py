"""Noise inversion: what a base could have done is found again, and what was done with noise found is learnt from."""

import json

import numpy as np
import pytest
import torch
import yaml
from dsrl_vla import inversion, load_base, load_recipe, train
from dsrl_vla.cli import main
from dsrl_vla.critic import CriticConfig, CriticEnsemble
from dsrl_vla.errors import DsrlError
from dsrl_vla.imitation import imitation_loss
from dsrl_vla.inversion import invert
from dsrl_vla.latent_sac import SACConfig, critic_loss
from dsrl_vla.mixed_replay import MixedReplay
from dsrl_vla.networks import NetworkConfig
from dsrl_vla.noise import NoiseLayout, generators
from dsrl_vla.noise_bank import (
    ACTION,
    BANK_ACTION,
    BANK_LATENT,
    IMITATED,
    REACH,
    BankConfig,
    BankKeeper,
    Keeper,
    PrefixKeeper,
)
from dsrl_vla.observation import batch
from dsrl_vla.offline import OfflineConfig, OfflineLoader
from dsrl_vla.offline_sources import fill, read_episodes, write_npz
from dsrl_vla.replay import Batch, Replay


def asked(base, observation, layout, rows=4):
    """An encoding of so many observations, and latents with the chunks they lead to."""
    encoding = base.encode(batch([observation(base, i) for i in range(rows)]))
    n, d = layout.latent_shape
    latent = torch.rand((rows, n, d), generator=torch.Generator().manual_seed(1)) * 1.6 - 0.8
    return encoding, latent, denoised(base, encoding, layout, latent)


def denoised(base, encoding, layout, latent):
    return base.denoise(encoding, layout.expand(latent).unsqueeze(1))[:, 0, : base.spec.executed_steps]


def whole(base, rows=4):
    return torch.full((rows,), base.spec.executed_steps)


@pytest.mark.parametrize("name", ["repeat", "chunk"])
def test_the_noise_behind_an_action_of_the_bases_own_is_found(nano, observation, name):
    layout = NoiseLayout(nano.spec.noise, name, 1.5)
    encoding, latent, chunk = asked(nano, observation, layout)
    found = invert(nano, encoding, layout, chunk, whole(nano), generators(range(4)))
    assert found.latent.shape == latent.shape and found.latent.abs().max() <= 1
    assert found.reach.min() > 0.97
    draws = layout.sample(generators(range(4)), 8)
    random = nano.denoise(encoding, layout.expand(draws))[:, :, : nano.spec.executed_steps]
    off = (denoised(nano, encoding, layout, found.latent) - chunk).square().mean((1, 2))
    assert (off < 0.05 * (random - chunk[:, None]).square().mean((1, 2, 3))).all()


def test_a_base_in_bfloat16_is_inverted_too(nano, observation):
    base, layout = load_base("nano:", dtype="bfloat16"), NoiseLayout(nano.spec.noise, "repeat", 1.5)
    encoding, _, chunk = asked(base, observation, layout)
    assert invert(base, encoding, layout, chunk, whole(base), generators(range(4))).reach.min() > 0.9


def test_one_that_is_not_finite_does_not_spoil_the_others(nano, observation, monkeypatch):
    layout, real = NoiseLayout(nano.spec.noise, "repeat", 1.5), nano._denoise
    encoding, _, chunk = asked(nano, observation, layout)

    def ill(encoding, noise):
        chunks = real(encoding, noise)
        chunks[1] = torch.nan
        return chunks

    monkeypatch.setattr(nano, "_denoise", ill)
    chunk[2] = torch.inf
    found = invert(nano, encoding, layout, chunk, whole(nano), generators(range(4)))
    assert found.reach[[0, 3]].min() > 0.97 and found.reach[[1, 2]].tolist() == [0, 0]
    assert found.latent[[1, 2]].abs().sum() == 0


def test_a_base_that_noise_does_not_move_reaches_nothing(nano, observation, monkeypatch):
    layout, real = NoiseLayout(nano.spec.noise, "repeat", 1.5), nano._denoise
    encoding, _, chunk = asked(nano, observation, layout)
    monkeypatch.setattr(nano, "_denoise", lambda encoding, noise: real(encoding, noise * 0))
    for done in (chunk + 1.0, denoised(nano, encoding, layout, torch.zeros(4, 1, 4))):
        found = invert(nano, encoding, layout, done, whole(nano), generators(range(4)))
        assert found.reach.tolist() == [0, 0, 0, 0] and found.latent.isfinite().all()


def test_a_layout_of_too_many_numbers_is_refused(tiny_pi0, observation, monkeypatch):
    monkeypatch.setattr(inversion, "_MOST", 10)
    layout = NoiseLayout(tiny_pi0.spec.noise, "chunk", 1.5)
    encoding = tiny_pi0.encode(batch([observation(tiny_pi0, 0)]))
    chunk = torch.zeros(1, tiny_pi0.spec.executed_steps, tiny_pi0.spec.action_dim)
    with pytest.raises(DsrlError, match=r"noise\.layout: expected one of at most 10 numbers to look for, got 'chunk'"):
        invert(tiny_pi0, encoding, layout, chunk, whole(tiny_pi0, 1), generators([0]))


def test_what_the_base_never_does_is_out_of_reach(nano, observation):
    layout = NoiseLayout(nano.spec.noise, "repeat", 1.5)
    encoding, _, chunk = asked(nano, observation, layout)
    found = invert(nano, encoding, layout, chunk + 50.0, whole(nano), generators(range(4)))
    assert found.reach.max() < 0.1 and found.latent.isfinite().all()


def test_steps_that_were_not_executed_do_not_count(nano, observation):
    layout = NoiseLayout(nano.spec.noise, "repeat", 1.5)
    encoding, _, chunk = asked(nano, observation, layout)
    held = chunk.clone()
    held[:, 4:] = held[:, 3:4] + 9.0
    held[0, 5:] = torch.nan
    steps = torch.full((4,), 4)
    found = invert(nano, encoding, layout, held, steps, generators(range(4)))
    assert found.reach.min() > 0.9
    assert invert(nano, encoding, layout, held, whole(nano), generators(range(4))).reach.max() < 0.5


def test_a_column_that_noise_does_not_move_leaves_the_others_alone(fork_base, observation, monkeypatch):
    """A gripper that the base keeps still, and the demonstrator does not: out of reach, but the arm goes along."""
    layout, real = NoiseLayout(fork_base.spec.noise, "repeat", 1.5), fork_base._denoise

    def stiff(encoding, noise):
        chunks = real(encoding, noise)
        return torch.cat([chunks[..., :1], torch.zeros_like(chunks[..., 1:])], -1)

    monkeypatch.setattr(fork_base, "_denoise", stiff, raising=False)
    encoding, _, chunk = asked(fork_base, observation, layout)
    still = invert(fork_base, encoding, layout, chunk, whole(fork_base), generators(range(4)))
    assert still.reach.min() > 0.9
    chunk[..., 1] = 1.0
    found = invert(fork_base, encoding, layout, chunk, whole(fork_base), generators(range(4)))
    assert found.reach.max() < 0.1
    off = (denoised(fork_base, encoding, layout, found.latent) - chunk)[..., 0]
    assert off.abs().max() < 0.1


def test_the_actor_is_drawn_to_the_noise_found_by_how_near_it_comes():
    class Fixed:
        def distribution(self, inputs):
            return torch.zeros(3, 1, 2), torch.zeros(3, 1, 2)

    latent, blank = torch.tensor([[[1.0, 1.0]], [[0.5, 0.0]], [[1.0, 1.0]]]), torch.zeros(3)
    extras = {REACH: torch.tensor([1.0, 0.5, 1.0]), IMITATED: torch.tensor([1.0, 1.0, 0.0])}
    loss, info = imitation_loss(Fixed(), Batch({}, latent, blank, blank, {}, extras))
    assert loss == pytest.approx((1.0 + 0.5 * 0.125) / 3) == info["imitation_loss"]


def test_noise_earns_only_what_it_can_do(head):
    """A critic told that noise won where a person did what noise cannot would be followed there."""
    critic = CriticEnsemble(CriticConfig(network=NetworkConfig(width=16, layers=1)), head.config)
    latent, alpha = torch.zeros(4, *head.layout.latent_shape), torch.tensor(0.0)
    seen = {"state": torch.randn(4, 4), "feature": torch.randn(4, head.config.feature_dim)}
    reward = torch.tensor([0.0, 0.0, 9.0, 9.0])
    first = lambda rows: {name: values[:rows] for name, values in seen.items()}
    part = lambda rows, extras: Batch(
        first(rows), latent[:rows], reward[:rows], torch.zeros(rows), first(rows), extras
    )
    losses = [
        critic_loss(critic, critic, head, alpha, part(rows, extras), (-99, 99), False, None)[0].item() * rows
        for rows, extras in ((2, {}), (4, {REACH: torch.tensor([1.0, 1.0, 0.0, 0.0])}), (4, {}))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[2] > 2 * losses[1]


KEEPERS = {
    "sac": Keeper(inverts=True),
    "na": BankKeeper(BankConfig(3), inverts=True),
    "na-exact": PrefixKeeper(inverts=True),
}


@pytest.mark.parametrize("algorithm", KEEPERS)
def test_offline_decisions_hold_the_noise_found_for_them(fork_base, head, episodes, algorithm):
    replay = Replay(2000, head.layout.latent_shape)
    loader = OfflineLoader(fork_base, head, KEEPERS[algorithm], SACConfig(n_step=1), OfflineConfig())
    loader.fill(replay, episodes)
    now = replay.index[: replay.added, 0]
    latent, reach = replay.latent[: replay.added], replay.extras[REACH][now]
    imitated = replay.extras[IMITATED][now] == 1
    failed = np.repeat([not e["success"].any() for e in episodes], [-(-len(e["action"]) // 4) for e in episodes])
    assert 0 < failed.mean() < 1 and len(loader.reach) == len(failed)
    assert torch.equal(imitated, torch.from_numpy(~failed)[now])  # numbers count decisions, episode by episode
    assert reach.mean() > 0.5
    seen = {name: rows[now] for name, rows in replay.inputs.items()}
    encoding = fork_base.encode(batch([{"observation.state": s} for s in seen["state"].numpy()]))
    done = torch.cat(list(chunks_of(episodes)))[now]
    near = (denoised(fork_base, encoding, head.layout, latent) - done).square().mean((1, 2))
    far = denoised(fork_base, encoding, head.layout, latent[torch.randperm(len(latent))])
    assert near.mean() < 0.3 * (far - done).square().mean()
    if algorithm != "sac":
        assert torch.equal(replay.extras[ACTION][now], done)
    if algorithm == "na":
        assert torch.equal(replay.extras[BANK_LATENT][now][:, 0], latent)
        taught = replay.extras[BANK_ACTION][now][:, 0]
        assert torch.allclose(taught, denoised(fork_base, encoding, head.layout, latent), atol=1e-5)


def chunks_of(episodes, k=4):
    """The recorded chunks, the last action held beyond an episode's end."""
    for episode in episodes:
        action = torch.from_numpy(episode["action"])
        last = len(action) - 1
        yield torch.stack([action[torch.arange(t, t + k).clamp(max=last)] for t in range(0, len(action), k)])


def test_other_actions_are_other_data(fork_base, head, episodes):
    """Also where nothing is kept but the noise found for them, which another machine may round otherwise."""
    known = []
    for made in (episodes, [e | {"action": -e["action"]} for e in episodes], episodes):
        replay = Replay(2000, head.layout.latent_shape)
        loader = OfflineLoader(fork_base, head, Keeper(inverts=True), SACConfig(n_step=1), OfflineConfig())
        loader.fill(replay, made)
        known.append(MixedReplay(Replay(9, head.layout.latent_shape), replay, 0.5, loader.actions.hexdigest()).sha256)
    assert known[0] == known[2] != known[1]


def test_data_that_the_base_cannot_do_are_said_to_be_so(fork_base, head, episodes, tmp_path, caplog):
    strange = [episode | {"action": episode["action"] * 0 + 30.0} for episode in episodes]
    for name, made, words in (("own", episodes, ""), ("strange", strange, "the base does not act like that")):
        caplog.clear()
        write_npz(tmp_path / f"{name}.npz", made)
        config = OfflineConfig(str(tmp_path / f"{name}.npz"))
        loader = OfflineLoader(fork_base, head, Keeper(inverts=True), SACConfig(), config)
        fill(Replay(500, head.layout.latent_shape), loader)
        assert (words in caplog.text) if words else not caplog.text


def test_reach_tells_whether_a_base_can_do_what_is_shown(fork_recipe, tmp_path, episodes, capsys):
    data, out = tmp_path / "shown.npz", tmp_path / "reach.json"
    write_npz(data, [{k: v for k, v in e.items() if k != "noise"} for e in episodes])
    options = ["--episodes", "3", "--layouts", "repeat", "chunk", "--bounds", "0.5", "1.5", "--out", str(out)]
    assert main(["reach", str(fork_recipe), str(data), *options]) == 0
    told, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert [(e["layout"], e["bound"]) for e in told["layouts"]] == [
        ("repeat", 0.5), ("repeat", 1.5), ("chunk", 0.5), ("chunk", 1.5)
    ]  # fmt: skip
    reach = {(e["layout"], e["bound"]): e["reach"] for e in told["layouts"]}
    assert reach["repeat", 0.5] < reach["repeat", 1.5] < reach["chunk", 1.5] <= 1
    assert told["decisions"] == sum(-(-len(e["action"]) // 4) for e in episodes[:3])
    assert "'chunk' within 1.5 takes away" in printed and told["words"] in printed
    assert main(["reach", str(fork_recipe), str(data), "--episodes", "0"]) == 2
    assert "reach --episodes: expected 1 or more, got 0" in capsys.readouterr().err
    np.savez(tmp_path / "bare.npz", **{"episode_index": np.zeros(3, int), "observation.state": np.zeros((3, 4))})
    assert main(["reach", str(fork_recipe), str(tmp_path / "bare.npz")]) == 2
    assert "an offline episode: expected a field 'action', got observation.state" in capsys.readouterr().err
    assert main(["reach", str(fork_recipe), str(data), "--out", str(out)]) == 2
    assert "expected a new file that ends in .json, got one that exists" in capsys.readouterr().err
    write_npz(tmp_path / "strange.npz", [e | {"action": e["action"] * 0 + 30.0} for e in episodes])
    assert main(["reach", str(fork_recipe), str(tmp_path / "strange.npz"), "--episodes", "2"]) == 0
    assert "the base does not act like that" in capsys.readouterr().out


@pytest.fixture
def demonstrated(fork_recipe, tmp_path):
    """A recipe that learns from 40 recorded episodes, half of them failures, and never acts."""
    data, tree = tmp_path / "fork.npz", yaml.safe_load(fork_recipe.read_text())
    assert main(["record", str(fork_recipe), "--out", str(data), "--episodes", "40"]) == 0
    won = [bool(e["success"].any()) for e in read_episodes(OfflineConfig(str(data)))]
    assert 10 <= sum(won) <= 30
    tree |= {"offline": {"source": str(data), "updates": 300, "stride": 1}, "sac": {"imitate": 1.0}}
    return tree


def test_a_head_learns_from_demonstrations_without_a_step(demonstrated, fork_base, tmp_path):
    """By DSRL-SAC, from the half of them that succeeded; the base's own success is a coin flip."""
    shown = demonstrated | {"train": demonstrated["train"] | {"env_steps": 0}}
    shown["eval"] = {"episodes": 60, "video_episodes": 0}
    result = train(load_recipe("drawer-open", shown), tmp_path / "run", base=fork_base).evaluation
    assert result["env_steps"] == 0 and result["updates"] == 300
    assert result["steered"]["success"] >= 0.9 and 0.25 <= result["base"]["success"] <= 0.75
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["imitation_loss"] >= 0


@pytest.mark.parametrize("algorithm", ["sac", "na"])
def test_it_goes_on_online_and_is_resumed_bit_for_bit(demonstrated, fork_base, tmp_path, algorithm):
    tree = demonstrated | {"algorithm": algorithm, "offline": demonstrated["offline"] | {"updates": 20, "stride": 4}}
    tree["train"] |= {"env_steps": 800, "checkpoint_every": 400, "learning_starts": 1, "stop_at": None}
    tree["eval"] = {"episodes": 2, "video_episodes": 0}
    recipe = load_recipe("drawer-open", tree)
    one = train(recipe, tmp_path / "one", base=fork_base, evaluate_after=False)
    short = load_recipe("drawer-open", tree | {"train": tree["train"] | {"env_steps": 400}})
    train(short, tmp_path / "two", base=fork_base, evaluate_after=False)
    (tmp_path / "two" / "recipe.yaml").write_text(recipe.to_yaml())
    two = train(recipe, tmp_path / "two", base=fork_base, resume=True, evaluate_after=False)
    assert all(torch.equal(a, b) for a, b in zip(one.head.parameters(), two.head.parameters(), strict=True))


def test_there_has_to_be_somebody_to_imitate(fork_recipe, fork_base, tmp_path):
    recipe = load_recipe(fork_recipe, {"sac": {"imitate": 1.0}})
    with pytest.raises(
        DsrlError, match=r"sac\.imitate: expected offline\.source, or a robot whose operator takes over"
    ):
        train(recipe, tmp_path / "run", base=fork_base)


def test_sac_needs_to_imitate_to_learn_from_such_data(demonstrated):
    expected = "offline.source: expected algorithm na or na-exact, which learn from actions, or sac.imitate, got sac"
    with pytest.raises(DsrlError, match=expected):
        load_recipe("drawer-open", demonstrated | {"sac": {}})
    for value in (-1.0, float("nan")):
        with pytest.raises(DsrlError, match=r"sac\.imitate: expected"):
            SACConfig(imitate=value)
