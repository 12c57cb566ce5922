"""The best heads of a run play again before one of them is handed out."""

import json
import shutil

import pytest
import torch
from dsrl_vla import SteeringHead, load_recipe, train, trainer
from dsrl_vla import seeds as seed_ranges
from dsrl_vla.episodes import Episode
from dsrl_vla.errors import DsrlError
from dsrl_vla.evaluation import Measure
from dsrl_vla.finalists import Finalist, Finalists
from dsrl_vla.head import HeadConfig
from dsrl_vla.networks import NetworkConfig
from dsrl_vla.noise import NoiseLayout
from dsrl_vla.writing import Writing


@pytest.fixture
def head(fork_base):
    """A head that is told from others by `mark`."""

    def make(mark):
        layout = NoiseLayout(fork_base.spec.noise, "chunk")
        made = SteeringHead(HeadConfig.for_base(fork_base.spec, layout, NetworkConfig(width=16, layers=1)))
        with torch.no_grad():
            next(made.parameters()).fill_(mark)
        return made.eval()

    return make


def mark(head):
    return round(float(next(head.parameters()).detach().flatten()[0]), 4)


def kept(out):
    return mark(SteeringHead.from_pretrained(out / "best"))


def fill(tmp_path, head, scores, count):
    finalists = Finalists(tmp_path, count, Writing())
    for number, score in enumerate(scores, 1):
        found = Finalist(1000 * number, score, 50.0, 10)
        if finalists.takes(found):
            made = head(number / 10)
            finalists.add(found, made, made.save_pretrained)
    return finalists


def names(tmp_path):
    return sorted(int(path.name) for path in (tmp_path / "finalists").iterdir())


def test_a_single_finalist_is_the_best_head_and_has_no_other_folder(tmp_path, head):
    finalists = fill(tmp_path, head, [0.5, 0.9, 0.9, 0.7], 1)
    assert (finalists.best, kept(tmp_path), mark(finalists.best_head())) == (0.9, 0.2, 0.2), "the first of two equals"
    assert not (tmp_path / "finalists").exists()
    finalists.settle(lambda _: pytest.fail("nothing to settle"))


def test_a_validation_that_is_not_a_number_is_no_finalist(tmp_path, head):
    finalists = fill(tmp_path, head, [float("nan"), 0.5], 1)
    assert (finalists.best, kept(tmp_path)) == (0.5, 0.2)


def test_of_two_that_succeed_equally_often_the_quicker_is_better(tmp_path, head):
    finalists = Finalists(tmp_path, 1, Writing())
    for number, steps in enumerate([50.0, 40.0, 45.0], 1):
        found, made = Finalist(number, 0.9, steps, 10), head(number / 10)
        if finalists.takes(found):
            finalists.add(found, made, made.save_pretrained)
    assert kept(tmp_path) == 0.2


def test_the_best_few_play_again_and_what_they_found_is_pooled(tmp_path, head):
    finalists = fill(tmp_path, head, [0.5, 0.9, 0.8, 0.85, 0.7], 3)
    assert names(tmp_path) == [2000, 3000, 4000]
    assert kept(tmp_path) == 0.2
    again = {0.2: 0.7, 0.3: 0.95, 0.4: 0.8}
    finalists.settle(lambda head: (again[mark(head)], 60.0, 30))
    assert kept(tmp_path) == mark(finalists.best_head()) == 0.3
    best = finalists.ranked[0]
    assert (best.env_steps, best.episodes, best.steps) == (3000, 40, 57.5)
    assert best.mean == pytest.approx((0.8 * 10 + 0.95 * 30) / 40)
    assert [each.env_steps for each in finalists.ranked] == [3000, 4000, 2000]


def test_a_finalist_that_cannot_be_read_does_not_play(tmp_path, head, caplog):
    finalists = fill(tmp_path, head, [0.5, 0.9, 0.8], 3)
    (tmp_path / "finalists" / "2000" / "head.safetensors").unlink()
    finalists.settle(lambda head: (0.6 if mark(head) == 0.1 else 0.1, 50.0, 10))
    assert kept(tmp_path) == 0.1
    assert "the head of step 2000 does not play again" in caplog.text


def test_with_nobody_to_play_against_the_best_head_stays(tmp_path, head):
    finalists = fill(tmp_path, head, [0.5, 0.9], 2)
    shutil.rmtree(tmp_path / "finalists" / "2000")
    finalists.settle(lambda _: pytest.fail("alone"))
    assert kept(tmp_path) == 0.2


