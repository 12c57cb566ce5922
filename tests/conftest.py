"""Bases and recipes that the tests share; all of them real, small and seeded."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
import yaml

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread():
    """Training sets the number of threads; results must not depend on which test ran before."""
    torch.set_num_threads(1)


def randomised_pi0(cameras=("front", "wrist"), executed_steps=3, seed=0):
    """A tiny real π0 with two cameras whose weights are all random: a fresh one can ignore its inputs."""
    pytest.importorskip("transformers", minversion="5.4")
    from dsrl_vla.adapters.pi0_processing import Pi0Processing, Pi0Statistics
    from dsrl_vla.adapters.transformers_pi0 import TransformersPi0
    from dsrl_vla.nano.model import NanoConfig, build_model, build_tokenizer

    sizes = NanoConfig(image_size=32, vision_width=32, vision_layers=1, vlm_width=32, expert_width=32, layers=2,
                       heads=2, head_dim=16, chunk=6, max_action_dim=8, prompt_tokens=12)  # fmt: skip
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(["open the drawer", "push and close the window", "pick up the puck"])
    model = build_model(sizes, len(tokenizer), tokenizer.convert_tokens_to_ids("<image>"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    statistics = Pi0Statistics(
        cameras=cameras, image_size=32, image_seq_length=sizes.image_tokens, max_length=12,
        state_mean=(0.1,) * 5, state_std=(0.5,) * 5, actions_mean=(0.0, 0.1, 0.2), actions_std=(1.0, 0.5, 2.0),
        executed_steps=executed_steps,
    )  # fmt: skip
    processing = Pi0Processing(statistics, tokenizer, sizes.max_state_dim)
    return TransformersPi0(model, processing, uri="transformers:tiny")


@pytest.fixture(scope="session")
def tiny_pi0():
    return randomised_pi0()


@pytest.fixture(scope="session")
def tiny_pi0_bf16(tiny_pi0, tmp_path_factory):
    from dsrl_vla import load_base

    folder = tmp_path_factory.mktemp("tiny")
    tiny_pi0.model.save_pretrained(folder)
    tiny_pi0.processing.tokenizer.save_pretrained(folder)
    tiny_pi0.processing.statistics.save(folder)
    return load_base(f"transformers:{folder}", dtype="bfloat16")


@pytest.fixture(scope="session")
def nano():
    from dsrl_vla import load_base

    pytest.importorskip("transformers", minversion="5.4")
    return load_base("nano:")


@pytest.fixture(scope="session")
def fork_base():
    """A flow MLP cloned on demonstrations that pass the pillar on either side, one of which is walled off."""
    from dsrl_vla.adapters.flow_mlp import FlowMLP, FlowMLPConfig, clone_flow_mlp
    from dsrl_vla.tasks.point import demonstrate

    episodes = [demonstrate(seed) for seed in range(150)]
    return FlowMLP(clone_flow_mlp(episodes, FlowMLPConfig(4, 2), steps=1200))


@pytest.fixture(scope="session")
def fork_folder(fork_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fork")
    fork_base.save_pretrained(folder)
    return folder


OPENPI = {
    f"openpi_{framework}_{model}_{dtype}": (framework, model == "pi05", dtype)
    for framework in ("jax", "torch") for model in ("pi0", "pi05") for dtype in ("float32", "bfloat16")
}  # fmt: skip


class OpenPiZoo:
    """openpi's real models and `Policy`, tiny and randomised, each built once."""

    def __init__(self, folder):
        from openpi.models import siglip

        self.folder, self.policies, self.bases = folder, {}, {}
        self.whole_tower = siglip.decode_variant

    def policy(self, name):
        if name not in self.policies:
            self.policies[name] = self.build(*OPENPI[name])
        return self.policies[name]

    def base(self, name):
        from dsrl_vla.adapters.openpi import OpenPi

        if name not in self.bases:
            self.bases[name] = OpenPi(self.policy(name), uri=f"openpi:{name}")
        return self.bases[name]

    def build(self, *arguments, **options):
        return tiny_openpi_policy(*arguments, **options)

    config = staticmethod(lambda *arguments: tiny_openpi_config(*arguments))
    model = staticmethod(lambda *arguments: tiny_openpi_model(*arguments))
    data = staticmethod(lambda pi05: libero_data_config(pi05))
    statistics = staticmethod(lambda *sizes: openpi_statistics(*sizes))


@pytest.fixture(scope="session")
def openpi_zoo(tmp_path_factory):
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # openpi's PyTorch model compiles itself, which takes minutes on a CPU
    pytest.importorskip("openpi.policies.policy")
    folder = tmp_path_factory.mktemp("openpi")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENPI_DATA_HOME", str(folder))
        write_paligemma_tokenizer(folder / "big_vision" / "paligemma_tokenizer.model")
        zoo = OpenPiZoo(folder)
        shrink_vision_towers(patch)
        yield zoo


