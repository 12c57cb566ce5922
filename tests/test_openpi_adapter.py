"""The adapter `openpi:` over openpi's real models and `Policy`; `make openpi-env` makes the environment."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import torch
from dsrl_vla import SteeredPolicy, SteeringHead, load_recipe, train
from dsrl_vla.errors import DsrlError, NotSteerableError
from dsrl_vla.head import HeadConfig
from dsrl_vla.networks import NetworkConfig
from dsrl_vla.noise import NoiseLayout, generators
from dsrl_vla.observation import batch, unsqueeze

pytest.importorskip("openpi.policies.policy")
parts = pytest.importorskip("openpi_parts")

BASES, as_openpi = parts.BASES, parts.as_openpi
ONE_OF_EACH = ["openpi_jax_pi0_float32", "openpi_torch_pi05_float32"]


def infer(policy, observation, noise):
    return policy.infer(observation, noise=noise.numpy())["actions"].astype(np.float32)


@pytest.mark.parametrize("name", BASES)
def test_one_noise_is_bit_equal_to_infer_and_eight_are_close(name, openpi_zoo, observation):
    base, policy = openpi_zoo.base(name), openpi_zoo.policy(name)
    seen, noise = observation(base), base.spec.noise.sample(generators([0]), 8)
    theirs = np.stack([infer(policy, as_openpi(seen), one) for one in noise[0]])
    encoding = base.encode(unsqueeze(seen))
    assert np.array_equal(base.denoise(encoding, noise[:, :1])[0, 0].numpy(), theirs[0])
    together = base.denoise(encoding, noise)[0].numpy()
    # bfloat16 keeps 8 bits, and processors sum a batch in another order than one row: up to a spacing of the greatest
    spacing = 1e-5 if base.spec.dtype == "float32" else np.abs(theirs).max() * 2**-8
    assert np.abs(together - theirs).max() <= spacing
    assert np.abs(theirs[1:] - theirs[0]).max() > 0.1
    assert np.array_equal(base.act(seen, seed=0).numpy(), theirs[0][: base.spec.executed_steps])


@pytest.mark.parametrize("name", BASES)
def test_both_images_prompt_and_state_change_the_action(name, openpi_zoo, observation):
    base = openpi_zoo.base(name)
    seen = observation(base)
    before = base.act(seen, seed=0)
    for key, changed in {
        "observation.images.image": 255 - seen["observation.images.image"],
        "observation.images.image2": 255 - seen["observation.images.image2"],
        "observation.state": seen["observation.state"] + 0.5,
        "task": "push and close the window",
    }.items():
        assert (base.act(seen | {key: changed}, seed=0) - before).abs().max() > 1e-3, key


@pytest.mark.parametrize("name", BASES)
def test_the_spec_is_the_models_own(name, openpi_zoo):
    spec, config = openpi_zoo.base(name).spec, parts.make_config("pi05" in name)
    assert spec.noise.shape == (config.action_horizon, config.action_dim) == (8, 32)
    assert (spec.action_dim, sum(spec.noise.live), spec.executed_steps) == (7, 7, 5)
    assert (spec.sampler_steps, spec.feature_dim) == (10, 64)
    assert spec.dtype == name.rpartition("_")[2]
    assert spec.observation.state_dim == 8 and set(spec.observation.cameras) == {"image", "image2"}


def hidden_of_torch(policy, seen):
    """The prefix's hidden states, caught while openpi's own `infer` runs; and which tokens are not padding."""
    caught = []
    tower = policy._model.paligemma_with_expert.paligemma.language_model
    hook = tower.norm.register_forward_hook(lambda _, __, output: caught.append(output[0]))
    policy.infer(seen)
    hook.remove()
    return caught[0][0].float().numpy()


def hidden_of_jax(policy, seen):
    """The prefix's hidden states as one forward pass without cache or compilation gives them."""
    import jax.numpy as jnp
    from openpi.models import model as openpi_model
    from openpi.models.pi0 import make_attn_mask

    inputs = policy._input_transform(dict(seen))
    add = lambda tree: {k: add(v) for k, v in tree.items()} if isinstance(tree, dict) else jnp.asarray(tree)[None]
    tokens, mask, causal = policy._model.embed_prefix(openpi_model.Observation.from_dict(add(inputs)))
    positions = jnp.cumsum(mask, axis=1) - 1
    (hidden, _), _ = policy._model.PaliGemma.llm([tokens, None], positions, make_attn_mask(mask, causal))
    return np.asarray(hidden[0], np.float32)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_feature_is_the_mean_over_tokens_that_are_not_padding(name, openpi_zoo, observation):
    from dsrl_vla.adapters.openpi import OpenPi

    base, policy = openpi_zoo.base(name), openpi_zoo.policy(name)
    seen = observation(base)
    hidden = (hidden_of_jax if "jax" in name else hidden_of_torch)(policy, as_openpi(seen))
    prompt = policy._input_transform(as_openpi(seen))["tokenized_prompt_mask"]
    images = [True] * 64 + [True] * 64 + [False] * 64  # LIBERO has no right wrist camera: black, and masked
    real = np.concatenate([images, prompt])
    assert 0 < prompt.sum() < len(prompt)
    feature = base.encode(unsqueeze(seen)).feature[0].numpy()
    assert np.allclose(feature, hidden[real].mean(0), atol=1e-4)
    last = OpenPi(policy, pool="last_pad").encode(unsqueeze(seen)).feature[0].numpy()
    assert np.allclose(last, hidden[-1], atol=1e-4)
    assert not np.allclose(last, feature, atol=1e-2)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_decision_runs_the_prefix_once(name, openpi_zoo, observation, monkeypatch):
    base = openpi_zoo.base(name)
    head = SteeringHead(
        HeadConfig.for_base(base.spec, NoiseLayout(base.spec.noise), NetworkConfig(width=16, layers=1))
    )
    calls = []
    if "jax" in name:  # the compiled denoising gets no image, so a prefix pass is a call of the compiled prefix
        compiled = base.sampler._prefix
        monkeypatch.setattr(base.sampler, "_prefix", lambda *a: calls.append(1) or compiled(*a))
    else:
        tower = base.model.paligemma_with_expert.paligemma.language_model
        monkeypatch.setattr(tower, "forward", lambda *a, _f=tower.forward, **k: calls.append(1) or _f(*a, **k))
    SteeredPolicy(base, head).act(observation(base))
    assert len(calls) == 1
    encoding = base.encode(batch([observation(base, i) for i in range(2)]))
    base.denoise(encoding, base.spec.noise.sample(generators([0, 1]), 8))
    assert len(calls) == 2