def test_finalists_are_what_the_disk_says(tmp_path, head):
    finalists = fill(tmp_path, head, [0.5, 0.9, 0.7], 2)
    again = Finalists(tmp_path, 2, Writing())
    again.load()
    assert again.ranked == finalists.ranked
    assert mark(again.best_head()) == 0.2


def test_a_head_that_could_not_be_written_is_not_named_before_it_is(tmp_path, head):
    """The process may die at any moment: the list never promises a head that is not there."""
    finalists, full = fill(tmp_path, head, [0.5], 2), [True]

    def write(folder):
        if full[0]:
            raise OSError("No space left on device")
        made.save_pretrained(folder)

    made = head(0.9)
    finalists.add(Finalist(2000, 0.9, 50.0, 10), made, write)
    after_a_crash = Finalists(tmp_path, 2, Writing())
    after_a_crash.load()
    assert [each.env_steps for each in after_a_crash.ranked] == [1000]
    assert kept(tmp_path) == 0.1
    full[0] = False
    assert not finalists.writing.again()
    after_a_crash.load()
    assert [each.env_steps for each in after_a_crash.ranked] == [2000, 1000]
    assert kept(tmp_path) == 0.9


def test_what_could_not_be_written_is_tried_again(caplog):
    writing, full = Writing(), [True]

    def write():
        if full[0]:
            raise OSError("No space left on device")

    writing.attempt("best head", write)
    assert "best head not written, going on without: No space left" in caplog.text
    assert list(writing.again()) == ["best head"]
    full[0] = False
    assert not writing.again()


def recipe_of(folder, **fields):
    small = {"network": {"width": 16, "layers": 1}}
    made = {
        "base": {"uri": f"flow-mlp:{folder}"},
        "task": {"uri": "point:fork", "max_episode_steps": 40, "num_envs": 4},
        "head": small,
        "critic": small,
        "algorithm": "na",
        "train": {"env_steps": 1500, "learning_starts": 32, "gradient_steps": 0.5, "validate_every": 300,
                  "stop_at": None, "validation_episodes": 4} | fields,
        "eval": {"episodes": 4, "video_episodes": 0, "controls": False, "baselines": ["best-of-k"]},
    }  # fmt: skip
    return load_recipe("drawer-open", made)


def test_a_run_keeps_the_finalist_that_does_best_on_fresh_episodes(fork_folder, tmp_path, monkeypatch):
    played = []

    def measured(base, task, source, seeds, **options):
        played.append(seeds)
        score = 0.75 if len(played) <= 5 else (0.25, 1.0)[len(played) - 6]
        return Measure(tuple(Episode(i, i < 4 * score, 10, 0.0) for i in range(4)))

    monkeypatch.setattr(trainer, "measure", measured)
    result = train(recipe_of(fork_folder, finalists=2), tmp_path / "run")
    first, again = (seed_ranges.block(seed_ranges.VALIDATION + n, 4) for n in (0, 4))
    assert played == [first] * 5 + [again] * 2
    best, other = result.evaluation["finalists"]
    assert (best["mean"], best["episodes"], other["mean"]) == (0.875, 8, 0.5)
    assert result.evaluation["validation_env_steps"] == 7 * 40
    assert "best-of-k" in result.evaluation["baselines"], "the action critic has come along"
    chosen = tmp_path / "run" / "finalists" / str(best["env_steps"])
    for path in chosen.iterdir():
        assert path.read_bytes() == (tmp_path / "run" / "best" / path.name).read_bytes()


def test_a_run_cut_off_while_its_finalists_play_ends_as_if_it_had_not_been(fork_folder, tmp_path, monkeypatch):
    recipe = recipe_of(fork_folder, finalists=3)
    train(recipe, tmp_path / "straight")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Finalists, "settle", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        train(recipe, tmp_path / "cut")
    train(recipe, tmp_path / "cut", resume=True)
    a, b = (json.loads((tmp_path / name / "eval.json").read_text()) for name in ("straight", "cut"))
    assert a["finalists"] == b["finalists"]
    assert len(a["finalists"]) == 3
    assert {each["episodes"] for each in a["finalists"]} == {8}
    assert a["steered"] == b["steered"]
    files = [(tmp_path / name / "best" / "head.safetensors").read_bytes() for name in ("straight", "cut")]
    assert files[0] == files[1]


def test_no_finalists_at_all_is_refused(fork_folder):
    with pytest.raises(DsrlError, match=r"train.finalists: expected .*1.* got 0"):
        recipe_of(fork_folder, finalists=0)
