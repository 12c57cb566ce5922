"""Loading a LeRobot policy directory: config, weights (safetensors) and processors, offline where it can be.

A checkpoint names other repositories: a tokenizer, a vision-language model whose config it needs. Wherever the
policy's folder holds a subfolder of that repository's last name, the subfolder is used instead.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsrl_vla.errors import DsrlError, MissingExtraError, NotSteerableError, bad
from dsrl_vla.plain import read_object

from ..refusals import refuse_unsteerable
from ..transformers_pi0 import DTYPES, resolve
from .policy import LeRobotPolicy
from .split import Split
from .splits import KNOWN, find_split
from .steps import no_code_of, own_steps
from .weights import check_loaded

_PROCESSORS = {"pre": "policy_preprocessor.json", "post": "policy_postprocessor.json"}


def load(
    source: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    uri: str = "",
    config: Mapping[str, Any] | None = None,
    cameras: Mapping[str, str] | None = None,
    absent: Sequence[str] = (),
) -> LeRobotPolicy:
    """Load a policy that LeRobot saved, from a folder or from the Hub as ``repo/name[@revision]``.

    Args:
        dtype: float32 or bfloat16; bfloat16 where the policy's class can be served in it.
        config: keys of the policy's config to change, such as ``{"noise_scheduler_type": "DDIM"}``.
        cameras: camera of the task -> camera of the policy, where their names differ.
        absent: cameras of the policy that there are none of here; pi0, pi05 and smolvla do without.

    Raises:
        NotSteerableError: a policy, or a mode of one, that has no initial noise to steer.
        MissingExtraError: LeRobot, or the extra that this policy needs, is not installed.
        DsrlError: no such folder or repository; a policy type this adapter does not know; a file that is missing;
            an installed LeRobot whose class has another interface than the adapter was written for; weights that
            LeRobot could not load.
    """
    if dtype not in DTYPES:
        raise bad("base.dtype", " or ".join(DTYPES), f"'{dtype}'")
    folder, repo_id, revision = resolve(source)
    raw = _read_json(folder / "config.json", source, "a LeRobot policy") | dict(config or {})
    kind = _check_kind(source, raw)
    require_lerobot("the adapter 'lerobot:'")
    from lerobot.configs import PreTrainedConfig

    policy_config = PreTrainedConfig.from_pretrained(folder)
    _configure(policy_config, folder, dict(config or {}), device)
    split_class = find_split(kind)
    split_class.refuse(policy_config)
    if split_class.cast is not Split.cast and hasattr(policy_config, "dtype"):
        policy_config.dtype = dtype  # or weights in float32 would be read into a model in bfloat16
    weights = folder / "model.safetensors"
    if not weights.exists():
        raise bad(f"base '{source}'", "a model.safetensors", "none in that folder")
    with _explained(kind, source), _quiet(), no_code_of(source):
        policy = _policy_class(kind).from_pretrained(folder, config=policy_config)
    check_loaded(policy, weights, source)
    split = split_class(policy)
    split.cast(DTYPES[dtype])  # whatever the checkpoint's config says
    preprocess, postprocess = _processors(folder, source, policy_config, device)
    return LeRobotPolicy(
        split,
        preprocess,
        postprocess,
        uri=uri or f"lerobot:{source}",
        dtype=dtype,
        cameras=cameras,
        absent=absent,
        repo_id=repo_id,
        revision=revision,
    )


def require_lerobot(what: str) -> None:
    """Raise MissingExtraError, with the remedy, unless LeRobot can be imported."""
    try:
        import lerobot.policies  # noqa: F401
    except ImportError as error:
        have = f"Python {sys.version_info.major}.{sys.version_info.minor}"
        raise MissingExtraError(
            f"{what} needs the package 'lerobot' (0.6 or newer, Python 3.12 or newer; this is {have}), which could "
            f"not be imported ({error}). Install it with: pip install 'dsrl-vla[lerobot]'"
        ) from error


def _check_kind(source: str, raw: Mapping[str, Any]) -> str:
    """The policy's type; refuses what cannot be steered before anything heavy is imported."""
    kind = str(raw.get("type", ""))
    flow = raw.get("objective") == "flow_matching"
    refuse_unsteerable(source, {k: v for k, v in raw.items() if not (flow and k == "noise_scheduler_type")})
    if kind not in KNOWN:
        raise NotSteerableError(
            f"{source}/config.json: expected a policy type that this adapter knows ({', '.join(sorted(KNOWN))}), got "
            f"'{kind}'. A new one is a `Split` in adapters/lerobot/."
        )
    return kind


def _configure(config: Any, folder: Path, changes: Mapping[str, Any], device: str) -> None:
    for key, value in changes.items():
        if not hasattr(config, key):
            raise bad("base.config", f"a field of {type(config).__name__}", f"'{key}'")
        setattr(config, key, value)
    config.device, config.pretrained_path = device, folder
    for key, value in vars(config).items():
        if isinstance(value, str) and (local := _beside(folder, value)):
            setattr(config, key, local)
    for key in ("compile_model", "load_vlm_weights"):  # the seam is in the plain method; the weights are in the file
        if getattr(config, key, False):
            setattr(config, key, False)


def _beside(folder: Path, repo_id: str) -> str | None:
    """The subfolder that stands for a repository, if the policy's folder has one."""
    name = Path(repo_id).name
    local = folder / name
    return str(local) if name not in ("", ".", "..") and local.is_dir() else None


def _policy_class(kind: str) -> Any:
    from lerobot.policies.factory import get_policy_class

    return get_policy_class(kind)


def _processors(folder: Path, source: str, config: Any, device: str) -> tuple[Any, Any]:
    from lerobot.policies.factory import make_pre_post_processors

    overrides: dict[str, dict[str, Any]] = {"pre": {}, "post": {}}
    for side, name in _PROCESSORS.items():
        tree = _read_json(folder / name, source, "LeRobot's processor files (0.6 or newer)")
        for key, settings in own_steps(tree, f"{source}/{name}"):
            local = {k: p for k, v in settings.items() if isinstance(v, str) and (p := _beside(folder, v))}
            if local:
                overrides[side][key] = local
    overrides["pre"]["device_processor"] = {"device": device}
    with _explained(config.type, source), _quiet(), no_code_of(source):
        return make_pre_post_processors(
            config,
            str(folder),
            preprocessor_overrides=overrides["pre"],
            postprocessor_overrides=overrides["post"],
        )


@contextlib.contextmanager
def _explained(kind: str, source: str) -> Iterator[None]:
    """Say in a line which package or file a policy lacks, and how to get it."""
    try:
        yield
    except DsrlError:
        raise
    except ImportError as error:
        extra = KNOWN[kind].extra
        raise MissingExtraError(
            f"a '{kind}' policy needs LeRobot's extra '{extra}', of which something is missing ({error}). "
            f"Install it with: pip install 'lerobot[{extra}]'"
        ) from error
    except (OSError, ValueError) as error:  # LeRobot turns the one into the other
        raise DsrlError(
            f"{source}: expected LeRobot to load it, got: {' '.join(str(error).split())} Where this is about a "
            "repository that cannot be reached (a tokenizer, say): put it into a subfolder of the policy's folder "
            "that has the repository's last name."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """LeRobot prints while it loads."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _read_json(path: Path, source: str, what: str) -> dict[str, Any]:
    if not path.exists():
        raise bad(f"base '{source}'", f"{what}, with a {path.name}", "none in that folder")
    return read_object(path)
