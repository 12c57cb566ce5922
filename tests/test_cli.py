import json
import subprocess
import sys

import pytest
import yaml
from dsrl_vla.cli import COMMANDS, main
from dsrl_vla.training import load_run


def test_lists(capsys):
    assert main(["recipes", "--json"]) == 0
    assert "demo" in json.loads(capsys.readouterr().out)
    assert main(["adapters"]) == 0
    assert "transformers:" in capsys.readouterr().out


def test_train_resume_eval_and_a_head_that_is_handed_on(fork_recipe, tmp_path, capsys, caplog):
    out = tmp_path / "run"
    assert main(["train", str(fork_recipe), "--out", str(out), "--train.seed", "3", "--sac.gamma=0.98"]) == 0
    printed = capsys.readouterr().out
    assert "base 0." in printed and "steered" in printed
    result = json.loads((out / "eval.json").read_text())
    assert result["train_seed"] == 3 and result["recipe"] == "fork"

    assert main(["train", str(fork_recipe), "--out", str(out), "--resume"]) == 0
    assert json.loads((out / "eval.json").read_text())["steered"] == result["steered"]
    assert "the recipe it was started with, which differs from this one in sac.gamma, train.seed." in caplog.text

    assert main(["eval", str(out), "--episodes", "10"]) == 0
    again = json.loads((out / "eval.json").read_text())
    assert again["steered"] == result["steered"] and again["base"] == result["base"]
    assert again["env_steps"] == result["env_steps"] and again["warnings"] == result["warnings"]
    assert "steered less base" in capsys.readouterr().out
    assert main(["eval", str(out), "--episodes", "2", "--no-controls", "--out", str(tmp_path / "new" / "x.json")]) == 0
    assert json.loads((tmp_path / "new" / "x.json").read_text())["episodes"] == 2

    handed = tmp_path / "handed"
    assert main(["push", str(out), "--folder", str(handed)]) == 0
    assert main(["eval", str(handed)]) == 2
    assert "eval --out: expected a file outside the head's folder" in capsys.readouterr().err
    assert main(["eval", str(handed), "--out", str(handed / "eval.json")]) == 2
    options = ["--episodes", "10", "--no-controls", "--out", str(tmp_path / "checked.json")]
    assert main(["eval", str(handed), *options]) == 0
    checked = json.loads((tmp_path / "checked.json").read_text())
    assert checked["steered"] == again["steered"] and checked["env_steps"] == result["env_steps"]
    told = (handed / "recipe.yaml").read_text()
    (handed / "recipe.yaml").write_text("extends: ../run/recipe.yaml\n")
    assert main(["eval", str(handed), *options]) == 2  # not what its manifest is of
    assert "recipe.yaml" in (said := capsys.readouterr().err) and "manifest" in said
    (handed / "recipe.yaml").write_text(told)
    assert main(["eval", str(handed), *options, "--device", "cuda:99"]) == 2
    assert "expected float32 on the cpu for 'flow-mlp:', got float32 on cuda:99" in capsys.readouterr().err
    assert main(["eval", str(tmp_path), *options]) == 2
    assert "a head's folder (dsrl-vla pull fetches one) or shipped:<recipe>" in capsys.readouterr().err


def test_a_head_without_its_manifest_is_evaluated_by_the_recipe_beside_it(fork_recipe, tmp_path, capsys):
    out, handed = tmp_path / "run", tmp_path / "handed"
    assert main(["train", str(fork_recipe), "--out", str(out), "--train.env_steps", "400"]) == 0
    head = load_run(out)[1]
    head.save_pretrained(handed)
    options = ["--episodes", "2", "--no-controls", "--out", str(tmp_path / "checked.json")]
    assert main(["eval", str(handed), *options]) == 2
    assert "expected a head with the recipe.yaml of its run" in capsys.readouterr().err
    told = yaml.safe_load((out / "recipe.yaml").read_text())
    (handed / "recipe.yaml").write_text(yaml.safe_dump(told | {"of a later version": 1}))
    assert main(["eval", str(handed), *options]) == 0
    assert "baselines" not in json.loads((tmp_path / "checked.json").read_text())


