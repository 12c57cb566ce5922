"""Loading LeRobot policy directories: options, offline files, and everything that is refused."""

import json
import shutil

import numpy as np
import pytest
import tiny_lerobot
import torch
from dsrl_vla import load_base, probe
from dsrl_vla.errors import DsrlError, MissingExtraError, NotSteerableError
from dsrl_vla.noise import generators
from dsrl_vla.observation import unsqueeze


def config_only(folder, **config):
    (folder / "config.json").write_text(json.dumps(config))
    return f"lerobot:{folder}"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"type": "act"}, "do not come out of a sampler"),
        ({"type": "vqbet"}, "do not come out of a sampler"),
        ({"type": "tdmpc"}, "do not come out of a sampler"),
        ({"type": "pi0_fast"}, "autoregressive 'pi0_fast'.*Use a flow-matching variant"),
        ({"type": "wall_x", "prediction_mode": "fast"}, "autoregressive 'wall_x'"),
        ({"type": "molmoact2", "action_mode": "discrete"}, "autoregressive 'molmoact2'"),
        ({"type": "diffusion", "noise_scheduler_type": "DDPM"}, "DDPM scheduler.*noise_scheduler_type=DDIM"),
        ({"type": "multi_task_dit", "objective": "diffusion", "noise_scheduler_type": "DDPM"}, "DDPM scheduler"),
        ({"type": "lingbot_va"}, "expected a policy type that this adapter knows.*got 'lingbot_va'"),
        ({}, "got ''"),
    ],
)
def test_what_cannot_be_steered_is_refused_before_anything_is_loaded(tmp_path, config, words):
    """Also where LeRobot is not installed."""
    with pytest.raises(NotSteerableError, match=words):
        load_base(config_only(tmp_path, **config))


def test_a_folder_without_a_policy_is_refused(tmp_path):
    with pytest.raises(DsrlError, match=r"expected a LeRobot policy, with a config.json, got none"):
        load_base(f"lerobot:{tmp_path}")


def test_a_missing_lerobot_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lerobot.policies", None)
    monkeypatch.setitem(__import__("sys").modules, "lerobot", None)
    with pytest.raises(
        MissingExtraError, match=r"Python 3.12 or newer; this is Python 3.*pip install 'dsrl-vla\[lerobot\]'"
    ):
        load_base(config_only(tmp_path, type="smolvla"))


@pytest.fixture(scope="module")
def smolvla(tmp_path_factory):
    pytest.importorskip("lerobot.policies")
    folder = tmp_path_factory.mktemp("smolvla")
    tiny_lerobot.save("smolvla", folder)
    return folder


def test_a_folder_that_was_moved_still_finds_its_files(smolvla, tmp_path, observation):
    moved = shutil.copytree(smolvla, tmp_path / "elsewhere")
    first, second = load_base(f"lerobot:{smolvla}"), load_base(f"lerobot:{moved}")
    assert torch.equal(first.act(observation(first), seed=0), second.act(observation(first), seed=0))
    assert first.sha256() == second.sha256()


def test_a_tokenizer_that_is_not_there_is_asked_for(smolvla, tmp_path):
    folder = shutil.copytree(smolvla, tmp_path / "bare")
    path = folder / "policy_preprocessor.json"
    path.write_text(path.read_text().replace("HuggingFaceTB/tiny-smolvlm", "nobody/nothing"))
    with pytest.raises(DsrlError, match="put it into a subfolder of the policy's folder"):
        load_base(f"lerobot:{folder}")


EVIL = """
from pathlib import Path
Path("{trace}").touch()
from transformers import PreTrainedTokenizerFast as Evil
"""


