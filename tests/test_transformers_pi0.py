import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import randomised_pi0
from dsrl_vla import load_base
from dsrl_vla.adapters.pi0_attention import attend, heads_as_one, sharing
from dsrl_vla.adapters.pi0_cache import spread
from dsrl_vla.adapters.pi0_sampling import fan_out
from dsrl_vla.errors import DsrlError, MissingExtraError, NotSteerableError
from dsrl_vla.noise import generators
from dsrl_vla.observation import batch
from transformers import DynamicCache


def save(base, folder):
    base.model.save_pretrained(folder)
    base.processing.tokenizer.save_pretrained(folder)
    base.processing.statistics.save(folder)
    return folder


@pytest.mark.parametrize("name", ["tiny_pi0", "tiny_pi0_bf16", "nano"])
def test_one_noise_is_bit_equal_to_the_models_own_sampler(name, request, observation):
    base = request.getfixturevalue(name)
    observations = batch([observation(base, i) for i in range(2)])
    noise = base.spec.noise.sample(generators([0, 1]))
    ours = base.denoise(base.encode(observations), noise)
    inputs = base.processing(observations, base.model.device, base.model.dtype)
    theirs = base.model.sample_actions(noise=noise[:, 0].to(base.model.dtype), **inputs)
    assert torch.equal(ours[:, 0], base.processing.actions(theirs))


def test_a_decision_with_eight_noises_runs_the_prefix_once(tiny_pi0, observation):
    calls = []
    hook = tiny_pi0.model.model.vlm.register_forward_hook(lambda *_: calls.append(1))
    encoding = tiny_pi0.encode(batch([observation(tiny_pi0)]))
    tiny_pi0.denoise(encoding, tiny_pi0.spec.noise.sample(generators([0]), 8))
    hook.remove()
    assert len(calls) == 1


def test_noises_behind_prompts_of_different_lengths_equal_separate_calls(tiny_pi0, observation):
    prompts = ("open the drawer", "push and close the window")
    encoding = tiny_pi0.encode(batch([observation(tiny_pi0, prompt=p) for p in prompts]))
    noise = tiny_pi0.spec.noise.sample(generators([0, 1]), 3)
    together = tiny_pi0.denoise(encoding, noise)
    apart = torch.cat([tiny_pi0.denoise(encoding, noise[:, i : i + 1]) for i in range(3)], 1)
    assert torch.allclose(together, apart, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_heads_asking_as_one_find_what_transformers_finds(groups):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layer, generator = torch.nn.Identity(), torch.Generator().manual_seed(0)
    layer.num_key_value_groups = 8 // groups
    draw = lambda *shape: torch.randn(shape, generator=generator)
    query, key, value = draw(6, 5, 8, 4).transpose(1, 2), draw(6, groups, 9, 4), draw(6, groups, 9, 4)
    mask = (draw(2, 1, 5, 9) > -0.5).repeat_interleave(3, 0)
    with sharing(3):
        ours, _ = attend(layer, query, key, value, mask, scaling=0.5)
    theirs, _ = sdpa_attention_forward(layer, query, key, value, mask, scaling=0.5)
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert torch.equal(attend(layer, query, key, value, mask, scaling=0.5)[0], theirs)


def test_the_cache_with_room_holds_what_transformers_would_join():
    rows, groups, length, size = 2, 1, 7, 4
    prefix = DynamicCache()
    for layer in range(2):
        prefix.update(torch.randn(rows, groups, length, size), torch.randn(rows, groups, length, size), layer)
    before = [layer.keys.clone() for layer in prefix.layers]
    joined, roomy = fan_out(prefix, 3), spread([(layer.keys, layer.values) for layer in prefix.layers], 3)
    for step in (5, 5, 2):
        for layer in range(2):
            new = torch.randn(2, rows * 3, groups, step, size)
            expected, found = joined.update(*new, layer), roomy.update(*new, layer)
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
            assert roomy.get_seq_length(layer) == length + step
        for cache in (joined, roomy):
            cache.crop(length - cache.get_seq_length())
    assert all(torch.equal(layer.keys, kept) for layer, kept in zip(prefix.layers, before, strict=True))


def test_the_attention_for_many_noises_is_of_its_thread_alone(tiny_pi0, observation):
    encoding = tiny_pi0.encode(batch([observation(tiny_pi0)]))
    noise = tiny_pi0.spec.noise.sample(generators([0]))
    alone = tiny_pi0.denoise(encoding, noise)
    with heads_as_one(tiny_pi0.model, 3), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(tiny_pi0.denoise, encoding, noise).result(), alone)
    assert torch.equal(tiny_pi0.denoise(encoding, noise), alone)


