"""Heads on the Hugging Face Hub: fetch, push, pull, look into.

huggingface_hub's `PyTorchModelHubMixin` is not used: it falls back to a pickle, loads non-strictly and wants a
``config.json``. Its conventions are kept: the same three methods, the same options, the ordinary cache.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artefact import (
    CARD,
    CURVES,
    EVAL,
    HEAD_FILES,
    LARGEST,
    LISTED,
    RECIPE,
    VIDEO,
    check_folder,
    check_size,
    held,
    read_config,
)
from .errors import DsrlError, bad, unknown
from .head_config import HeadConfig
from .manifest import write_manifest
from .pairing import check_pair
from .plain import read_object
from .run_dir import TENSORS, checkpoints, disk_errors

if TYPE_CHECKING:
    from .head import SteeringHead
    from .recipe import Recipe

SHELF = "shipped:"


def shipped_heads() -> dict[str, Path]:
    """Heads that come with the package: name of their recipe -> folder."""
    shelf = Path(str(resources.files("dsrl_vla.data").joinpath("heads")))
    return {path.parent.name: path.parent for path in sorted(shelf.glob("*/head_config.json"))}


def fetch(
    source: Path | str,
    revision: str | None = None,
    *,
    files: Collection[str] = HEAD_FILES,
    token: str | bool | None = None,
    cache_dir: Path | str | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    endpoint: str | None = None,
) -> Path:
    """The folder of a head: itself, one of the shelf (``shipped:<recipe>``), or a repository's in the Hub's cache.

    Sizes are looked at before anything is downloaded. Without a network, or offline, the cache answers.

    Raises:
        DsrlError: no such folder, head or repository; a file that is too large; a revision of what has none.
    """
    name = str(source)
    if name.startswith(SHELF):
        known = shipped_heads()
        if name.removeprefix(SHELF) not in known:
            raise unknown("shipped head", name.removeprefix(SHELF), known)
        _check_revision(name, revision)
        return known[name.removeprefix(SHELF)]
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_revision(name, revision)
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise bad(f"head '{name}'", "a folder, a Hub repository 'owner/name', or 'shipped:<recipe>'", "neither")
    from huggingface_hub import HfApi, constants, snapshot_download

    offline = local_files_only or constants.HF_HUB_OFFLINE
    try:
        if not offline:
            offline = not _check_remote(HfApi(endpoint=endpoint, token=token), name, revision, files)
        path = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(files),
            token=token,
            cache_dir=cache_dir,
            local_files_only=offline,
            force_download=force_download,
            endpoint=endpoint,
        )
    except DsrlError:
        raise
    except Exception as error:
        has = "only a part" if _in_part(error) else "none"
        asked = f"the Hub could not be asked (no network, or HF_HUB_OFFLINE) and its cache has {has}"
        words = asked if offline else " ".join(str(error).split())
        raise bad(f"head '{name}'", "a folder or a Hub repository", f"no such folder here, and {words}") from error
    return Path(path)


def _check_revision(name: str, revision: str | None) -> None:
    """Refuse one of what has none: whoever pins it would think that it had been looked at."""
    if revision:
        raise bad("revision", f"none, for '{name}' is no repository of the Hub's", f"'{revision}'")


def _in_part(error: BaseException | None) -> bool:
    """Whether the Hub's cache has only some of what was asked for; older versions of it do not know."""
    return type(error).__name__ == "IncompleteSnapshotError"


def _check_remote(api: Any, repo_id: str, revision: str | None, files: Collection[str]) -> bool:
    """Check the sizes of a repository's files; False when the Hub cannot be reached, or is too busy.

    Raises:
        DsrlError: a file is too large.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
    except HfHubHTTPError as error:
        if error.response.status_code == 429 or error.response.status_code >= 500:
            return False
        raise
    except (OfflineModeIsEnabled, OSError):
        return False
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "requests"):
            return False
        raise
    for sibling in info.siblings or ():
        if sibling.rfilename in files:
            check_size(sibling.rfilename, sibling.size or 0, repo_id)
    return True


def write_artefact(head: SteeringHead, folder: Path, run: Path | None = None) -> None:
    """Write what a repository holds: the head, what a run says about it, card and manifest.

    Args:
        run: a run's directory, whose ``eval.json``, ``recipe.yaml``, ``curves.png`` and ``rollouts.mp4`` go with it.

    Raises:
        DsrlError: `run` has not been evaluated.
    """
    from .card import head_card

    if run is not None and not (run / EVAL).is_file():
        raise bad(f"{run}", f"a finished run, with an {EVAL}", "none", "Finish it: dsrl-vla train … --resume")
    if run is not None and not {"env_steps", "search_env_steps"} & set(read_object(run / EVAL)):
        fix = "Finish it: dsrl-vla train … --resume"
        raise bad(f"{run / EVAL}", "what a finished run says of itself", "the evaluation of one under way", fix)
    head.save_pretrained(folder)
    with disk_errors(folder):
        for name in (EVAL, RECIPE, CURVES, VIDEO):
            if run is not None and (run / name).is_file():
                shutil.copyfile(run / name, folder / name)
        (folder / CARD).write_text(head_card(head.config, folder))
        write_manifest(folder, [name for name in LISTED if (folder / name).is_file()])
    check_folder(folder, str(folder))


def push(
    head: SteeringHead,
    repo_id: str,
    *,
    run: Path | str | None = None,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Push a steering head with dsrl-vla",
    endpoint: str | None = None,
) -> str:
    """Push a head in one commit; return the commit's URL. Options are those of `ModelHubMixin.push_to_hub`.

    Raises:
        DsrlError: the Hub refuses, or cannot be reached; see also `write_artefact`.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint, token=token)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_artefact(head, folder, None if run is None else Path(run))
        try:
            name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if branch is not None:
                api.create_branch(name, branch=branch, exist_ok=True)
            commit = api.upload_folder(
                repo_id=name,
                folder_path=folder,
                revision=branch,
                create_pr=create_pr,
                commit_message=commit_message,
                allow_patterns=list(LARGEST),
                delete_patterns=list(LARGEST),  # of an earlier head: its evaluation is not this one's
            )
        except Exception as error:
            words = " ".join(str(error).split())
            raise DsrlError(f"repository '{repo_id}': expected a Hub that takes the head, got {words}") from error
    return str(commit.commit_url)