@pytest.mark.parametrize(("pi05", "tokens"), [(False, 816), (True, 968)])
def test_at_full_size_the_compiled_parts_fit_together(pi05, tokens, openpi_zoo, monkeypatch):
    """By shapes alone: three billion weights are traced, none is made."""
    import jax
    import jax.numpy as jnp
    from dsrl_vla.adapters.openpi.jax_sampler import JaxSampler
    from flax import nnx
    from openpi.models import siglip
    from openpi.models.pi0_config import Pi0Config

    monkeypatch.setattr(siglip, "decode_variant", openpi_zoo.whole_tower)
    config = Pi0Config(pi05=pi05)
    sampler = JaxSampler(nnx.eval_shape(config.create, jax.random.key(0)), 10, "mean")
    assert sum(leaf.size for leaf in jax.tree.leaves(sampler._weights)) > 3.2e9
    seen, _ = config.inputs_spec(batch_size=2)
    feature, cache, mask = jax.eval_shape(sampler._prefix, sampler._weights, seen)
    assert feature.shape == (2, 2048) and feature.dtype == jnp.float32
    assert [(part.shape, part.dtype) for part in cache] == [((18, 2, tokens, 1, 256), jnp.bfloat16)] * 2
    rows, noise = jax.ShapeDtypeStruct((16,), jnp.int32), jax.ShapeDtypeStruct((16, 50, 32), jnp.float32)
    actions = jax.eval_shape(sampler._denoise, sampler._weights, cache, mask, seen.state, rows, noise)
    assert actions.shape == (16, 50, 32) and actions.dtype == jnp.float32


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_the_policys_own_number_of_steps_is_taken(framework, openpi_zoo, observation):
    from dsrl_vla.adapters.openpi import OpenPi

    policy = parts.make_policy(framework, False, "float32", sample_kwargs={"num_steps": 3})
    base = OpenPi(policy)
    seen, noise = observation(base), base.spec.noise.sample(generators([0]))
    assert base.spec.sampler_steps == 3
    ours = base.denoise(base.encode(unsqueeze(seen)), noise)
    assert np.array_equal(ours[0, 0].numpy(), infer(policy, as_openpi(seen), noise[0, 0]))
    more = OpenPi(policy, num_steps=4)
    assert more.spec.sampler_steps == 4 and not torch.equal(more.act(seen, seed=0), base.act(seen, seed=0))