def test_the_feature_does_not_see_padding(tiny_pi0, observation):
    short, long = (observation(tiny_pi0, prompt=p) for p in ("open the drawer", "push and close the window"))
    together = tiny_pi0.encode(batch([short, long])).feature
    assert not torch.allclose(together[0], together[1])
    assert torch.allclose(tiny_pi0.encode(batch([short])).feature[0], together[0], atol=1e-5)


def test_the_prompt_is_formatted_as_the_upstream_processor_does(tiny_pi0, observation):
    inputs = tiny_pi0.processing(batch([observation(tiny_pi0)]), torch.device("cpu"), torch.float32)
    tokenizer, images = tiny_pi0.processing.tokenizer, 2 * 4
    expected = ["<image>"] * images + ["<bos>", "open", "the", "drawer"]
    assert tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])[: len(expected)] == expected
    assert inputs["attention_mask"][0].sum() == len(expected)
    assert inputs["pixel_values"].shape == (1, 2, 3, 32, 32)


def test_states_and_actions_are_normalised_as_upstream(tiny_pi0):
    state = torch.tensor([[0.1, 0.6, -0.4, 0.1, 0.1]])
    normal = tiny_pi0.processing.state(state)
    assert torch.allclose(normal[0, :5], torch.tensor([0.0, 1.0, -1.0, 0.0, 0.0]), atol=1e-6)
    assert (normal[0, 5:] == 0).all()
    actions = torch.rand(2, 6, 3)
    there = tiny_pi0.processing.normalise_actions(actions, 8)
    assert torch.allclose(tiny_pi0.processing.actions(there), actions, atol=1e-6)


def test_a_prompt_that_is_too_long_is_refused(tiny_pi0, observation):
    with pytest.raises(DsrlError, match="task: expected at most 12 tokens"):
        tiny_pi0.encode(batch([observation(tiny_pi0, prompt="open " * 30)]))


def test_a_prompt_with_an_images_own_mark_is_refused(tiny_pi0, observation):
    with pytest.raises(DsrlError, match="task: expected words without '<image>'"):
        tiny_pi0.encode(batch([observation(tiny_pi0, prompt="open <image> now")]))


def test_the_tokens_of_prompts_are_not_kept_without_end(tiny_pi0):
    for number in range(200):
        tiny_pi0.processing._tokens(f"open {number}")
    assert len(tiny_pi0.processing._prompts) == 64


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_loads_and_acts_the_same(tiny_pi0, tiny_pi0_bf16, tmp_path, observation, dtype):
    original = tiny_pi0 if dtype == "float32" else tiny_pi0_bf16
    loaded = load_base(f"transformers:{save(tiny_pi0, tmp_path)}", dtype=dtype)
    seen, tolerance = observation(original), 1e-5 if dtype == "float32" else 0.1
    assert loaded.sha256() == original.sha256()  # the actions differ in the last bit by how memory is aligned
    assert torch.allclose(loaded.act(seen, seed=0), original.act(seen, seed=0), atol=tolerance)
    assert loaded.spec.dtype == dtype
    assert replace(loaded.spec, uri="") == replace(original.spec, uri="")


