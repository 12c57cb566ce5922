"""Loading openpi's checkpoints by its config names, against openpi's own `create_trained_policy`."""

import numpy as np
import pytest
import torch
from dsrl_vla import load_base
from dsrl_vla.errors import DsrlError, NotSteerableError, UnknownNameError
from dsrl_vla.noise import generators
from dsrl_vla.observation import unsqueeze

pytest.importorskip("openpi.policies.policy")
parts = pytest.importorskip("openpi_parts")


@pytest.fixture(scope="module")
def registered(openpi_zoo):
    """A config of openpi's, under the name that users give: `tiny_libero`."""
    from openpi.training import config as configs

    config = configs.TrainConfig(
        name="tiny_libero", model=parts.make_config(False), data=parts.libero_data(False),
        assets_base_dir=str(openpi_zoo.folder / "assets"),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(configs._CONFIGS_DICT, config.name, config)
        yield config


@pytest.fixture(scope="module", params=["jax", "torch"])
def checkpoint(request, openpi_zoo):
    """A checkpoint folder as openpi writes it: weights in float32, and statistics."""
    from openpi.shared import normalize

    folder = openpi_zoo.folder / f"checkpoint_{request.param}"
    normalize.save(folder / "assets" / "libero", parts.make_statistics())
    model = parts.make_model(request.param, parts.make_config(False, "float32"))
    if request.param == "torch":
        from safetensors.torch import save_model

        save_model(model, str(folder / "model.safetensors"))
    else:
        import orbax.checkpoint
        from flax import nnx

        with orbax.checkpoint.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(folder / "params", {"params": nnx.state(model).to_pure_dict()})
    return folder


def test_a_checkpoint_loads_as_openpi_loads_it(checkpoint, registered, observation):
    from openpi.policies.policy_config import create_trained_policy

    base = load_base(f"openpi:tiny_libero@{checkpoint}?executed_steps=4")
    assert (base.spec.dtype, base.spec.executed_steps) == ("bfloat16", 4)
    assert base.spec.uri == f"openpi:tiny_libero@{checkpoint}?executed_steps=4"
    seen, noise = observation(base), base.spec.noise.sample(generators([0]))
    policy = create_trained_policy(registered, checkpoint, pytorch_device="cpu")
    theirs = policy.infer(parts.as_openpi(seen), noise=noise[0, 0].numpy())["actions"]
    ours = base.denoise(base.encode(unsqueeze(seen)), noise)[0, 0].numpy()
    assert np.array_equal(ours, theirs.astype(np.float32))


def test_float32_keeps_every_bit_of_the_weights(checkpoint, registered, openpi_zoo):
    whole = load_base(f"openpi:tiny_libero@{checkpoint}", dtype="float32", device="cpu")
    framework = "torch" if "torch" in checkpoint.name else "jax"
    assert whole.spec.dtype == "float32"
    assert whole.sha256() == openpi_zoo.base(f"openpi_{framework}_pi0_float32").sha256()
    half = load_base(f"openpi:tiny_libero@{checkpoint}", device="cpu").state_dict()
    rounded = [name for name, value in whole.state_dict().items() if not torch.equal(value, half[name].float())]
    assert rounded  # bfloat16, as openpi serves it, does not


def test_a_checkpoint_that_is_not_one_is_named(registered, openpi_zoo, tmp_path, checkpoint):
    with pytest.raises(DsrlError, match=r"openpi checkpoint '/none': .*Give a folder or address: openpi:tiny_libero@"):
        load_base("openpi:tiny_libero@/none")
    with pytest.raises(DsrlError, match=r"expected a folder params/ \(JAX\) or a model.safetensors .*got neither"):
        load_base(f"openpi:tiny_libero@{tmp_path}")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(DsrlError, match="expected statistics under assets/libero, got none"):
        load_base(f"openpi:tiny_libero@{tmp_path}")
    with pytest.raises(DsrlError, match="base.dtype: expected bfloat16 or float32, got 'float16'"):
        load_base("openpi:tiny_libero", dtype="float16")
    if checkpoint.name.endswith("jax"):
        with pytest.raises(DsrlError, match="base.device: expected a device of this machine's JAX"):
            load_base(f"openpi:tiny_libero@{checkpoint}", device="cuda:7")


def test_configs_are_known_by_openpis_names():
    with pytest.raises(UnknownNameError, match="unknown openpi config 'pi0_librero'. Did you mean 'pi0_libero'"):
        load_base("openpi:pi0_librero")
    with pytest.raises(NotSteerableError, match="openpi:pi0_fast_droid: expected a flow model"):
        load_base("openpi:pi0_fast_droid")  # before anything is fetched