def shrink_vision_towers(patch):
    """openpi's "dummy" sizes shrink the language models alone; its vision tower would stay 400 million weights."""
    from openpi.models import siglip
    from openpi.models_pytorch import gemma_pytorch

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


def write_paligemma_tokenizer(path):
    """A small tokenizer of PaliGemma's kind, in the place where openpi keeps the downloaded one."""
    import io

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


def tiny_openpi_config(pi05, dtype="bfloat16"):
    from openpi.models.pi0_config import Pi0Config

    return Pi0Config(
        paligemma_variant="dummy", action_expert_variant="dummy", pi05=pi05, dtype=dtype, action_horizon=8,
        max_token_len=128 if pi05 else 24,
    )  # fmt: skip


def tiny_openpi_model(framework, config, seed=0):
    """openpi's own class, all weights random: a freshly made one is blind to its images or its whole prefix."""
    import numpy as np

    rng = np.random.default_rng(seed)
    if framework == "torch":
        from openpi.models_pytorch.pi0_pytorch import PI0Pytorch

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


def openpi_statistics(state=8, actions=7):
    """Of a state and of actions; by default as wide as LIBERO's."""
    import numpy as np
    from openpi.shared.normalize import NormStats

    def make(size):
        mean, std = np.linspace(-0.2, 0.2, size), np.linspace(0.5, 1.5, size)
        return NormStats(mean=mean, std=std, q01=mean - 2 * std, q99=mean + 2 * std)

    return {"state": make(state), "actions": make(actions)}


def libero_data_config(pi05):
    from openpi.training.config import AssetsConfig, LeRobotLiberoDataConfig

    return LeRobotLiberoDataConfig(
        repo_id="tiny/libero", assets=AssetsConfig(asset_id="libero"), extra_delta_transform=not pi05
    )


def tiny_openpi_policy(framework, pi05, dtype, data=None, statistics=None, **options):
    """The real `Policy`, put together as `create_trained_policy` does; by default with openpi's LIBERO transforms."""
    import pathlib

    from openpi import transforms
    from openpi.policies.policy import Policy

    config = tiny_openpi_config(pi05, dtype)
    data = (data or libero_data_config(pi05)).create(pathlib.Path("none"), config)
    statistics, quantiles = statistics or openpi_statistics(), data.use_quantile_norm
    return Policy(
        tiny_openpi_model(framework, config),
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


@pytest.fixture(scope="session")
def lerobot_base(tmp_path_factory):
    """Makes the tiny base of a LeRobot policy type, saved by LeRobot and loaded by the adapter; one per type."""
    pytest.importorskip("lerobot.policies")
    import tiny_lerobot
    from dsrl_vla import load_base

    made = {}

    def make(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            tiny_lerobot.save(kind, folder)
            with tiny_lerobot.sizes(kind):
                made[kind] = load_base(f"lerobot:{folder}")
        return made[kind]

    return make


@pytest.fixture
def fork_recipe(fork_folder, tmp_path):
    """A recipe file that trains in seconds."""
    tree = {
        "name": "fork",
        "base": {"uri": f"flow-mlp:{fork_folder}"},
        "task": {"uri": "point:fork", "max_episode_steps": 40, "num_envs": 8},
        "head": {"network": {"width": 32, "layers": 1}},
        "critic": {"network": {"width": 32, "layers": 1}},
        "sac": {"batch": 64},
        "train": {"env_steps": 1200, "learning_starts": 64, "gradient_steps": 0.5, "validate_every": 400,
                  "validation_episodes": 8, "checkpoint_every": 400},
        "eval": {"episodes": 10, "video_episodes": 1},
    }  # fmt: skip
    path = tmp_path / "fork.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def observation():
    """Makes a random observation that fits a base."""
    import numpy as np

    def make(base, seed=0, size=None, prompt="open the drawer"):
        rng = np.random.default_rng(seed)
        spec = base.spec.observation
        made = {"observation.state": rng.normal(size=spec.state_dim).astype(np.float32)}
        for name, shape in spec.cameras.items():
            height, width = size or (shape[:2] if shape else (64, 64))
            made[f"observation.images.{name}"] = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        return made | ({"task": prompt} if spec.prompt else {})

    return make


@pytest.fixture(scope="session")
def served():
    """Serves a base from a thread until the tests end: served(base, head=None, **config) -> the server."""
    from dsrl_vla.serving.server import PolicyServer, ServerConfig
    from dsrl_vla.serving.service import Service

    servers = []

    def start(base, head=None, **config):
        servers.append(PolicyServer(Service(base, head), ServerConfig(port=0, **config)).start())
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def remote_pi0(tiny_pi0, served):
    from dsrl_vla import load_base

    base = load_base("remote:" + served(tiny_pi0).uri)
    yield base
    base.close()


@pytest.fixture(scope="session")
def remote_fork(fork_base, served):
    from dsrl_vla import load_base

    base = load_base("remote:" + served(fork_base).uri)
    yield base
    base.close()
