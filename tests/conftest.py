"""Bases and recipes that the tests share; all of them real, small and seeded."""

import functools
import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
import yaml

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def as_if_alone():
    """Training sets threads and torch's seed; what a test itself draws must not depend on which ran before."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


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
def episodes(fork_base):
    """Twelve recorded episodes of that base, some of which succeed."""
    from dsrl_vla.recording import record
    from dsrl_vla.rollout import TaskConfig
    from dsrl_vla.sources import PriorNoise

    return list(record(fork_base, TaskConfig("point:fork", 40, 1), PriorNoise(fork_base.spec.noise), range(12)))


@pytest.fixture
def head(fork_base):
    """A small untrained head for that base."""
    from dsrl_vla import SteeringHead
    from dsrl_vla.head import HeadConfig
    from dsrl_vla.networks import NetworkConfig
    from dsrl_vla.noise import NoiseLayout

    torch.manual_seed(0)
    layout = NoiseLayout(fork_base.spec.noise, "repeat", 1.5)
    return SteeringHead(HeadConfig.for_base(fork_base.spec, layout, NetworkConfig(width=16, layers=1)))


@pytest.fixture(scope="session")
def dppo_base(tmp_path_factory):
    """A checkpoint in DPPO's layout with random weights, loaded by the adapter."""
    from dppo_parts import save
    from dsrl_vla import load_base

    return load_base(f"dppo:{save(tmp_path_factory.mktemp('dppo'))}?suite=robomimic")


@pytest.fixture(scope="session")
def fork_folder(fork_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fork")
    fork_base.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_diffusion():
    """A small diffusion MLP whose weights are all random."""
    pytest.importorskip("diffusers")
    from dsrl_vla.adapters.diffusion import DiffusionMLP, DiffusionMLPConfig, DiffusionMLPModel, ddim

    torch.manual_seed(0)
    model = DiffusionMLPModel(DiffusionMLPConfig(5, 3, chunk=4, width=32, layers=2))
    with torch.no_grad():
        model.state_mean.fill_(0.1), model.action_high.fill_(2.0)
    return DiffusionMLP(model, ddim())


@pytest.fixture(scope="session")
def openpi_zoo(tmp_path_factory):
    """openpi's real models, tiny; skips where openpi is not."""
    pytest.importorskip("openpi.policies.policy")
    from openpi_parts import Zoo

    with pytest.MonkeyPatch.context() as patch:
        yield Zoo(tmp_path_factory.mktemp("openpi"), patch)


@pytest.fixture(scope="session")
def lerobot_folder(tmp_path_factory):
    """Makes the folder of a LeRobot policy type's tiny policy, saved by LeRobot; one per type."""
    pytest.importorskip("lerobot.policies")
    import tiny_lerobot

    @functools.cache
    def make(kind):
        folder = tmp_path_factory.mktemp(kind)
        tiny_lerobot.save(kind, folder)
        return folder

    return make


@pytest.fixture(scope="session")
def lerobot_base(lerobot_folder):
    """Makes the tiny base of a LeRobot policy type, loaded by the adapter; one per type."""
    import tiny_lerobot
    from dsrl_vla import load_base

    @functools.cache
    def make(kind):
        with tiny_lerobot.sizes(kind):
            return load_base(f"lerobot:{lerobot_folder(kind)}")

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


@pytest.fixture
def at_a_terminal():
    """Where the loss of a terminal is heard of, whatever the tests were started by: under nohup it is not."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