def test_many_noises_go_through_in_portions(openpi_zoo, observation, monkeypatch):
    from dsrl_vla.adapters.openpi import sampling

    base = openpi_zoo.base("openpi_torch_pi0_float32")
    encoding = base.encode(batch([observation(base, i) for i in range(3)]))
    noise = base.spec.noise.sample(generators([0, 1, 2]), 5)
    whole = base.denoise(encoding, noise)
    monkeypatch.setattr(sampling, "ROWS_AT_ONCE", 4)
    assert torch.allclose(base.denoise(encoding, noise), whole, atol=1e-5)


def test_the_transforms_are_told_with_their_settings(openpi_zoo):
    told = openpi_zoo.base("openpi_torch_pi0_float32").processors()
    assert json.loads(json.dumps(told)) == told
    assert [name.rpartition(".")[2] for name in told if name.startswith("input.")] == [
        "LiberoInputs", "DeltaActions", "Normalize", "InjectDefaultPrompt", "ResizeImages", "TokenizePrompt",
        "PadStatesAndActions",
    ]  # fmt: skip
    normalise = next(settings for name, settings in told.items() if name.endswith(".Normalize"))
    assert normalise["norm_stats"]["state"]["mean"] == parts.make_statistics()["state"].mean.tolist()
    assert normalise["use_quantiles"] is False


def random_image(rng, shape=(48, 64, 3)):
    return rng.integers(0, 256, shape, dtype=np.uint8)


def droid(rng):
    images, state = [random_image(rng) for _ in range(2)], rng.normal(size=8).astype(np.float32)
    ours = {"exterior_1_left": images[0], "wrist_left": images[1]}
    return ours, state, {
        "observation/exterior_image_1_left": images[0], "observation/wrist_image_left": images[1],
        "observation/joint_position": state[:7], "observation/gripper_position": state[7:],
    }  # fmt: skip


def aloha(rng, names=("cam_high", "cam_left_wrist", "cam_right_wrist"), ours=None):
    images, state = [random_image(rng) for _ in names], rng.uniform(0.1, 0.9, size=14).astype(np.float32)
    theirs = {name: image.transpose(2, 0, 1) for name, image in zip(names, images, strict=True)}
    return dict(zip(ours or names, images, strict=True)), state, {"images": theirs, "state": state}


def aloha_sim(rng):
    return aloha(rng, ("cam_high",), ("top",))


@pytest.mark.parametrize(
    ("config", "example", "widths"),
    [
        ("pi0_droid", droid, (8, 8)),
        ("pi05_droid", droid, (8, 8)),
        ("pi0_aloha", aloha, (14, 14)),
        ("pi0_aloha_sim", aloha_sim, (14, 14)),
    ],
)
def test_openpis_own_configs_of_other_robots_get_their_keys(config, example, widths, openpi_zoo):
    from dsrl_vla.adapters.openpi import OpenPi
    from openpi.training.config import get_config

    data = get_config(config).data
    policy = parts.make_policy(
        "torch", "pi05" in config, "float32", data=data, statistics=parts.make_statistics(*widths)
    )
    base = OpenPi(policy, config=config)
    images, state, theirs = example(np.random.default_rng(0))
    seen = {f"observation.images.{name}": image for name, image in images.items()}
    seen |= {"observation.state": state, "task": "open the drawer"}
    noise = base.spec.noise.sample(generators([0]))
    ours = base.denoise(base.encode(unsqueeze(seen)), noise)[0, 0].numpy()
    assert ours.shape == (8, widths[1])
    assert np.array_equal(ours, infer(policy, theirs | {"prompt": "open the drawer"}, noise[0, 0]))
    assert base.spec.executed_steps == 8  # at most the horizon