def test_code_that_comes_with_a_checkpoint_is_not_run(smolvla, tmp_path):
    """LeRobot's own step of that name loads from where the file says, and trusts what it finds."""
    folder, trace = shutil.copytree(smolvla, tmp_path / "evil"), tmp_path / "run"
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "evil.py").write_text(EVIL.format(trace=trace))
    auto = {"AutoProcessor": "evil.Evil"}
    (tokenizer / "processor_config.json").write_text(json.dumps({"processor_class": "Evil", "auto_map": auto}))
    path = folder / "policy_preprocessor.json"
    tree = json.loads(path.read_text())
    config = {"action_tokenizer_name": str(tokenizer)}
    tree["steps"].append({"registry_name": "action_tokenizer_processor", "config": config})
    path.write_text(json.dumps(tree))
    with pytest.raises(DsrlError, match="expected data alone, got code to run: evil.py"):
        load_base(f"lerobot:{folder}")
    assert not trace.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "policy_preprocessor.json", "policy_postprocessor.json"])
def test_a_file_that_is_missing_is_named(smolvla, tmp_path, name):
    folder = shutil.copytree(smolvla, tmp_path / "part")
    (folder / name).unlink()
    with pytest.raises(DsrlError, match=name.replace(".", r"\.")):
        load_base(f"lerobot:{folder}")


@pytest.mark.parametrize("kind", ["pi0", "smolvla"])
def test_weights_that_lerobot_could_not_load_are_not_served(kind, tmp_path):
    """LeRobot only says that they are missing, and goes on with random ones."""
    from safetensors.torch import load_file, save_file

    pytest.importorskip("lerobot.policies")
    tiny_lerobot.save(kind, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name, value in tensors.items() if value.ndim == 2 and "lm_head" not in name)
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    with (
        tiny_lerobot.sizes(kind),
        pytest.raises(DsrlError, match="weights to come from model.safetensors, got 1 that"),
    ):
        load_base(f"lerobot:{tmp_path}")


def test_weights_may_be_renamed_tied_cast_or_transposed(tmp_path):
    from dsrl_vla.adapters.lerobot.weights import check_loaded
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 5))
    first, second = model[0].weight.detach(), model[1].weight.detach()
    biases = {str(number): layer.bias.detach() for number, layer in enumerate(model)}
    kept = biases | {"old.name": first.T.contiguous(), "another": second.bfloat16()}
    save_file(kept, tmp_path / "model.safetensors")
    check_loaded(model, tmp_path / "model.safetensors", "there")
    torch.nn.init.normal_(model[1].weight)
    with pytest.raises(DsrlError, match=r"all of its 4 weights to come from model.safetensors, got 1 .*\(1.weight\)"):
        check_loaded(model, tmp_path / "model.safetensors", "there")


@pytest.mark.parametrize(
    "step", ["subprocess.Popen", "lerobot.envs.factory.make_env", "lerobot.envs.factory.importlib.import_module"]
)
def test_a_processor_step_from_elsewhere_is_not_loaded(smolvla, tmp_path, step):
    """LeRobot would call whatever has this name: its own make_env runs code out of a repository."""
    folder = shutil.copytree(smolvla, tmp_path / "odd")
    path = folder / "policy_postprocessor.json"
    tree = json.loads(path.read_text())
    tree["steps"].append({"class": step, "config": {"args": ["true"]}})
    path.write_text(json.dumps(tree))
    with pytest.raises(DsrlError, match=r"expected processor steps that are LeRobot's own, got '" + step):
        load_base(f"lerobot:{folder}")


def test_real_time_chunking_is_refused_with_the_remedy(smolvla):
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    with pytest.raises(NotSteerableError, match="real-time chunking.*config={'rtc_config': None}"):
        load_base(f"lerobot:{smolvla}", config={"rtc_config": RTCConfig(enabled=True)})


def test_config_can_be_changed_and_a_typo_is_refused(smolvla, observation):
    base = load_base(f"lerobot:{smolvla}", config={"num_steps": 2, "n_action_steps": 5})
    assert base.spec.sampler_steps == 2 and base.act(observation(base), seed=0).shape[0] == 5
    with pytest.raises(DsrlError, match="base.config: expected a field of SmolVLAConfig, got 'num_stps'"):
        load_base(f"lerobot:{smolvla}", config={"num_stps": 2})
    horizon = load_base(f"lerobot:{smolvla}").spec.noise.horizon
    with pytest.raises(DsrlError, match=f"executed_steps: expected 1 to the chunk's 2 steps, got {horizon // 2}"):
        load_base(f"lerobot:{smolvla}", config={"chunk_size": 2})  # LeRobot itself asks only when it reads the file
    with pytest.raises(DsrlError, match="the sampler's steps: expected 1 or more, got 0"):
        load_base(f"lerobot:{smolvla}", config={"num_steps": 0})


