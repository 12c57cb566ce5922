import json
import sys

import numpy as np
import pytest
import torch
import yaml
from dsrl_vla import load_recipe, offline
from dsrl_vla.cli import main
from dsrl_vla.errors import DsrlError
from dsrl_vla.latent_sac import SACConfig
from dsrl_vla.mixed_replay import MixedReplay
from dsrl_vla.nano.demos import DemoConfig, collect
from dsrl_vla.noise_bank import ACTION, BANK_ACTION, BANK_LATENT, BankConfig, BankKeeper, Keeper, PrefixKeeper
from dsrl_vla.observation import batch
from dsrl_vla.offline import OfflineConfig, OfflineLoader, check_episode, sparse_success
from dsrl_vla.offline_sources import fill, load_relabel, read_episodes, read_npz, write_npz
from dsrl_vla.recording import demonstrate
from dsrl_vla.replay import Replay
from dsrl_vla.rollout import TaskConfig

GAMMA = 0.9


def filled(fork_base, head, episodes, keeper=None, n_step=1, timeouts="bootstrap", **config):
    replay = Replay(2000, head.layout.latent_shape)
    keeper = keeper or BankKeeper(BankConfig(3))
    sac = SACConfig(gamma=GAMMA, n_step=n_step, timeouts=timeouts)
    OfflineLoader(fork_base, head, keeper, sac, OfflineConfig(**config)).fill(replay, episodes)
    return replay


def test_recorded_episodes_are_whole(episodes, fork_base):
    assert 0 < sum(e["terminated"] for e in episodes) < 12
    for episode in episodes:
        length = len(episode["action"])
        assert len(episode["observation.state"]) == len(episode["reward"]) == length <= 40
        assert episode["success"][-1] == episode["terminated"] and not episode["success"][:-1].any()
        moved = episode["observation.state"][1:, :2] - episode["observation.state"][:-1, :2]
        assert np.abs(moved).max() <= 0.11  # an action's reach


def test_what_is_written_as_npz_is_read_back(episodes, tmp_path):
    write_npz(tmp_path / "data.npz", episodes)
    again = list(read_npz(tmp_path / "data.npz"))
    assert len(again) == len(episodes)
    for a, b in zip(episodes, again, strict=True):
        assert set(a) == set(b) and a["task"] == b["task"] and a["terminated"] == b["terminated"]
        assert all(np.array_equal(a[k], b[k]) for k in a if np.ndim(a[k]))


@pytest.mark.parametrize("ends", ["next.terminated", "next.success alone"])
def test_a_datasets_folder_reads_like_the_npz(episodes, tmp_path, ends):
    """`next.done` is true at the end of every episode there."""
    datasets = pytest.importorskip("datasets")
    write_npz(tmp_path / "data.npz", episodes)
    with np.load(tmp_path / "data.npz") as archive:
        columns = {k: archive[k] for k in archive.files}
    columns["next.done"] = np.append(np.diff(columns["episode_index"]) > 0, True)
    columns["reward"] = columns["reward"][:, None]
    if ends != "next.terminated":
        del columns["terminated"]
    names = {"reward": "next.reward", "success": "next.success", "terminated": "next.terminated"}
    table = datasets.Dataset.from_dict({names.get(k, k): v.tolist() for k, v in columns.items()})
    table.save_to_disk(str(tmp_path / "table"))
    one = list(read_episodes(OfflineConfig(str(tmp_path / "data.npz"), episodes=5)))
    two = list(read_episodes(OfflineConfig(str(tmp_path / "table"), episodes=5)))
    assert len(one) == len(two) == 5
    for a, b in zip(one, two, strict=True):
        assert a["terminated"] == b["terminated"] and a["task"] == b["task"] and a["reward"].shape == b["reward"].shape
        assert all(np.allclose(a[k], b[k]) for k in ("observation.state", "action", "reward", "success"))