def test_what_cannot_be_steered_or_understood_is_refused(openpi_zoo):
    from dsrl_vla.adapters.openpi import OpenPi
    from openpi.models.pi0_fast import Pi0FAST
    from openpi.policies.policy import Policy, PolicyRecorder

    policy = openpi_zoo.policy("openpi_torch_pi0_float32")
    recorder = PolicyRecorder.__new__(PolicyRecorder)
    with pytest.raises(DsrlError, match="expected an openpi.policies.policy.Policy, got PolicyRecorder"):
        OpenPi(recorder)
    fast = Policy.__new__(Policy)
    fast._model = Pi0FAST.__new__(Pi0FAST)
    with pytest.raises(NotSteerableError, match=r"got 'Pi0FAST', which is autoregressive.* pi0_droid in place of"):
        OpenPi(fast)
    for options, message in [
        ({"executed_steps": 9}, "executed_steps: expected 1 to the chunk's 8 steps, got 9"),
        ({"num_steps": 0}, "openpi num_steps: expected 1 or more"),
        ({"pool": "first"}, "openpi pool: expected mean or last_pad"),
    ]:
        with pytest.raises(DsrlError, match=message):
            OpenPi(policy, **options)
    noisy = Policy(policy._model, sample_kwargs={"noise": 0, "num_steps": 2}, is_pytorch=True)
    with pytest.raises(DsrlError, match="sample_kwargs hold num_steps alone, got noise too"):
        OpenPi(noisy)
    bare = Policy(policy._model, is_pytorch=True)
    with pytest.raises(DsrlError, match=r"an input transform among LiberoInputs.*got none. Declare the keys"):
        OpenPi(bare)


@dataclasses.dataclass(frozen=True)
class PointInputs:
    """A user's own robot: no camera, four numbers."""

    def __call__(self, data):
        black = np.zeros((224, 224, 3), np.uint8)
        names = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
        masks = dict.fromkeys(names, np.False_)
        return {
            "image": dict.fromkeys(names, black),
            "image_mask": masks,
            "state": data["point"],
            "prompt": data["prompt"],
        }


@dataclasses.dataclass(frozen=True)
class PointOutputs:
    def __call__(self, data):
        return {"actions": data["actions"][:, :2]}


def test_a_head_trains_on_a_policy_with_keys_of_its_own(openpi_zoo, tmp_path):
    from dsrl_vla.adapters.openpi import KeyMap, OpenPi
    from openpi import transforms
    from openpi.training.config import SimpleDataConfig

    group = transforms.Group(inputs=[PointInputs()], outputs=[PointOutputs()])
    data = SimpleDataConfig(repo_id="point", data_transforms=lambda _: group)
    policy = parts.make_policy("torch", False, "float32", data=data, statistics=parts.make_statistics(4, 2))
    base = OpenPi(policy, keys=KeyMap(cameras={}, state={("point",): 4}, executed_steps=4), uri="openpi:point")
    recipe = load_recipe("demo", {
        "task": {"uri": "point:fork", "max_episode_steps": 16, "num_envs": 4},
        "noise": {"columns": "all"},
        "head": {"network": {"width": 16, "layers": 1}}, "critic": {"network": {"width": 16, "layers": 1}},
        "sac": {"batch": 16}, "train": {"env_steps": 160, "learning_starts": 16, "gradient_steps": 1.0,
                                        "validate_every": 80, "validation_episodes": 2, "checkpoint_every": 80},
    })  # fmt: skip
    assert base.processors()["keys"] == {"cameras": {}, "state": [(("point",), 4)]}  # others are another base
    before = base.sha256()
    run = train(recipe, tmp_path / "run", base=base, evaluate_after=False)
    assert base.sha256() == before
    loaded = SteeringHead.from_pretrained(tmp_path / "run" / "best")
    assert loaded.config.adapter == "openpi" and loaded.layout.latent_shape == (1, 32)
    seen = {"observation.state": np.zeros(4, np.float32), "task": "go round the pillar to the goal"}
    assert torch.equal(SteeredPolicy(base, loaded).act(seen), SteeredPolicy(base, run.head).act(seen))
    assert pathlib.Path(tmp_path / "run" / "metrics.jsonl").stat().st_size