def test_a_policy_that_reads_an_environment_state_is_refused(tmp_path):
    pytest.importorskip("lerobot.policies")
    tiny_lerobot.save("diffusion", tmp_path)
    path = tmp_path / "config.json"
    tree = json.loads(path.read_text())
    tree["input_features"]["observation.environment_state"] = {"type": "ENV", "shape": [3]}
    path.write_text(json.dumps(tree))
    with pytest.raises(NotSteerableError, match="reads observation.environment_state, which no observation here"):
        load_base(f"lerobot:{tmp_path}")


def test_the_ddpm_remedy_works(tmp_path, observation):
    pytest.importorskip("lerobot.policies")
    tiny_lerobot.save("diffusion", tmp_path, noise_scheduler_type="DDPM", num_inference_steps=None)
    with pytest.raises(NotSteerableError, match="DDPM"):
        load_base(f"lerobot:{tmp_path}")
    base = load_base(f"lerobot:{tmp_path}", config={"noise_scheduler_type": "DDIM", "num_inference_steps": 4})
    assert probe(base, observation(base)).deterministic and base.spec.sampler_steps == 4


def test_cameras_can_go_by_the_tasks_names(smolvla, observation):
    plain = load_base(f"lerobot:{smolvla}")
    renamed = load_base(f"lerobot:{smolvla}", cameras={"behindGripper": "front"})
    assert list(renamed.spec.observation.cameras) == ["behindGripper", "wrist"]
    seen = observation(plain)
    theirs = dict(seen) | {"observation.images.behindGripper": seen["observation.images.front"]}
    assert torch.equal(plain.act(seen, seed=0), renamed.act(theirs, seed=0))
    with pytest.raises(DsrlError, match="base.cameras: expected cameras of the policy"):
        load_base(f"lerobot:{smolvla}", cameras={"a": "b"})
    with pytest.raises(DsrlError, match="a camera of its own for each of the policy's, got front, front"):
        load_base(f"lerobot:{smolvla}", cameras={"a": "front", "b": "front"})
    with pytest.raises(DsrlError, match="got 'wrist' twice. Name another for 'wrist', or for 'front'"):
        load_base(f"lerobot:{smolvla}", cameras={"wrist": "front"})  # half a swap


def test_cameras_that_changed_their_names_with_each_other_are_another_base(smolvla):
    """The policy sees other pictures, of cameras of the same names, under the same weights."""
    one, other = (load_base(f"lerobot:{smolvla}", cameras=c) for c in ({"a": "front", "b": "wrist"},
                                                                        {"b": "front", "a": "wrist"}))  # fmt: skip
    assert sorted(one.spec.observation.cameras) == sorted(other.spec.observation.cameras)
    assert one.fingerprint().processors != other.fingerprint().processors
    plain = load_base(f"lerobot:{smolvla}").fingerprint().processors
    assert "renamed cameras" not in plain  # a head trained before this was told fits


@pytest.mark.parametrize("kind", ["pi0", "smolvla"])
def test_a_policy_does_without_a_camera_that_its_code_can_do_without(kind, tmp_path, observation):
    pytest.importorskip("lerobot.policies")
    tiny_lerobot.save(kind, tmp_path)
    with tiny_lerobot.sizes(kind):
        full, fewer = (load_base(f"lerobot:{tmp_path}", absent=absent) for absent in ((), ("wrist",)))
    assert list(fewer.spec.observation.cameras) == ["front"]
    seen = observation(full)
    front = {k: v for k, v in seen.items() if k != "observation.images.wrist"}
    batch = fewer.preprocess(fewer._batch({k: np.asarray(v)[None] for k, v in front.items()}, 1))
    noise = fewer.spec.noise.sample(generators([0]))
    own = fewer.postprocess(fewer.split.policy.predict_action_chunk(batch, noise=noise[:, 0]))
    found = fewer.denoise(fewer.encode({k: [v] if k == "task" else v[None] for k, v in front.items()}), noise)
    assert torch.allclose(found[:, 0, : own.shape[1]], own, atol=1e-5)
    assert not torch.allclose(fewer.act(front, seed=0), full.act(seen, seed=0))
    with tiny_lerobot.sizes(kind), pytest.raises(DsrlError, match="base.absent: expected at most 1 of this policy's"):
        load_base(f"lerobot:{tmp_path}", absent=("front", "wrist"))
    with tiny_lerobot.sizes(kind), pytest.raises(DsrlError, match="base.absent: expected cameras of the policy: fro"):
        load_base(f"lerobot:{tmp_path}", absent=("left",))


