"""openpi's real models and `Policy`, tiny and randomised; for its environment (`make openpi-env`)."""

import io
import os
import pathlib

import numpy as np
import torch

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # openpi's PyTorch model compiles itself, which takes minutes on a CPU

from dsrl_vla.adapters.openpi import OpenPi
from openpi import transforms
from openpi.models import siglip
from openpi.models.pi0_config import Pi0Config
from openpi.models_pytorch import gemma_pytorch
from openpi.models_pytorch.pi0_pytorch import PI0Pytorch
from openpi.policies.policy import Policy
from openpi.shared.normalize import NormStats
from openpi.training.config import AssetsConfig, LeRobotLiberoDataConfig

FRAMEWORKS, MODELS, DTYPES = ("jax", "torch"), ("pi0", "pi05"), ("float32", "bfloat16")
BASES = [f"openpi_{framework}_{model}_{dtype}" for framework in FRAMEWORKS for model in MODELS for dtype in DTYPES]
"""Names of everything the zoo holds."""


class Zoo:
    """Each policy is built once. Vision towers are small as long as `patch` lasts."""

    def __init__(self, folder, patch):
        self.folder, self.policies, self.bases = folder, {}, {}
        self.whole_tower = siglip.decode_variant
        patch.setenv("OPENPI_DATA_HOME", str(folder))
        write_paligemma_tokenizer(folder / "big_vision" / "paligemma_tokenizer.model")
        shrink_vision_towers(patch)

    def policy(self, name):
        if name not in self.policies:
            _, framework, model, dtype = name.split("_")
            self.policies[name] = make_policy(framework, model == "pi05", dtype)
        return self.policies[name]

    def base(self, name):
        if name not in self.bases:
            self.bases[name] = OpenPi(self.policy(name), uri=f"openpi:{name}")
        return self.bases[name]


def write_paligemma_tokenizer(path):
    """A small tokenizer of PaliGemma's kind, in the place where openpi keeps the downloaded one."""
    import sentencepiece

    words = [
        "open the drawer",
        "push and close the window",
        "pick up the black bowl",
        "Task: , State: 0 1 2;",
        "Action",
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 20), model_writer=model, vocab_size=320, model_type="bpe", byte_fallback=True,
        minloglevel=2,
    )  # fmt: skip
    path.parent.mkdir()
    path.write_bytes(model.getvalue())


def shrink_vision_towers(patch):
    """openpi's "dummy" sizes shrink the language models alone; its vision tower would stay 400 million weights."""
    whole = gemma_pytorch.PaliGemmaForConditionalGeneration

    def small(config):
        vision = config.vision_config
        vision.hidden_size, vision.intermediate_size, vision.num_attention_heads = 32, 64, 2
        vision.num_hidden_layers, vision.patch_size = 1, 28
        vision.projection_dim = config.text_config.hidden_size
        return whole(config=config)

    tower = {"width": 32, "depth": 1, "mlp_dim": 64, "num_heads": 2, "patch_size": (28, 28)}
    patch.setattr(siglip, "decode_variant", lambda _: tower)
    patch.setattr(gemma_pytorch, "PaliGemmaForConditionalGeneration", small)


def make_config(pi05, dtype="bfloat16"):
    return Pi0Config(
        paligemma_variant="dummy", action_expert_variant="dummy", pi05=pi05, dtype=dtype, action_horizon=8,
        max_token_len=128 if pi05 else 24,
    )  # fmt: skip


def make_model(framework, config, seed=0):
    """openpi's own class, all weights random: a freshly made one is blind to its images or its whole prefix."""
    rng = np.random.default_rng(seed)
    if framework == "torch":
        torch.manual_seed(seed)
        model = PI0Pytorch(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.from_numpy(0.05 * rng.standard_normal(parameter.shape, dtype=np.float32)))
        return model
    import jax
    import jax.numpy as jnp
    from flax import nnx

    def draw(leaf):
        scale = 0.3 if leaf.ndim < 2 else leaf.shape[-2] ** -0.5
        return jnp.asarray(scale * rng.standard_normal(leaf.shape, dtype=np.float32), config.dtype)

    graph, shapes = nnx.split(nnx.eval_shape(config.create, jax.random.key(seed)))
    return nnx.merge(graph, jax.tree.map(draw, shapes))


def make_statistics(state=8, actions=7):
    """Of a state and of actions; by default as wide as LIBERO's."""

    def make(size):
        mean, std = np.linspace(-0.2, 0.2, size), np.linspace(0.5, 1.5, size)
        return NormStats(mean=mean, std=std, q01=mean - 2 * std, q99=mean + 2 * std)

    return {"state": make(state), "actions": make(actions)}


def libero_data(pi05):
    return LeRobotLiberoDataConfig(
        repo_id="tiny/libero", assets=AssetsConfig(asset_id="libero"), extra_delta_transform=not pi05
    )


def make_policy(framework, pi05, dtype, data=None, statistics=None, **options):
    """The real `Policy`, put together as `create_trained_policy` does; by default with openpi's LIBERO transforms."""
    config = make_config(pi05, dtype)
    data = (data or libero_data(pi05)).create(pathlib.Path("none"), config)
    statistics, quantiles = statistics or make_statistics(), data.use_quantile_norm
    return Policy(
        make_model(framework, config),
        transforms=[
            *data.data_transforms.inputs,
            transforms.Normalize(statistics, use_quantiles=quantiles),
            *data.model_transforms.inputs,
        ],
        output_transforms=[
            *data.model_transforms.outputs,
            transforms.Unnormalize(statistics, use_quantiles=quantiles),
            *data.data_transforms.outputs,
        ],
        is_pytorch=framework == "torch",
        **options,
    )


def as_openpi(observation):
    """An observation of ours, in the words of openpi's LIBERO example."""
    return {
        "observation/state": observation["observation.state"],
        "observation/image": observation["observation.images.image"],
        "observation/wrist_image": observation["observation.images.image2"],
        "prompt": observation["task"],
    }