def test_preflight_recommends_on_the_command_line(fork_recipe, tmp_path, capsys):
    flags = ["--episodes", "6", "--best-of", "2", "--layouts", "repeat", "chunk", "--bounds", "1.5"]
    assert main(["preflight", str(fork_recipe), "--out", str(tmp_path / "pre"), *flags]) == 0
    assert json.loads((tmp_path / "pre" / "preflight.json").read_text())["episodes"] == 6
    assert "recommended: --noise.layout" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian", "demo"], "unknown command 'trian'. Did you mean 'train'"),
        (["train", "demmo"], "unknown recipe 'demmo'. Did you mean 'demo'"),
        (["train", "demo", "--train.sed", "1"], "unknown recipe key 'train.sed'. Did you mean 'train.seed'"),
        (["train", "demo", "--train.seed", "x"], "train.seed: expected int, got 'x'"),
        (["train", "demo", "--base.uri", "nanno:"], "unknown adapter 'nanno'. Did you mean 'nano'"),
        (["train", "demo", "--base.uri", "nano"], "base: expected '<adapter>:<source>'"),
        (["train", "demo", "--base.uri", "lerobot:bases/none"], "a folder 'bases/none', or a repository 'bases/none'"),
        (["train", "demo", "--noise.layout", "repat"], "unknown noise layout 'repat'. Did you mean 'repeat'"),
        (["train", "demo", "--noise", "repeat", "--noise.layout", "chunk"], "a value of 'noise' or of its fields"),
        (
            ["train", "demo", "--eval.baselines", "[ticket"],
            "--eval.baselines': expected a value as YAML has it",
        ),
        (
            ["train", "demo", "--base.device", "cudaa"],
            "base.device: expected a device that this build of torch can use",
        ),
        (["record", "demo", "--out", "x"], "x: expected a new file that ends in .npz, got x"),
        (["inspect", "no/body"], "a Hub repository, got no such folder here, and the Hub could not be asked"),
        (["eval", "no-such-run"], "expected a run's directory"),
        (["pretrain", "nothing", "--out", "x"], "recipe: expected a YAML file"),
    ],
)
def test_errors_are_one_line_with_status_2(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dsrl-vla: ") and message in error


@pytest.mark.parametrize("out", ["file", "file/run"])
@pytest.mark.parametrize("command", ["train", "preflight", "search", "eval"])
def test_a_place_that_no_result_can_lie_in_is_refused_before_the_work(command, out, fork_recipe, tmp_path, capsys):
    (tmp_path / "file").write_text("somebody's")
    target = str(tmp_path / out)
    if command == "eval":
        assert main(["train", str(fork_recipe), "--out", str(tmp_path / "run"), "--train.env_steps", "400"]) == 0
        assert main(["eval", str(tmp_path / "run"), "--out", str(tmp_path / "run")]) == 2
        assert "eval --out: expected a JSON file to write, got a folder" in capsys.readouterr().err
        target += "/x.json"
    argv = [str(tmp_path / "run")] if command == "eval" else [str(fork_recipe)]
    assert main([command, *argv, "--out", target]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dsrl-vla: ") and "expected a folder that can be written, got [Errno" in error
    assert (tmp_path / "file").read_text() == "somebody's"


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(name in usage for name in COMMANDS)
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert main(["train", "demo", "--help-recipe"]) == 0
    assert "gradient_steps" in capsys.readouterr().out


def test_a_commands_help_explains_its_options():
    run = subprocess.run([sys.executable, "-m", "dsrl_vla.cli", "train", "--help"], capture_output=True, text=True)
    assert run.returncode == 0 and "--resume" in run.stdout


def test_options_may_stand_before_the_recipe(capsys):
    assert main(["train", "--train.env_steps", "4000", "--algorithm=na", "demo", "--help-recipe"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["train"]["env_steps"], shown["algorithm"]) == (4000, "na")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "demo", "--outt", "3"], "unknown option '--outt'. Did you mean '--out'?"),
        (["preflight", "demo", "--episode", "5"], "unknown option '--episode'. Did you mean '--episodes'?"),
        (
            ["train", "demo", "--train.replay_on_disk", "--train.seed", "3"],
            "'--train.replay_on_disk': expected a value",
        ),
        (["train", "demo", "--train.seed"], "option '--train.seed': expected a value"),
        (["train", "demo", "3"], "unexpected argument '3'"),
        (["train", "nano-metaworld-5"], "got one that makes a base. Use: dsrl-vla pretrain."),
        (["pretrain", "demo", "--out", "x"], "got one to steer by. Use: dsrl-vla train."),
        (["train", "demo", "--train.env_steps", "10"], "train.env_steps: expected more than the 320 decisions"),
        (["train", "demo", "--offline.source", "x.npz"], "offline.source: expected algorithm na or na-exact"),
        (["train", "demo", "--head.network.heads", "0"], "network.heads: expected 1 or more, got 0"),
        (["train", "demo", "--head.image_size", "8"], "head.image_size: expected 15 or more, got 8"),
        (["train", "demo", "--eval.video_episodes", "-1"], "eval.video_episodes: expected 0 or more, got -1"),
        (["search", "demo", "--eval-episodes", "0"], "search --eval-episodes: expected 1 or more, got 0"),
        (["preflight", "demo", "--best-of", "1"], "2 draws or more to choose from"),
    ],
)
def test_what_is_wrong_with_an_option_is_said_at_once(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())
