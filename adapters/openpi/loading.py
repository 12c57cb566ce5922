"""``openpi:<config>[@<checkpoint>][?<option>=<value>&…]``: openpi's configs and checkpoints, as its users name them.

openpi:pi05_libero                                              the checkpoint that openpi publishes under that name
openpi:pi0_libero@checkpoints/pi0_libero/mine/29999             a folder; JAX or, with a model.safetensors, PyTorch
openpi:pi0_droid@gs://openpi-assets/checkpoints/pi0_droid       anything that openpi can download
openpi:pi0_libero?executed_steps=20&num_steps=10&pool=last_pad  options of `OpenPi`
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from dsrl_vla.errors import DsrlError, bad, unknown

from .keys import KeyMap
from .policy import OpenPi, missing_openpi, not_a_flow

PUBLISHED = "gs://openpi-assets/checkpoints/"
DTYPES = ("bfloat16", "float32")
_OPTIONS = {"executed_steps": int, "num_steps": int, "pool": str}


def load(
    source: str,
    *,
    dtype: str = "bfloat16",
    device: str = "",
    uri: str = "",
    executed_steps: int | None = None,
    num_steps: int | None = None,
    pool: str | None = None,
    keys: KeyMap | None = None,
) -> OpenPi:
    """Load a policy by openpi's config name, with its checkpoint and normalisation statistics.

    Args:
        source: ``<config>[@<checkpoint>][?<option>=<value>&…]``, as above.
        dtype: bfloat16, as openpi serves it, or float32.
        device: cpu, cuda, cuda:<n>; by default the first accelerator that JAX or torch sees.
        executed_steps, num_steps, pool: as in the URI, over which they go.
        keys: how the policy names its inputs.

    Raises:
        NotSteerableError: a π0-FAST config. UnknownNameError: no such config or option; names the nearest.
        DsrlError: no such checkpoint, device or dtype. MissingExtraError: openpi is not installed.
    """
    if dtype not in DTYPES:
        raise bad("base.dtype", " or ".join(DTYPES), f"'{dtype}'")
    name, checkpoint, asked = parse(source)
    try:
        from openpi.models.model import ModelType
        from openpi.training import config as configs
    except ImportError as error:
        raise missing_openpi(error) from error
    if name not in configs._CONFIGS_DICT:
        raise unknown("openpi config", name, configs._CONFIGS_DICT)
    config = configs.get_config(name)
    uri = uri or f"openpi:{source}"
    if config.model.model_type == ModelType.PI0_FAST:
        raise not_a_flow(uri, name)
    policy = _build(config, _fetch(name, checkpoint), dtype, device)
    given = {"executed_steps": executed_steps, "num_steps": num_steps, "pool": pool, "keys": keys}
    options = asked | {option: value for option, value in given.items() if value is not None}
    return OpenPi(policy, config=name, uri=uri, **options)


def parse(source: str) -> tuple[str, str, dict[str, Any]]:
    """``<config>[@<checkpoint>][?<options>]`` -> (config, checkpoint, options).

    Raises:
        DsrlError: no config, or an option whose value is not of its kind. UnknownNameError: no such option.
    """
    address, _, query = source.partition("?")
    name, _, checkpoint = address.partition("@")
    if not name:
        raise bad("base", "'openpi:<config>[@<checkpoint>]' such as 'openpi:pi05_libero'", f"'openpi:{source}'")
    options: dict[str, Any] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in _OPTIONS:
            raise unknown("openpi option", key, _OPTIONS)
        if _OPTIONS[key] is int and not value.isdecimal():
            raise bad(f"openpi option {key}", "a whole number", f"'{value}'")
        options[key] = _OPTIONS[key](value)
    return name, checkpoint or PUBLISHED + name, options


def _fetch(name: str, checkpoint: str) -> Path:
    from openpi.shared import download

    try:
        return download.maybe_download(checkpoint)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        fix = f"Give a folder or address: openpi:{name}@<checkpoint>."
        raise bad(f"openpi checkpoint '{checkpoint}'", "one that exists or can be fetched", reason, fix) from error


def _build(config: Any, folder: Path, dtype: str, device: str) -> Any:
    """As openpi's ``create_trained_policy``, which knows no other dtype than bfloat16 and no device for JAX."""
    from openpi import transforms
    from openpi.policies.policy import Policy
    from openpi.training import checkpoints

    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    is_torch = (folder / "model.safetensors").exists()
    if not is_torch and not (folder / "params").exists():
        raise bad(
            f"openpi checkpoint '{folder}'", "a folder params/ (JAX) or a model.safetensors (PyTorch)", "neither"
        )
    data = config.data.create(config.assets_dirs, config.model)
    if data.asset_id is None:
        raise DsrlError(
            f"openpi config '{config.name}': expected an asset id, got none; it has no statistics to load."
        )
    try:
        statistics = checkpoints.load_norm_stats(folder / "assets", data.asset_id)
    except FileNotFoundError as error:
        raise bad(f"openpi checkpoint '{folder}'", f"statistics under assets/{data.asset_id}", "none") from error
    device = _torch_device(device) if is_torch else device
    model = _torch_model(config, folder, dtype) if is_torch else _jax_model(config, folder, dtype, device)
    quantiles = data.use_quantile_norm
    return Policy(
        model,
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
        metadata=config.policy_metadata,
        is_pytorch=is_torch,
        pytorch_device=device,
    )


def _torch_device(device: str) -> str:
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _torch_model(config: Any, folder: Path, dtype: str) -> Any:
    model = config.model.load_pytorch(config, str(folder / "model.safetensors"))
    model.paligemma_with_expert.to_bfloat16_for_selected_params(dtype)
    return model


def _jax_model(config: Any, folder: Path, dtype: str, device: str) -> Any:
    import jax
    import jax.numpy as jnp
    from openpi.models import model as openpi_model

    sharding = jax.sharding.SingleDeviceSharding(_jax_device(device)) if device else None
    weights = openpi_model.restore_params(folder / "params", dtype=jnp.dtype(dtype), sharding=sharding)
    return config.model.load(weights)


def _jax_device(device: str) -> Any:
    import jax

    kind, _, index = device.partition(":")
    try:
        return jax.devices("gpu" if kind == "cuda" else kind)[int(index or 0)]
    except (RuntimeError, IndexError, ValueError) as error:
        seen = ", ".join(map(str, jax.devices()))
        raise bad("base.device", f"a device of this machine's JAX ({seen})", f"'{device}'") from error