def test_other_policies_need_all_their_cameras(tmp_path):
    pytest.importorskip("lerobot.policies")
    tiny_lerobot.save("xvla", tmp_path)
    with tiny_lerobot.sizes("xvla"), pytest.raises(DsrlError, match="base.absent: expected at most 0 of this policy"):
        load_base(f"lerobot:{tmp_path}", absent=("wrist",))


def test_actions_come_out_in_environment_units(smolvla, observation):
    base = load_base(f"lerobot:{smolvla}")
    raw = torch.zeros(1, 1, tiny_lerobot.ACTIONS)
    assert torch.allclose(base.postprocess(raw)[0, 0], tiny_lerobot.statistics()["action"]["mean"])


@pytest.mark.parametrize("kind", ["pi0", "smolvla", "xvla"])
def test_a_base_in_bfloat16_takes_float32_noise(kind, tmp_path, observation):
    pytest.importorskip("lerobot.policies")
    tiny_lerobot.save(kind, tmp_path)
    with tiny_lerobot.sizes(kind):
        full, half = (load_base(f"lerobot:{tmp_path}", dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert half.spec.dtype == "bfloat16" and any(p.dtype == torch.bfloat16 for p in half.model.parameters())
    report, seen = probe(half, observation(half)), observation(half)
    assert report.deterministic and report.noise_effect > 0
    assert half.encode(unsqueeze(seen)).feature.dtype == torch.float32
    apart = (half.act(seen, seed=0) - full.act(seen, seed=0)).abs().max()
    assert 0 < apart < 0.5 * report.noise_effect


@pytest.mark.parametrize("kind", ["pi0", "xvla"])
def test_float32_is_float32_whatever_the_checkpoint_says(kind, tmp_path):
    pytest.importorskip("lerobot.policies")
    tiny_lerobot.save(kind, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "bfloat16"}))
    with tiny_lerobot.sizes(kind):
        base = load_base(f"lerobot:{tmp_path}")
    assert base.spec.dtype == "float32" and {p.dtype for p in base.model.parameters()} == {torch.float32}


def test_a_policy_that_is_not_served_in_bfloat16_says_so(tmp_path):
    pytest.importorskip("lerobot.policies")
    tiny_lerobot.save("diffusion", tmp_path)
    with pytest.raises(DsrlError, match="base.dtype: expected float32 for a 'diffusion' policy, got bfloat16"):
        load_base(f"lerobot:{tmp_path}", dtype="bfloat16")


def test_unpacking_before_anything_was_encoded_is_refused(smolvla):
    with pytest.raises(DsrlError, match="unpack: expected an encoding to have been made"):
        load_base(f"lerobot:{smolvla}").unpack({})


def test_statistics_are_part_of_the_fingerprint(smolvla, tmp_path):
    """A policy normalised otherwise is another base, though its weights are the same."""
    from safetensors.torch import load_file, save_file

    moved = tmp_path / "moved"
    shutil.copytree(smolvla, moved)
    statistics = next(moved.glob("policy_preprocessor*normalizer*.safetensors"))
    save_file({k: v + 0.5 for k, v in load_file(statistics).items()}, statistics)
    mine, theirs = (load_base(f"lerobot:{folder}").fingerprint() for folder in (smolvla, moved))
    assert mine.weights == theirs.weights
    assert mine.processors["before NormalizerProcessorStep"] != theirs.processors["before NormalizerProcessorStep"]