def test_decisions_hold_the_executed_chunk_and_a_true_bank(fork_base, head, episodes):
    replay = filled(fork_base, head, episodes)
    found = replay.sample(64, np.random.default_rng(0))
    k = fork_base.spec.executed_steps
    assert found.extras[ACTION].shape == (64, k, 2) and found.extras[BANK_ACTION].shape == (64, 4, k, 2)
    encoding = fork_base.encode(batch([{"observation.state": s} for s in found.inputs["state"].numpy()]))
    again = fork_base.denoise(encoding, head.layout.expand(found.extras[BANK_LATENT]))[:, :, :k]
    assert torch.allclose(again, found.extras[BANK_ACTION], atol=1e-5)
    starts = {tuple(row) for e in episodes for row in e["action"][::k].round(4).tolist()}
    assert {tuple(row) for row in found.extras[ACTION][:, 0].numpy().round(4).tolist()} <= starts


def test_rewards_discounts_and_ends(fork_base, head, episodes):
    replay = filled(fork_base, head, episodes)
    k = fork_base.spec.executed_steps
    wins = sum(e["terminated"] for e in episodes)
    expected = sum(-(-len(e["action"]) // k) - (not e["terminated"]) for e in episodes)
    assert replay.added == expected  # the last decision of an episode that was cut has no known successor
    assert int((replay.discount[: replay.added] == 0).sum()) == wins
    won = next(e for e in episodes if e["terminated"])
    only = filled(fork_base, head, [won])
    steps = len(won["action"]) - (only.added - 1) * k
    assert only.reward[only.added - 1] == pytest.approx(GAMMA ** (steps - 1))
    assert only.reward[: only.added - 1].abs().max() == 0


def test_an_episode_that_was_cut_has_failed_where_timeouts_are_terminal(fork_base, head, episodes):
    k, cut = fork_base.spec.executed_steps, [e for e in episodes if not e["terminated"]]
    replay = filled(fork_base, head, cut, timeouts="terminal")
    assert replay.added == sum(-(-len(e["action"]) // k) for e in cut)
    assert int((replay.discount[: replay.added] == 0).sum()) == len(cut)


def test_a_smaller_stride_makes_more_of_the_same_data(fork_base, head, episodes):
    k = fork_base.spec.executed_steps
    whole, every = (filled(fork_base, head, episodes, stride=s).added for s in (k, 1))
    assert (k - 1) * whole < every <= (k + 0.5) * whole


def test_a_stride_beyond_a_chunk_is_refused(fork_base, head, episodes):
    """It would quietly be a chunk's."""
    with pytest.raises(DsrlError, match="offline.stride: expected at most the 4 steps that 'flow-mlp:.*got 5"):
        filled(fork_base, head, episodes, stride=5)


def test_a_long_episode_asks_the_base_for_a_few_decisions_at_a_time(fork_base, head, episodes, monkeypatch):
    whole = filled(fork_base, head, episodes)
    batches, real = [], fork_base._encode
    monkeypatch.setattr(offline, "AT_A_TIME", 3)
    monkeypatch.setattr(
        fork_base, "_encode", lambda seen, count: batches.append(count) or real(seen, count), raising=False
    )
    parts = filled(fork_base, head, episodes)
    assert max(batches) == 3 and (parts.observed, parts.added) == (whole.observed, whole.added)
    for name, tensor in parts.tensors().items():
        assert torch.allclose(tensor.float(), whole.tensors()[name].float(), atol=1e-5), name


def test_rewards_beyond_the_tasks_are_refused(fork_base, head, episodes):
    """The values that they add up to would be cut to the task's, and idling be worth as much as success."""
    ones = [e | {"reward": np.asarray(e["reward"]) + 1.0} for e in episodes]
    make = lambda rewards: OfflineLoader(
        fork_base, head, BankKeeper(BankConfig(3)), SACConfig(), OfflineConfig(), rewards
    )
    make((-1.0, 0.0)).fill(Replay(2000, head.layout.latent_shape), episodes)
    words = r"offline episode \d+: reward: expected within the task's \[-1.0, 0.0\], got 1.0. offline.relabel"
    with pytest.raises(DsrlError, match=words):
        make((-1.0, 0.0)).fill(Replay(2000, head.layout.latent_shape), ones)
    failed = episodes[0] | {"reward": np.append(episodes[0]["reward"][:-1], -98.0), "terminated": True}
    make((-1.0, 0.0)).fill(Replay(2000, head.layout.latent_shape), [failed])  # as a robot's operator has it


def test_sac_refuses_data_without_noise_and_na_exact_takes_it(fork_base, head, episodes):
    with pytest.raises(DsrlError, match=r"algorithm: expected na or na-exact, which learn from actions"):
        filled(fork_base, head, episodes, keeper=Keeper())
    replay = filled(fork_base, head, episodes, keeper=PrefixKeeper())
    assert set(replay.extras) == {ACTION, "prefix.feature"}


def test_batches_mix_online_and_offline_by_their_share(fork_base, head, episodes):
    offline, online = (filled(fork_base, head, part) for part in (episodes[:6], episodes[6:]))
    offline.reward += 1000
    rng = np.random.default_rng(0)
    found = MixedReplay(online, offline, 0.25).sample(64, rng)
    assert int((found.reward > 500).sum()) == 16 and found.extras[BANK_ACTION].shape[0] == 64
    empty = MixedReplay(Replay(10, (1, 2)), offline, 0.25)
    assert (empty.sample(8, rng).reward > 500).all()
    assert len(empty.observations()["state"]) == offline.observed
    assert len(empty.held(ACTION)) == len(offline.index[: len(offline), 0].unique())


def test_sparse_success_relabels(episodes):
    for episode in episodes:
        raw = {k: v for k, v in episode.items() if k not in ("reward", "terminated")}
        again = sparse_success(raw)
        assert again["terminated"] == episode["terminated"] and np.array_equal(again["reward"], episode["reward"])
    with pytest.raises(DsrlError, match="a field 'success'"):
        sparse_success({"action": np.zeros((3, 2))})


def relabel_to_nothing(episode):
    return episode | {"reward": np.full(len(episode["action"]), -1.0), "terminated": False}


def test_a_relabelling_of_ones_own(episodes, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "my_labels", sys.modules[__name__])
    write_npz(tmp_path / "data.npz", episodes)
    config = OfflineConfig(str(tmp_path / "data.npz"), relabel="my_labels:relabel_to_nothing")
    assert not any(e["terminated"] for e in read_episodes(config))
    for name, message in (
        ("sparse", "offline.relabel: expected sparse_success, demonstrations or"),
        ("no.such:thing", "importable"),
    ):
        with pytest.raises(DsrlError, match=message):
            load_relabel(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": None}, "offline episode 0: expected a field 'reward'"),
        ({"reward": np.zeros(3)}, r"offline episode 0: reward: expected \d+ rows"),
        ({"action": np.zeros((5, 2))}, r"offline episode 0: observation.state: expected 5 rows, as action has"),
        ({"action": 7}, r"offline episode 0: action: expected shape \(T, 2\) with T > 0, got \(\d+, 7\)"),
        ({"action": "nan"}, "offline episode 0: action: expected finite numbers"),
        ({"observation.state": "nan"}, "offline episode 0: observation.state: expected finite numbers"),
    ],
)
def test_malformed_episodes_are_named(fork_base, head, episodes, change, message):
    broken = dict(episodes[0])
    for key, value in change.items():
        length = len(broken["action"])
        made = {"nan": np.full_like(broken[key], np.nan), 7: np.zeros((length, 7))}
        broken[key] = made[value] if isinstance(value, (str, int)) else value
        if value is None:
            del broken[key]
    with pytest.raises(DsrlError, match=message):
        filled(fork_base, head, [broken])


def test_data_of_which_nothing_can_be_learnt_are_named(fork_base, head, episodes, tmp_path):
    cut = {k: v[:4] if isinstance(v, np.ndarray) else v for k, v in episodes[0].items()} | {"terminated": False}
    write_npz(tmp_path / "data.npz", [cut])
    config = OfflineConfig(str(tmp_path / "data.npz"))
    loader = OfflineLoader(fork_base, head, BankKeeper(BankConfig(3)), SACConfig(), config)
    words = r"data.npz: expected an episode that terminated, or one of more than the 4 steps of a chunk, got none"
    with pytest.raises(DsrlError, match=words):
        fill(Replay(100, head.layout.latent_shape), loader)


@pytest.mark.parametrize("timeouts", ["bootstrap", "terminal"])
@pytest.mark.parametrize("terminated", [True, False])
def test_returns_over_three_decisions_are_the_episodes_own(fork_base, head, episodes, terminated, timeouts):
    episode = next(e for e in episodes if e["terminated"] == terminated)
    reward = np.arange(1.0, len(episode["reward"]) + 1)
    replay = filled(fork_base, head, [episode | {"reward": reward}], n_step=3, timeouts=timeouts)
    over, length = terminated or timeouts == "terminal", len(reward)
    starts = list(range(0, length, 4))
    begun = starts if over else starts[:-1]  # nobody saw what followed the last
    assert len(replay) == len(begun) and sorted(replay.index[: len(replay), 0].tolist()) == list(range(len(begun)))
    for slot in range(len(replay)):
        now, then = replay.index[slot].tolist()
        first, last = starts[now], min(starts[now] + 12, length if over else starts[-1])
        expected = sum(GAMMA ** (t - first) * (reward[t] + 1.0) for t in range(first, last))
        whole = over and last == length
        assert float(replay.reward[slot]) == pytest.approx(expected, rel=1e-5)
        assert float(replay.discount[slot]) == pytest.approx(0.0 if whole else GAMMA ** (last - first), abs=1e-6)
        assert whole or starts[then] == last


def test_a_reward_per_step_is_one_number(fork_base, head, episodes):
    broken = episodes[0] | {"reward": np.zeros((len(episodes[0]["action"]), 2))}
    with pytest.raises(DsrlError, match=r"offline episode 0: reward: expected shape \(\d+,\), got \(\d+, 2\)"):
        filled(fork_base, head, [broken])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        *[({"share": 1.0}, "offline.share"), ({"stride": 0}, "offline.stride"), ({"updates": -1}, "offline.updates")],
        ({"more": ("x.npz",)}, "offline.more: expected offline.source to go with it, got x.npz and no source"),
    ],
)
def test_bad_settings_are_named(config, message):
    with pytest.raises(DsrlError, match=message):
        OfflineConfig(**config)


@pytest.mark.parametrize("noise", ["base", "layout", "held"])
def test_the_recorder_draws_as_the_base_or_as_a_head_would(fork_recipe, tmp_path, noise):
    data = tmp_path / "fork.npz"
    more = ["--noise.layout", "repeat", "--noise.bound", "0.5"]
    assert main(["record", str(fork_recipe), "--out", str(data), "--episodes", "3", "--noise", noise, *more]) == 0
    drawn = [episode["noise"] for episode in read_episodes(OfflineConfig(str(data)))]
    everything = np.concatenate(drawn)
    assert everything.ndim == 3 and everything.std() > 0.1
    in_layout = np.abs(everything).max() <= 0.5 and (everything == everything[:, :1]).all()
    assert in_layout == (noise != "base")
    assert all((one == one[0]).all() for one in drawn) == (noise == "held")
    assert (drawn[0][0] != drawn[1][0]).any()
    more = [*more, "--noise", noise, "--episodes", "2", "--skip", "2"]
    assert main(["record", str(fork_recipe), "--out", str(tmp_path / "more.npz"), *more]) == 0
    third, fourth = (episode["noise"] for episode in read_episodes(OfflineConfig(str(tmp_path / "more.npz"))))
    assert np.array_equal(third, drawn[2]) and not np.array_equal(fourth[0], drawn[0][0])


def test_the_base_as_it_ships_is_recorded_whatever_the_layout(fork_recipe, tmp_path):
    options = ["--episodes", "1", "--noise.layout", "auto"]
    assert main(["record", str(fork_recipe), "--out", str(tmp_path / "x.npz"), *options]) == 0


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("data.csv", b"a,b\n1,2\n", "ValueError"),
        ("torn.npz", b"PK\x03\x04 half", "BadZipFile"),
        ("folder", None, "FileNotFoundError"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(tmp_path, name, content, words):
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(DsrlError, match=rf"offline.source '.*{name}': expected an .npz .*, got {words}"):
        list(read_episodes(OfflineConfig(str(path))))


def test_a_source_without_an_episode_is_named(episodes, tmp_path):
    path = tmp_path / "empty.npz"
    write_npz(path, episodes[:1])
    with np.load(path) as archive:
        columns = {name: archive[name][:0] if archive[name].ndim else archive[name] for name in archive.files}
    np.savez(path, **columns)
    with pytest.raises(DsrlError, match="whole and with episodes, got no episode"):
        list(read_episodes(OfflineConfig(str(path))))


def test_episodes_whose_steps_are_mixed_are_refused(tmp_path):
    steps = {"episode_index": np.array([0, 1, 0, 1]), "action": np.zeros((4, 2)), "terminated": np.zeros(4, bool)}
    np.savez(tmp_path / "mixed.npz", **steps)
    with pytest.raises(DsrlError, match="the steps of every episode one after the other, got episodes that are mixed"):
        list(read_episodes(OfflineConfig(str(tmp_path / "mixed.npz"))))


def test_a_heads_own_cameras_are_wanted_of_offline_data(fork_base, head, episodes):
    with pytest.raises(DsrlError, match="offline episode 0: expected a field 'observation.images.front'"):
        check_episode(episodes[0], 0, fork_base, cameras=("front",))


def test_other_data_of_the_same_lengths_and_rewards_are_noticed(fork_base, head, episodes):
    """With sparse rewards these depend on nothing but when episodes end."""
    found = set()
    for shift in (0.0, 0.1):
        moved = [e | {"observation.state": e["observation.state"] + np.float32(shift)} for e in episodes]
        replay = filled(fork_base, head, moved)
        found.add(MixedReplay(replay, replay, 0.5).sha256)
    assert len(found) == 2


def test_what_was_recorded_until_ctrl_c_is_kept(fork_recipe, tmp_path, capsys, monkeypatch):
    from dsrl_vla import recording

    original = recording.record

    def interrupted(*args, **kwargs):
        for count, episode in enumerate(original(*args, **kwargs)):
            if count == 3:
                raise KeyboardInterrupt
            yield episode

    monkeypatch.setattr(recording, "record", interrupted)
    out = tmp_path / "some.npz"
    assert main(["record", str(fork_recipe), "--episodes", "8", "--skip", "10", "--out", str(out)]) == 130
    said = capsys.readouterr().out
    assert said.startswith("3 episodes") and "--skip 13" in said and list(tmp_path.glob(".*")) == []
    assert len(list(read_episodes(OfflineConfig(str(out))))) == 3


def test_updates_on_no_data_are_refused():
    with pytest.raises(DsrlError, match="offline.updates: expected offline.source to go with it, got 5 and no source"):
        load_recipe("drawer-open", {"algorithm": "na", "offline": {"updates": 5}})


def test_the_recorder_takes_a_runs_head_for_its_own_base_only(fork_recipe, fork_folder, tmp_path, capsys):
    from dsrl_vla import load_base

    run, other = tmp_path / "run", tmp_path / "other"
    short = ["--train.env_steps", "400", "--eval.episodes", "4", "--eval.controls", "False"]
    assert main(["train", str(fork_recipe), "--out", str(run), *short]) == 0
    base = load_base(f"flow-mlp:{fork_folder}")
    with torch.no_grad():
        for weight in base.model.parameters():
            weight.add_(0.01)
    base.save_pretrained(other)
    args = ["record", str(fork_recipe), "--run", str(run), "--episodes", "2", "--out"]
    assert main([*args, str(tmp_path / "x.npz")]) == 0
    assert main([*args, str(tmp_path / "y.npz"), "--base.uri", f"flow-mlp:{other}"]) == 2
    assert "weights: expected sha256" in capsys.readouterr().err


def test_the_recorder_is_told_one_source(fork_recipe, tmp_path, capsys):
    options = ["--noise", "held", "--run", str(tmp_path)]
    assert main(["record", str(fork_recipe), "--out", str(tmp_path / "x.npz"), *options]) == 2
    assert (
        "record: expected one of --noise, --run and --demonstrator, got --noise and --run" in capsys.readouterr().err
    )
    assert main(["record", str(fork_recipe), "--out", str(tmp_path / "x.npz"), "--demonstrator", "expert"]) == 2
    assert "expected a task with a scripted expert, got 'point:fork'" in capsys.readouterr().err


def test_an_operators_demonstrations_are_those_that_a_base_is_cloned_from():
    operator = DemoConfig(("metaworld:drawer-open-v3",), episodes=2, max_episode_steps=12, seed=7)
    cloned = collect(operator)
    recorded = list(demonstrate(TaskConfig("metaworld:drawer-open-v3", 12), operator, (7, 8)))
    assert np.array_equal(np.concatenate([e["action"] for e in recorded]), cloned.actions)
    assert np.array_equal(np.concatenate([e["observation.state"] for e in recorded]), cloned.states)
    assert [e["task"] for e in recorded] == [cloned.prompts[0]] * 2 and not any(e["terminated"] for e in recorded)


def test_demonstrations_are_recorded_and_read_beside_others(tmp_path, capsys):
    made = [tmp_path / f"{name}.npz" for name in ("operator", "expert")]
    for path in made:
        options = ["--demonstrator", path.stem, "--episodes", "2", "--task.max_episode_steps", "10"]
        assert main(["record", "drawer-open", "--out", str(path), *options]) == 0
    assert "2 episodes, 0 successful" in capsys.readouterr().out
    both = list(read_episodes(OfflineConfig(str(made[0]), more=(str(made[1]),))))
    first = list(read_episodes(OfflineConfig(str(made[0]), more=(str(made[1]),), episodes=1)))
    assert (len(both), len(first)) == (4, 2) and np.array_equal(first[1]["action"], both[2]["action"])
    with pytest.raises(DsrlError, match="offline.source: expected an .npz .*, got '.*absent.npz'"):
        read_episodes(OfflineConfig(str(made[0]), more=(str(tmp_path / "absent.npz"),)))


def test_offline_alone_and_offline_to_online_through_the_command_line(fork_recipe, tmp_path, capsys):
    data, tree = tmp_path / "fork.npz", yaml.safe_load(fork_recipe.read_text())
    assert main(["record", str(fork_recipe), "--out", str(data), "--episodes", "30"]) == 0
    assert "30 episodes" in capsys.readouterr().out
    tree |= {"algorithm": "na", "offline": {"source": str(data), "updates": 60}}
    fork_recipe.write_text(yaml.safe_dump(tree))
    alone, both = tmp_path / "alone", tmp_path / "both"
    assert main(["train", str(fork_recipe), "--train.env_steps", "0", "--out", str(alone)]) == 0
    result = json.loads((alone / "eval.json").read_text())
    assert (result["env_steps"], result["updates"]) == (0, 60)
    assert main(["train", str(fork_recipe), "--out", str(both)]) == 0
    result = json.loads((both / "eval.json").read_text())
    assert result["env_steps"] >= 1200 and result["updates"] > 60
    assert main(["train", str(fork_recipe), "--algorithm", "sac", "--out", str(tmp_path / "sac")]) == 2
    assert "offline.source: expected algorithm na" in capsys.readouterr().err
    assert main(["train", str(fork_recipe), "--train.env_steps", "0", "--offline.source", "", "--out", "x"]) == 2
    assert "train.env_steps: expected 1 or more, or offline.source" in capsys.readouterr().err
