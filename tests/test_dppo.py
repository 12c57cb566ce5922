import pickle
import shutil

import numpy as np
import pytest
import torch
from dppo_parts import ACTION, CHUNK, STATE, mish, reference, relu, save, tensors
from dsrl_vla import load_base
from dsrl_vla.errors import DsrlError

KINDS = [
    {},
    {"residual": True, "norm": True, "depth": 5},
    {"residual": False},
    {"residual": False, "norm": True, "condition": (9, 7)},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("suite", "act", "steps"), [("robomimic", mish, 8), ("gym", relu, 5)])
def test_actions_are_those_of_an_independent_computation(tmp_path, kind, suite, act, steps):
    weights = tensors(**kind)
    base = load_base(f"dppo:{save(tmp_path, weights)}?suite={suite}")
    assert base.spec.noise.shape == (CHUNK, ACTION) and base.spec.executed_steps == CHUNK
    assert base.spec.sampler_steps == steps
    rng = np.random.default_rng(1)
    states, noise = rng.normal(size=(3, STATE)).astype(np.float32), rng.normal(size=(3, 2, CHUNK, ACTION))
    noise = noise.astype(np.float32)
    got = base.denoise(base.encode({"observation.state": states}), torch.from_numpy(noise)).numpy()
    want = [[reference(weights, s, w, act, steps) for w in ws] for s, ws in zip(states, noise, strict=True)]
    assert np.abs(got - np.array(want)).max() < 2e-4
    inside = (got > [-0.99, -1.98, -2.97]) & (got < 0.99)
    assert 0.05 < inside.mean() < 1  # some are clamped, not all: the comparison says something about both


def test_options_choose_weights_steps_and_activation(tmp_path):
    path, weights = save(tmp_path), tensors()
    state, noise = np.zeros((1, STATE), dtype=np.float32), torch.randn(1, 1, CHUNK, ACTION)
    query = "suite=robomimic&weights=ema&ddim_steps=10&denoising_steps=100&activation=ReLU"
    base = load_base(f"dppo:{path}?{query}")
    got = base.denoise(base.encode({"observation.state": state}), noise)[0, 0].numpy()
    scaled = {k: 0.9 * v for k, v in weights.items()}
    assert np.abs(got - reference(scaled, state[0], noise[0, 0].numpy(), relu, 10, 100)).max() < 2e-4
    assert base.processors()["sampler"]["ddim_steps"] == 10


def test_a_folder_gives_its_newest_checkpoint(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    for number, seed in ((900, 1), (5000, 2)):
        save(tmp_path / "checkpoint", tensors(seed=seed), f"state_{number}.pt")
    shutil.move(tmp_path / "checkpoint" / "normalization.npz", tmp_path)
    base = load_base(f"dppo:{tmp_path}?suite=gym")
    newest = load_base(f"dppo:{tmp_path / 'checkpoint' / 'state_5000.pt'}?suite=gym")
    assert base.sha256() == newest.sha256()


def test_what_does_not_fit_is_refused_with_a_sentence(tmp_path):
    path = save(tmp_path)

    def refused(match, query="suite=gym"):
        with pytest.raises(DsrlError, match=match):
            load_base(f"dppo:{path}?{query}")

    refused("expected '.suite=robomimic' or '.suite=gym' behind the path", "")
    refused("dppo ddim_steps: expected 1 to denoising_steps", "suite=gym&ddim_steps=21")
    refused("dppo option.ddim_steps: expected int, got", "suite=gym&ddim_steps=²")
    refused("dppo activation: expected Mish", "suite=gym&activation=Sine")
    for broken, match in [
        ({k: v for k, v in tensors().items() if "l2" not in k}, "expected the weights of a DiffusionMLP"),
        (tensors() | {"extra.weight": np.zeros(2)}, "differs in extra.weight"),
        (
            tensors() | {"mlp_mean.layers.0.weight": np.zeros((12, 2 * STATE + 28))},
            "expected one observation of width",
        ),
        ({}, "expected tensors named 'network"),
    ]:
        save(tmp_path, broken)
        refused(match)
    torch.save({"state_dict": {}}, path)
    refused("expected a DPPO checkpoint, with 'epoch', 'model' and 'ema'")
    torch.save({"model": {"actor_ft.x.weight": torch.zeros(1)}}, path)
    refused("Fine-tuned checkpoints")
    save(tmp_path)
    (tmp_path / "normalization.npz").unlink()
    refused("normalization.npz, got none")
    np.savez(tmp_path / "normalization.npz", obs_min=np.zeros(STATE))
    refused("expected an npz file with obs_min, obs_max")
    sound = {"obs_min": np.zeros(STATE), "obs_max": np.ones(STATE)}
    for low in (np.full(ACTION, np.nan), np.full(ACTION, 2.0), np.full(ACTION, -np.inf)):  # what scales an action
        np.savez(tmp_path / "normalization.npz", **sound, action_min=low, action_max=np.ones(ACTION))
        refused("action_min, action_max: expected finite vectors, min no more than max")


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("touched").touch, ())

    path = save(tmp_path)
    for write in (torch.save, lambda value, where: where.write_bytes(pickle.dumps(value))):
        write({"epoch": 1, "model": Evil(), "ema": {}}, path)
        with pytest.raises(DsrlError, match="expected a torch checkpoint of tensors alone"):
            load_base(f"dppo:{path}?suite=gym")
    assert not (tmp_path / "touched").exists()