def completed(head: SteeringHead, recipe: Recipe, run: Path) -> SteeringHead:
    """A head that knows its base and how far its training went; one of an older version is told.

    Its recipe's base is loaded for the one, the run's newest checkpoint looked into for the other.

    Raises:
        MismatchError: that base is not the head's.
    """
    if head.config.fingerprint is None:
        base = recipe.base.load()
        check_pair(head.config, base)
        fresh = HeadConfig.for_base(base.spec, head.layout, head.config.network, fingerprint=base.fingerprint())
        names = ("action_dim", "base_cameras", "sampler_steps", "fingerprint")
        head.config = replace(head.config, **{name: getattr(fresh, name) for name in names})
    if not head.config.furthest and (found := checkpoints(run / "checkpoints")):
        from safetensors.torch import load_file

        seen = {k: v for k, v in load_file(found[-1] / TENSORS).items() if k.startswith("replay.inputs.")}
        head.calibrate({k.removeprefix("replay.inputs."): v for k, v in seen.items()})
    return head


def pull(source: str, out: Path, revision: str | None = None, **options: Any) -> Path:
    """Copy a head with all that came with it to a folder, checked; options as `fetch`.

    Raises:
        DsrlError: `out` exists; not a sound head (see `SteeringHead.from_pretrained`).
    """
    from .head import SteeringHead

    if out.exists():
        raise bad(f"{out}", "a new folder", "one that exists")
    folder = fetch(source, revision, files=tuple(LARGEST), **options)
    SteeringHead.from_pretrained(folder)
    with disk_errors(out.parent):
        out.mkdir(parents=True)
        for name in held(folder):
            shutil.copyfile(folder / name, out / name)
    return out


def inspect(source: str, revision: str | None = None, **options: Any) -> dict[str, Any]:
    """What a head says about itself: whose it is, what it was measured at, how large it is. Loads no base.

    Raises:
        DsrlError: not a sound head.
    """
    from .head import SteeringHead

    try:
        folder = fetch(source, revision, files=tuple(LARGEST), **options)
    except DsrlError as error:  # a cache that nobody can fill may have the head alone
        if not _in_part(error.__cause__):
            raise
        folder = fetch(source, revision, **options)
    head = SteeringHead.from_pretrained(folder)
    config, files = read_config(folder, source), held(folder)
    found: dict[str, Any] = {
        "base": config.base_model_name_or_path,
        "revision": config.revision,
        "adapter": config.adapter,
        "fingerprint": "",
        "layout": config.layout.name,
        "bound": config.layout.bound,
        "noise shape": list(config.layout.space.shape),
        "executed steps": config.executed_steps,
        "network": f"{config.network.kind}, {sum(p.numel() for p in head.parameters())} weights",
        "dsrl_vla_version": config.dsrl_vla_version,
        "files": sorted(files),
    }
    if config.fingerprint is not None:
        parts = {
            "weights": config.fingerprint.weights[:12],
            "processors": ", ".join(config.fingerprint.processors),
            "behaviour": f"{len(config.fingerprint.behaviour)} numbers" if config.fingerprint.behaviour else "",
        }
        found["fingerprint"] = {name: value or "unknown" for name, value in parts.items()}
    if EVAL in files:
        result = read_object(folder / EVAL, EVAL)
        found["evaluation"] = {
            k: result.get(k) for k in ("task", "episodes", "seeds", "base", "steered", "difference")
        }
    return found