def test_missing_statistics_are_named_and_can_be_passed(tiny_pi0, tmp_path, observation):
    save(tiny_pi0, tmp_path)
    path = tmp_path / "processor_config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in raw.items() if k not in ("actions_mean", "cameras")}))
    with pytest.raises(DsrlError, match="no cameras, actions_mean"):
        load_base(f"transformers:{tmp_path}")
    extra = {"actions_mean": [0.0, 0.1, 0.2], "cameras": ["front", "wrist"]}
    base = load_base(f"transformers:{tmp_path}", statistics=extra)
    seen = observation(base)
    assert torch.allclose(base.act(seen, seed=0), tiny_pi0.act(seen, seed=0), atol=1e-5)
    with pytest.raises(DsrlError, match="unknown key of `statistics` 'action_mean'. Did you mean 'actions_mean'"):
        load_base(f"transformers:{tmp_path}", statistics={"action_mean": [5.0]})


def test_a_model_put_in_anothers_place_has_a_fingerprint_of_its_own(tiny_pi0):
    base, other = randomised_pi0(), randomised_pi0(seed=1)
    assert base.fingerprint() == tiny_pi0.fingerprint()
    base.model = other.model
    assert base.fingerprint().weights == other.fingerprint().weights != tiny_pi0.fingerprint().weights


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "diffusion", "noise_scheduler_type": "DDPM"}, "noise_scheduler_type=DDIM"),
        ({"model_type": "pi0_fast"}, "autoregressive 'pi0_fast'"),
        ({"type": "act"}, "do not come out of a sampler"),
    ],
)
def test_policies_that_cannot_be_steered_are_refused_before_loading(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotSteerableError, match=message):
        load_base(f"transformers:{tmp_path}")


def test_wrong_sources_are_refused(tmp_path):
    with pytest.raises(DsrlError, match=r"base: expected an existing folder or a Hub repository"):
        load_base("transformers:/no/such/folder")
    with pytest.raises(DsrlError, match=r"expected a config.json"):
        load_base(f"transformers:{tmp_path}")
    with pytest.raises(DsrlError, match=r"base.dtype: expected float32 or bfloat16, got 'float16'"):
        load_base("nano:", dtype="float16")
    (tmp_path / "config.json").write_text('{"model_type": "smolvla"}')
    with pytest.raises(DsrlError, match="expected model_type 'pi0', got 'smolvla'"):
        load_base(f"transformers:{tmp_path}")


def test_a_repository_that_cannot_be_fetched_is_named(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(DsrlError, match="a repository 'owner/name' that can be fetched or is in the cache, got no fo"):
        load_base("transformers:owner/name@v1")


def test_a_missing_extra_names_the_command(monkeypatch, tiny_pi0, tmp_path):
    import sys

    save(tiny_pi0, tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'dsrl-vla\[transformers\]'"):
        load_base(f"transformers:{tmp_path}")


def test_images_are_read_in_the_declared_order(tiny_pi0, observation):
    seen = observation(tiny_pi0)
    swapped = dict(seen)
    swapped["observation.images.front"] = seen["observation.images.wrist"]
    swapped["observation.images.wrist"] = seen["observation.images.front"]
    assert not np.allclose(tiny_pi0.act(seen, seed=0), tiny_pi0.act(swapped, seed=0))


def test_weights_named_as_another_transformers_does_are_found_and_missing_ones_refused(
    tiny_pi0, tmp_path, observation
):
    """transformers fills what it does not find with random numbers, and says so in a warning."""
    from safetensors.torch import load_file, save_file

    save(tiny_pi0, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    old, new = "vision_tower.vision_model.", "vision_tower."
    for here in (new, old):
        renamed = {k.replace(old, new).replace(new, here): v for k, v in weights.items()}
        assert len(renamed) == len(weights)
        save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
        base = load_base(f"transformers:{tmp_path}")
        assert base.sha256() == tiny_pi0.sha256()
        seen = observation(base)
        assert torch.allclose(base.act(seen, seed=0), tiny_pi0.act(seen, seed=0), atol=1e-5)
    weights.pop(sorted(weights)[0])
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(DsrlError, match=r"weights: expected the model's own, all of them, got 1 missing or unknown"):
        load_base(f"transformers:{tmp_path}")
